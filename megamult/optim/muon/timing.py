"""Choice of the method of Newton-Schulz for each shape, by timing all methods on this device.

Which method is fastest depends on shape, dtype and device: where matrix units make FLOPs cheap, copies are dear. The
first run that needs a shape times every method with random matrices, on global rank 0, and all ranks use its choice.
A file keeps the choice, so that later runs on such a device make the same one::

    python -m megamult.optim.muon.timing           # prints what is kept
    python -m megamult.optim.muon.timing --clear   # removes it, so that the next runs time anew

There is one file for each name of a device and version of torch, in the folder MEGAMULT_CACHE_DIR of the environment
(default: `megamult` in XDG_CACHE_HOME, or in ~/.cache).

Methods differ by rounding. A run whose trajectory must not depend on timings sets `optimizer.muon.ns_form`.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import fcntl
import json
import os
import re
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from megamult.optim.muon.coefficients import Coefficients
from megamult.optim.muon.newton_schulz import Method, orthogonalize_by
from megamult.optim.muon.symmetric import Products, has_kernel

Shape = tuple[int, int]

_ROUNDS = 5
"""Largest number of timings of a method after its first one."""
_SECONDS = 0.5
"""Time after which the methods of a shape are not timed again."""
_HOPELESS = 2.0
"""A method whose first timing is this many times the fastest method's is not timed again."""
_BATCH_ELEMENTS = 2**20
"""Elements of a batch with which methods are timed, unless one matrix has more."""
_LARGEST_BATCH = 8


@dataclass(frozen=True)
class Chosen:
    """The fastest method of a shape."""

    method: Method
    seconds: float
    """Seconds that it takes for one matrix."""


def methods(shape: Shape, dtypes: Sequence[torch.dtype], device: torch.device) -> list[Method]:
    """Return the methods that are timed for a shape."""
    small, large = sorted(shape)
    # A large matrix fills the device by itself.
    together = (True, False) if _batch(shape) > 1 else (True,)
    found = []
    for dtype in dtypes:
        ways: list[Products] = ["whole", "block_rows"]
        if has_kernel(small, large, dtype, device):
            ways.append("kernel")
        found += [
            Method(form, products, each, dtype)
            for form in ("standard", "gram")
            for products in ways
            for each in together
        ]
    return found


def _batch(shape: Shape) -> int:
    return max(1, min(_LARGEST_BATCH, _BATCH_ELEMENTS // (shape[0] * shape[1])))


def fastest(
    shape: Shape,
    steps: Coefficients,
    dtypes: Sequence[torch.dtype],
    device: torch.device,
    clock: Callable[[], float] = time.perf_counter,
) -> Chosen:
    """Time the methods of a shape, and return the fastest.

    All methods are timed once, those that are not hopeless a few times more in turn. The shortest time of each counts,
    because other work on the machine only makes times longer.
    """
    batch = _batch(shape)
    generator = torch.Generator(device).manual_seed(0)  # not torch's own, whose state is the run's
    matrices = torch.randn(batch, *shape, generator=generator, device=device)

    def seconds(method: Method) -> float:
        _synchronize(device)
        began = clock()
        orthogonalize_by(matrices, steps, method)
        _synchronize(device)
        return (clock() - began) / batch

    began = clock()
    taken: dict[Method, float] = {}
    for method in methods(shape, dtypes, device):
        first = seconds(method)  # compiles kernels, and makes libraries prepare theirs
        taken[method] = first if first > _SECONDS / 10 else seconds(method)
    left = [method for method, each in taken.items() if each < _HOPELESS * min(taken.values())]
    for _ in range(_ROUNDS):
        if clock() - began > _SECONDS:
            break
        for method in left:
            taken[method] = min(taken[method], seconds(method))
    best = min(left, key=lambda method: taken[method])
    return Chosen(best, taken[best])


def _synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


class Kept:
    """Choices in the file for one device and version of torch.

    Args:
        device: the device.
        folder: folder of the files; by default the one that the module's docstring names.

    Attributes:
        path: the file.
    """

    def __init__(self, device: torch.device, folder: Path | None = None) -> None:
        self.device = device_name(device)
        name = re.sub(r"[^\w.+-]+", "_", f"{self.device}-torch-{torch.__version__}")
        self.path = (folder or cache_folder()) / f"newton_schulz-{name}.json"

    def read(self) -> dict[str, Any]:
        """Return what is kept, by key. A file that is missing or damaged keeps nothing."""
        try:
            content = json.loads(self.path.read_text(encoding="utf-8"))
            return dict(content["methods"])
        except (OSError, ValueError, KeyError, TypeError):
            return {}

    def keep(self, found: Mapping[str, Any], before: Mapping[str, Any]) -> dict[str, Any]:
        """Add choices to the file, and return those that it then has under the same keys.

        Where another run has added a key since `before` was read, its choice stays, so that all runs have the same.

        Raises:
            OSError: the file cannot be written.
        """
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with _locked(self.path.with_suffix(".lock")):
            now = self.read()
            known = now | {key: each for key, each in found.items() if now.get(key) == before.get(key)}
            content = {"device": self.device, "torch": torch.__version__, "methods": known}
            written = self.path.with_suffix(f".{os.getpid()}.tmp")
            written.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
            written.replace(self.path)
        return {key: known[key] for key in found}


@contextlib.contextmanager
def _locked(path: Path) -> Iterator[None]:
    with path.open("a") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def cache_folder() -> Path:
    """Return the folder of the files."""
    if given := os.environ.get("MEGAMULT_CACHE_DIR"):
        return Path(given)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "megamult"


def device_name(device: torch.device) -> str:
    """Return the name of a GPU or of this machine's CPU."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    about = Path("/proc/cpuinfo").read_text(encoding="utf-8") if Path("/proc/cpuinfo").exists() else ""
    lines = dict(re.findall(r"^(model name|model|flags)\s*: (.*)$", about, re.MULTILINE))
    # Some virtual machines have the same name for processors with and without matrix units.
    units = [unit for unit in ("amx_bf16", "avx512_bf16", "avx512f") if unit in lines.get("flags", "").split()]
    return " ".join([lines.get("model name", "CPU"), lines.get("model", ""), *units[:1]])


def choose(
    shapes: Iterable[Shape],
    steps: Coefficients,
    dtypes: Sequence[torch.dtype],
    device: torch.device,
    kept: Kept | None = None,
    time_one: Callable[..., Chosen] = fastest,
) -> dict[Shape, Chosen]:
    """Return the fastest method for each shape, from the file or by timing. Only one process of a run calls this.

    Args:
        shapes: shapes (rows, cols) of the matrices. A matrix and its transpose have the same method.
        steps: coefficients of the steps.
        dtypes: dtypes that the products may have.
        device: the device to time on.
        kept: the file.
        time_one: function that times one shape, :func:`fastest`.
    """
    kept = kept or Kept(device)
    known, found = kept.read(), dict[str, Any]()
    asked = {shape: _key(shape, steps, dtypes) for shape in shapes}
    for shape, key in asked.items():
        if key not in found and _parsed(known.get(key), methods(shape, dtypes, device)) is None:
            found[key] = _plain(time_one(shape, steps, dtypes, device))
    if found:
        try:
            known |= kept.keep(found, known)
        except OSError as error:
            known |= found
            print(
                f"warning: {kept.path} cannot be written ({error}): Newton-Schulz is timed again at the next start, "
                "which may choose otherwise; set MEGAMULT_CACHE_DIR to a folder that can be written, or "
                "optimizer.muon.ns_form to a form",
                file=sys.stderr,
                flush=True,
            )
    chosen = {shape: _parsed(known[key], methods(shape, dtypes, device)) for shape, key in asked.items()}
    return {shape: each for shape, each in chosen.items() if each is not None}


def _key(shape: Shape, steps: Coefficients, dtypes: Sequence[torch.dtype]) -> str:
    small, large = sorted(shape)
    return f"{small}x{large}, {len(steps)} steps, {' or '.join(str(dtype)[6:] for dtype in dtypes)}"


def _plain(chosen: Chosen) -> dict[str, Any]:
    method = dataclasses.asdict(chosen.method) | {"dtype": str(chosen.method.dtype)[6:]}
    return {**method, "milliseconds": round(1e3 * chosen.seconds, 6)}


def _parsed(entry: Any, possible: Sequence[Method]) -> Chosen | None:
    """Return the choice that an entry of the file describes, or None if it describes none of the possible methods."""
    try:
        values = dict(entry)
        seconds = float(values.pop("milliseconds")) / 1e3
        method = Method(**values | {"dtype": getattr(torch, values["dtype"])})
    except (TypeError, ValueError, KeyError, AttributeError):
        return None
    return Chosen(method, seconds) if method in possible else None


def main(arguments: Sequence[str] | None = None) -> None:
    """Print or remove what is kept for all devices."""
    parser = argparse.ArgumentParser(prog="python -m megamult.optim.muon.timing", description=__doc__.split("\n")[0])
    parser.add_argument("--clear", action="store_true", help="remove the files")
    clear = parser.parse_args(arguments).clear
    files = sorted(cache_folder().glob("newton_schulz-*.json"))
    if not files:
        print(f"{cache_folder()} keeps no choice yet")
    for path in files:
        if clear:
            path.unlink()
            print(f"removed: {path}")
            continue
        content = json.loads(path.read_text(encoding="utf-8"))
        print(f"{content['device']}, torch {content['torch']} ({path})")
        for key, entry in content["methods"].items():
            batches = "batched" if entry["together"] else "one by one"
            products = entry["products"].replace("_", " ")
            print(f"  {key}: {entry['form']}, {products}, {batches}, {entry['dtype']}, {entry['milliseconds']:.3f} ms")


if __name__ == "__main__":
    main()
