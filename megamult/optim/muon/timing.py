"""Choice of the method of Newton-Schulz for each shape, by timing all methods on this device.

Which method is fastest depends on shape, dtype and device: where matrix units make FLOPs cheap, copies are dear. The
first run that needs a shape times every method with random matrices, on global rank 0, and all ranks use its choice.
A file keeps the choice, so that later runs on such a device make the same one::

    python -m megamult.optim.muon.timing           # prints what is kept
    python -m megamult.optim.muon.timing --clear   # removes it, so that the next runs time anew

There is one file for each name of a device and version of torch, in the folder MEGAMULT_CACHE_DIR of the environment
(default: `megamult` in XDG_CACHE_HOME, or in ~/.cache). A checkpoint keeps the choices of its run too, and a run that
goes on from it uses these.

Methods differ by rounding. A run whose trajectory must not depend on timings sets `optimizer.muon.ns_form`.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import sys
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from megamult.optim.muon.coefficients import Coefficients
from megamult.optim.muon.kept import Kept, cache_folder, entries
from megamult.optim.muon.newton_schulz import Method, fixed_method, flops, orthogonalize_by
from megamult.optim.muon.symmetric import Products, kernel_suits

Shape = tuple[int, int]

_ROUNDS = 5
"""Largest number of timings of a method after its first one."""
_SECONDS = 0.5
"""Time after which the methods of a shape are not timed again."""
_HOPELESS = 2.0
"""A method whose first timing is this many times the fastest method's is not timed again."""
_MARGIN = 1.3
"""Number by which another dtype than the first must be faster to be chosen: it changes the precision."""
_BATCH_ELEMENTS = 2**20
"""Elements of a batch with which methods are timed, unless one matrix has more."""
_LARGEST_BATCH = 8
_CPU_FLOPS = 300e9
"""FLOPs of the standard form for one matrix above which nothing is timed on a CPU, because it would take minutes."""


@dataclass(frozen=True)
class Chosen:
    """The method of a shape."""

    method: Method
    seconds: float | None
    """Seconds that it takes for one matrix; None if nothing was timed."""


def methods(shape: Shape, dtypes: Sequence[torch.dtype], kernel: bool) -> list[Method]:
    """Return the methods that are timed for a shape. `kernel` says whether all ranks have the kernel."""
    small, large = sorted(shape)
    # A large matrix fills the device by itself.
    together = (True, False) if _batch(shape) > 1 else (True,)
    found = []
    for dtype in dtypes:
        ways: list[Products] = ["whole", "block_rows"]
        if kernel and kernel_suits(small, large, dtype):
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
    candidates: Sequence[Method],
    device: torch.device,
    clock: Callable[[], float] = time.perf_counter,
) -> Chosen:
    """Time methods for a shape, and return the fastest.

    Each is called once, which compiles kernels and makes libraries prepare theirs, and timed at its second call. Those
    that are not hopeless are then timed a few times more, in turn. The shortest time of each counts, because other work
    on the machine only makes times longer. A method that does not find enough memory is never chosen.

    Args:
        shape: shape of the matrices.
        steps: coefficients of the steps.
        candidates: the methods, those of the preferred dtype first.
        device: the device to time on.
        clock: function that returns the time in seconds.
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

    taken: dict[Method, float] = {}
    for method in candidates:
        with contextlib.suppress(torch.OutOfMemoryError):
            seconds(method)
            taken[method] = seconds(method)
    if not taken:
        raise torch.OutOfMemoryError(f"there is no room to compute Newton-Schulz for one matrix of the shape {shape}")
    left = [method for method, each in taken.items() if each < _HOPELESS * min(taken.values())]
    began = clock()
    for _ in range(_ROUNDS):
        if clock() - began > _SECONDS:
            break
        for method in left:
            taken[method] = min(taken[method], seconds(method))
    preferred = candidates[0].dtype
    best = min(left, key=lambda method: taken[method] * (1.0 if method.dtype == preferred else _MARGIN))
    return Chosen(best, taken[best])


def _synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def shape_key(shape: Shape, steps: Coefficients, dtypes: Sequence[torch.dtype]) -> str:
    """Return the name under which a checkpoint keeps the choice for a shape and for its transpose."""
    small, large = sorted(shape)
    return f"{small}x{large}, {len(steps)} steps, {' or '.join(map(_name, dtypes))}"


def choose(
    shapes: Iterable[Shape],
    steps: Coefficients,
    dtypes: Sequence[torch.dtype],
    device: torch.device,
    *,
    kernel: bool = False,
    known: Mapping[str, Any] = {},
    folder: Path | None = None,
    time_one: Callable[[Shape, Coefficients, Sequence[Method], torch.device], Chosen] = fastest,
) -> dict[Shape, Chosen]:
    """Return the method for each shape: the one that a checkpoint had, or the one in the file, or the fastest. Only one
    process of a run calls this.

    Args:
        shapes: shapes (rows, cols) of the matrices. A matrix and its transpose have the same method.
        steps: coefficients of the steps.
        dtypes: dtypes that the products may have, the preferred one first.
        device: the device to time on.
        kernel: whether all ranks have the kernel.
        known: choices of the run so far, by :func:`shape_key`.
        folder: folder of the file; None: that of the environment.
        time_one: function that times the methods of one shape, :func:`fastest`.
    """
    threads = f"{torch.get_num_threads()} threads, " if device.type == "cpu" else ""
    found: dict[str, Chosen] = {}
    kept, problem, timed = None, None, False
    try:
        kept = Kept(device, folder)
    except OSError as error:
        problem = error
    in_file = {} if kept is None else kept.read()
    for shape in shapes:
        name, possible = shape_key(shape, steps, dtypes), methods(shape, dtypes, kernel)
        if name in found:
            continue
        chosen = _parsed(known.get(name))
        if chosen is None and device.type == "cpu" and flops(*shape, len(steps), "standard", "whole") > _CPU_FLOPS:
            chosen = Chosen(fixed_method(*shape, len(steps), dtypes[0]), None)
        if chosen is None or chosen.method not in possible:
            # All that the fastest method depends on, and which methods there were to choose from.
            key = f"{name}; {threads}{torch.get_float32_matmul_precision()}{', kernel' if kernel else ''}"
            entry = in_file.get(key)
            if _parsed(entry) is None:
                entry, timed = _plain(time_one(shape, steps, possible, device)), True
                try:
                    entry = entry if kept is None else kept.keep(key, entry, lambda each: _parsed(each) is not None)
                except OSError as error:
                    problem = error
            chosen = _parsed(entry)
        assert chosen is not None
        found[name] = chosen
    if problem is not None:
        print(
            f"warning: the choice of Newton-Schulz's methods cannot be kept ({problem}), so that the next run may "
            "choose otherwise: set MEGAMULT_CACHE_DIR to a folder that can be written, or fix optimizer.muon.ns_form",
            file=sys.stderr,
            flush=True,
        )
    if timed and device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)
    return {shape: found[shape_key(shape, steps, dtypes)] for shape in shapes}


def plain(chosen: Mapping[Shape, Chosen], steps: Coefficients, dtypes: Sequence[torch.dtype]) -> dict[str, Any]:
    """Return choices as :func:`choose` takes them in `known`: plain values by :func:`shape_key`."""
    return {shape_key(shape, steps, dtypes): _plain(each) for shape, each in chosen.items()}


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _plain(chosen: Chosen) -> dict[str, Any]:
    method = dataclasses.asdict(chosen.method) | {"dtype": _name(chosen.method.dtype)}
    return {**method, "milliseconds": None if chosen.seconds is None else round(1e3 * chosen.seconds, 6)}


def _parsed(entry: Any) -> Chosen | None:
    """Return the choice that an entry describes, or None if it describes none."""
    try:
        values = dict(entry)
        milliseconds = values.pop("milliseconds")
        method = Method(**values | {"dtype": getattr(torch, values["dtype"])})
        return Chosen(method, None if milliseconds is None else float(milliseconds) / 1e3)
    except (TypeError, ValueError, KeyError, AttributeError):
        return None


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
        heading, kept = entries(path)
        print(f"{heading} ({path})")
        for key, entry in kept.items():
            if (chosen := _parsed(entry)) is not None and chosen.seconds is not None:
                method = chosen.method
                batches, products = "batched" if method.together else "one by one", method.products.replace("_", " ")
                text = f"{method.form}, {products}, {batches}, {_name(method.dtype)}"
                print(f"  {key}: {text}, {1e3 * chosen.seconds:.3f} ms")


if __name__ == "__main__":
    main()
