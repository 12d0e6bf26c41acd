"""A device "cuda" for fake tensors, on a machine whose torch is not built for CUDA.

Tensors of torch's FakeTensorMode have a shape, a dtype and a device, and no values. A build of torch for CPUs makes
them on "cuda" too, but its autograd engine ends the process at the first of them. Importing this module, before torch,
gives it what it asks for (`fake_cuda.cpp`), and makes torch.compile return what counts as one launch. It is for a
process of its own, because torch then says that it has an accelerator.

Raises at import:
    RuntimeError: torch is imported already.
    SystemExit: there is no C++ compiler.
"""

from __future__ import annotations

import contextlib
import ctypes
import importlib.util
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Protocol


class Counts(Protocol):
    """What counts launches."""

    def one_launch(self) -> contextlib.AbstractContextManager[None]:
        """Count all launches inside the context as one."""


COUNTING: list[Counts] = []
"""What counts now; empty if nothing does."""


def _load() -> None:
    """Compile and load the device, unless torch is built for CUDA."""
    if "torch" in sys.modules:
        raise RuntimeError("torch is imported already, and has looked for CUDA: import fake_cuda first")
    spec = importlib.util.find_spec("torch")
    assert spec is not None and spec.origin is not None
    home = Path(spec.origin).parent
    if not (home / "lib" / "libtorch_cuda.so").exists():
        with tempfile.TemporaryDirectory() as folder:
            library = str(Path(folder) / "fake_cuda.so")
            command = [
                *(os.environ.get("CXX", "g++"), "-shared", "-fPIC", "-std=c++20", "-O0", "-w", f"-I{home / 'include'}"),
                *(str(Path(__file__).with_suffix(".cpp")), f"-L{home / 'lib'}", f"-Wl,-rpath,{home / 'lib'}"),
                *("-lc10", "-ltorch_cpu", "-o", library),
            ]
            try:
                subprocess.run(command, check=True)
            except (OSError, subprocess.CalledProcessError) as error:
                raise SystemExit(f"fake CUDA tensors need a C++ compiler ({error}): install g++, or set CXX") from None
            ctypes.CDLL(library, mode=ctypes.RTLD_GLOBAL)


def _compile(function: Callable[..., Any] | None = None, **options: Any) -> Callable[..., Any]:
    """Return a function that calls `function` and counts as one launch, as the kernel that torch would make of it."""
    if function is None:
        return lambda each: _compile(each, **options)
    compiled: Callable[..., Any] = function

    def call(*args: Any, **kwargs: Any) -> Any:
        with one_launch():
            return compiled(*args, **kwargs)

    return call


@contextlib.contextmanager
def one_launch() -> Iterator[None]:
    """Count all launches inside the context as one, if something counts."""
    with COUNTING[-1].one_launch() if COUNTING else contextlib.nullcontext():
        yield


os.environ["DS_ACCELERATOR"] = "cuda"
_load()

import torch  # noqa: E402

torch.compile = _compile  # before Megatron and megamult bind its results
