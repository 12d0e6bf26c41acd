"""All measurements that wait for a GPU, in one command and 9 minutes: `gpu.sh` starts this file.

Each part is a process of its own with its own limit. Its figures become rows of one Markdown table as they are printed,
so that what was measured is kept if the rest is cut off. A part that fails, runs too long or prints no figure is a row
too, and makes the exit code 1. Parts that come later get what is left of the 9 minutes.

With --toy all of it runs at sizes for a CPU, where the figures mean nothing.
"""

from __future__ import annotations

import argparse
import contextlib
import gc
import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
SECONDS = 540
"""Time for everything."""

WHEELS = (
    # Name, MB of the wheel for Python 3.12 on x86-64 Linux, and what needs it.
    ("deepspeed", 2.2, "the engine; there is only a source package: see below"),
    ("megatron-core", 2.6, "the model's layers"),
    ("pydantic", 0.5, "deepspeed"),
    ("pydantic_core", 2.3, "deepspeed"),
    ("annotated-types", 0.1, "deepspeed"),
    ("typing-inspection", 0.1, "deepspeed"),
    ("hjson", 0.1, "deepspeed"),
    ("einops", 0.1, "deepspeed"),
    ("msgpack", 0.5, "deepspeed"),
    ("typing_extensions", 0.1, "pydantic, which wants a newer one than torch brings"),
    ("jsonargparse", 0.2, "megamult"),
    ("docstring_parser", 0.1, "jsonargparse"),
)
"""What a Python with torch, and what usually comes with it (NumPy, PyYAML, safetensors, sentencepiece, tokenizers,
TensorBoard, ninja, psutil, tqdm, pytest), lacks."""


@dataclass(frozen=True)
class Part:
    """One part of the measurements."""

    name: str
    seconds: float
    """Limit."""
    command: Sequence[str]
    """Arguments of Python."""
    rows: Callable[[str], tuple[str, str] | None]
    """Function from a line of output to (what was measured, figure), or None for a line that is no figure."""
    environment: tuple[tuple[str, str], ...] = ()


class Table:
    """Markdown table in a file. Each row is on the disk before the next is measured."""

    def __init__(self, path: Path) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        self._file = path.open("w")

    def write(self, text: str) -> None:
        """Write a line to the file and to the screen."""
        print(text, flush=True)
        self._file.write(text + "\n")
        self._file.flush()
        os.fsync(self._file.fileno())

    def row(self, *cells: str) -> None:
        """Write a row."""
        self.write("| " + " | ".join(cell.replace("|", "/").strip() for cell in cells) + " |")


def run(part: Part, table: Table, seconds: float) -> bool:
    """Run a part, write its figures as they come, and return whether it succeeded.

    Args:
        part: the part.
        table: table for its rows.
        seconds: time that is left for all parts.
    """
    began, limit = time.monotonic(), min(part.seconds, seconds)
    if limit < 1:
        table.row(part.name, "FAILED", f"no time was left of {SECONDS} s")
        return False
    process = subprocess.Popen(
        [sys.executable, *part.command],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
        cwd=ROOT,
        env={**os.environ, **dict(part.environment)},
        start_new_session=True,  # so that processes of its own end with it
    )
    late = threading.Event()

    def end() -> None:
        late.set()
        _kill(process)

    timer = threading.Timer(limit, end)
    timer.start()
    figures, last = 0, ["no output"]
    assert process.stdout is not None
    try:
        for line in process.stdout:
            if (found := part.rows(line)) is not None:
                table.row(part.name, *found)
                figures += 1
            elif line.strip():
                last = [*last[-20:], line.strip()]
        code = process.wait()
    finally:  # also at a signal: the part is in a session of its own, which the signal does not reach
        timer.cancel()
        _kill(process)
    took = f"{time.monotonic() - began:.0f} s"
    if late.is_set():
        problem = f"stopped at its limit of {limit:.0f} s"
    elif code:
        problem = f"exit code {code} after {took}"
    elif not figures:
        problem = f"no figures in {took}"
    else:
        table.row(part.name, "time", took)
        return True
    print(*last, sep="\n", flush=True)
    table.row(part.name, "FAILED", f"{problem}: {last[-1][:200]}")
    return False


def _kill(process: subprocess.Popen[str]) -> None:
    """End what is left of a part's processes."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)


def _printed(line: str) -> tuple[str, str] | None:
    """Return the figure of a line that a part of this file printed."""
    found = re.match(r"figure: (.*?) = (.*)", line)
    return None if found is None else (found[1], found[2])


def _tests(line: str) -> tuple[str, str] | None:
    """Return the summary of pytest; none if all tests were skipped, which shows nothing."""
    found = re.match(r"=*\s*((?:\d+ \w+,? ?)+) in [\d.]+s", line)
    return ("tests", found[1]) if found and "passed" in found[1] else None


def _overhead(line: str) -> tuple[str, str] | None:
    """Return a figure of layer_overhead.py."""
    if found := re.match(r"ratio (\w+) / none: ([\d.]+)", line):
        return f"speed with {found[1]} multipliers over none", found[2]
    if found := re.match(r"(none|layer|folded) +([\d.,]+) +([\d.]+)", line):
        return f"tokens/s, multipliers {found[1]} (range over median {found[3]})", found[2]
    found = re.match(r"memory that folded adds: ([\d.]+ bytes per matrix element)", line)
    return None if found is None else ("memory that folded adds", found[1])


def _muon_step(line: str) -> tuple[str, str] | None:
    """Return a figure of muon_step.py."""
    found = re.match(r"(megamult|DeepSpeed \w+|torch\.optim\.Muon(?:, fp32)?) +([\d.]+) +([\d.]+) +([\d.]+)", line)
    if found is None:
        return None
    return f"optimizer step, {found[1]} (range over median {found[3]})", f"{found[2]} ms; ours over it {found[4]}"


def parts(toy: bool) -> list[Part]:
    """Return the parts, the most wanted first."""
    me, flag = str(HERE / "gpu.py"), ["--toy"] if toy else []

    def own(name: str, seconds: float) -> Part:
        return Part(name, seconds, [me, "--part", name, *flag], _printed)

    marked = [str(path) for path in sorted((ROOT / "tests").rglob("test_*.py")) if "mark.gpu" in path.read_text()]
    tests = ["-m", "pytest", "-q", "-p", "no:cacheprovider", "-m", "gpu", *marked]
    overhead, muon = [str(HERE / "layer_overhead.py")], [str(HERE / "muon_step.py")]
    small: tuple[tuple[str, str], ...] = ()
    if toy:
        # On a CPU nothing is marked `gpu` that runs.
        tests = ["-m", "pytest", "-q", "-p", "no:cacheprovider", "tests/optim/test_schedule.py"]
        sizes = ["--hidden", "64", "--ffn", "64", "--layers", "1", "--seq", "16"]
        overhead += [*sizes, *["--batch", "1", "--accumulation", "1", "--dtype", "fp32", "--steps", "2"]]
        muon += [*sizes, *["--steps", "1"]]
        # Compiling DeepSpeed's Newton-Schulz would take most of a minute on a CPU.
        small = (("DS_ACCELERATOR", "cpu"), ("TORCHDYNAMO_DISABLE", "1"), ("OMP_NUM_THREADS", "1"))
    else:
        overhead += ["--steps", "10", "--warmup", "3"]
        muon += ["--steps", "5"]
    return [
        own("machine", 60),
        Part("gpu tests", 150, tests, _tests, small),
        own("symmetric products", 40),
        own("newton-schulz", 70),
        Part("multipliers", 90, overhead, _overhead, small),
        own("model flops", 90),
        Part("muon step", SECONDS, muon, _muon_step, small),  # it prints at its end, and gets all time that is left
    ]


def figure(what: str, value: str) -> None:
    """Print a figure for the table."""
    print(f"figure: {what} = {value}", flush=True)


def machine(toy: bool) -> None:
    """Print what is measured on."""
    import torch

    from megamult.distributed import device

    assert toy or device.has_cuda(), "torch sees no GPU"
    name = torch.cuda.get_device_name() if device.has_cuda() else "CPU"
    figure("device", name)
    figure("torch", f"{torch.__version__}, Python {sys.version.split()[0]}")


def symmetric_products(toy: bool) -> None:
    """Print times of X X^T: whole, by block rows and, where there is one, by the Triton kernel."""
    import torch
    from newton_schulz import medians

    from megamult.distributed import device
    from megamult.optim.muon.symmetric import has_kernel, kernel_suits, symmetric_product

    here, dtype = device.prepare(), torch.bfloat16
    for n in (64, 128) if toy else (512, 1024, 2048, 4096, 8192):
        batch = max(1, (1 << 22) // (n * n)) if not toy else 1
        x = torch.randn(batch, n, n, device=here, dtype=torch.float32).to(dtype)
        out = torch.empty_like(x)
        ways: list[Any] = ["whole", "block_rows"]
        if has_kernel(here) and kernel_suits(n, n, dtype):
            ways.append("kernel")
        products = {way: partial(symmetric_product, x, x.mT, out, way) for way in ways}
        taken = medians(products, warmup=2, turns=2 if toy else 20)
        rates = ", ".join(f"{way} {1e3 * seconds:.3f} ms" for way, seconds in zip(ways, taken, strict=True))
        last = f"; {ways[-1]} takes {taken[-1] / taken[0]:.3f} of whole"
        figure(f"X X^T, {batch} x {n} x {n} bf16", rates + last)


def newton_schulz(toy: bool) -> None:
    """Print times of all methods of Newton-Schulz, and the share of the device's peak that the fastest reaches."""
    import torch
    from newton_schulz import medians, plain_newton_schulz

    from megamult.distributed import device
    from megamult.optim.muon.coefficients import SIMPLE, coefficients
    from megamult.optim.muon.newton_schulz import flops, orthogonalize_by
    from megamult.optim.muon.symmetric import has_kernel
    from megamult.optim.muon.timing import methods

    here, steps = device.prepare(), coefficients("simple", 5)
    shapes = [(n, n) for n in ((64,) if toy else (512, 1024, 2048, 4096, 8192))]
    for rows, cols in [*shapes, *([(64, 128)] if toy else [(1024, 2816), (2048, 8192)])]:
        batch = max(1, (1 << 22) // (rows * cols)) if not toy else 1
        x = torch.randn(batch, rows, cols, device=here)
        runs: dict[str, Callable[[], Any]] = {
            f"{each.form} {each.products}{' together' if each.together else ''}": (
                lambda each=each, x=x: orthogonalize_by(x, steps, each)
            )
            for each in methods((rows, cols), [torch.bfloat16], has_kernel(here))
        }
        runs["plain bmm"] = lambda x=x: plain_newton_schulz(x.bfloat16(), SIMPLE, len(steps))
        large = rows * cols >= 1 << 24
        taken = medians(runs, warmup=1, turns=1 if toy else 3 if large else 10)
        times = dict(sorted(zip(runs, taken, strict=True), key=lambda each: each[1]))
        peak = device.peak_flops(torch.bfloat16)
        work = batch * flops(rows, cols, len(steps), "standard", "whole")
        share = "" if peak is None else f"; {work / min(taken) / peak:.2f} of the peak, counted as whole products"
        figure(
            f"Newton-Schulz, {batch} x {rows} x {cols} bf16",
            ", ".join(f"{name} {1e3 * seconds:.3f} ms" for name, seconds in times.items()) + share,
        )


def model_flops(toy: bool) -> None:
    """Print the MFU and the peak memory of training steps of a model of half a billion parameters."""
    import statistics

    import layer_overhead
    import torch

    from megamult.distributed import device, start
    from megamult.models.llama.flops import flops_per_token
    from megamult.train.deepspeed_engine import build

    sizes = argparse.Namespace(
        hidden=64 if toy else 1280,
        ffn=64 if toy else 3456,
        layers=1 if toy else 24,
        seq=16 if toy else 2048,
        batch=1 if toy else 8,
        accumulation=1 if toy else 2,
        dtype="fp32" if toy else "bf16",
    )
    mesh = start.initialize(1)
    tokens, labels = layer_overhead.batch_of(sizes)
    peak = device.peak_flops(torch.bfloat16)
    for implementation in ("none", "folded", "layer"):
        if device.has_cuda():
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()
        config = layer_overhead.run_config(sizes, implementation)
        engine = build(config, layer_overhead.VOCAB, mesh)
        taken = [
            layer_overhead.optimizer_step(engine, tokens, labels, sizes.accumulation) for _ in range(2 if toy else 9)
        ]
        seconds = statistics.median(taken[1:] if toy else taken[3:])
        rate = tokens.numel() * sizes.accumulation / seconds
        done = rate * flops_per_token(config.model, layer_overhead.VOCAB)  # type: ignore[arg-type]
        what = f"{engine.parameter_count / 1e9:.2f}B parameters, multipliers {implementation}"
        mfu = "the peak is not known" if peak is None else f"MFU {done / peak:.4f}"
        figure(what, f"{rate:,.0f} tokens/s, {done / 1e12:.2f} TFLOP/s, {mfu}")
        figure(f"peak memory, {what}", f"{device.memory_bytes() / 2**30:.2f} GiB")
        del engine  # its memory is the next one's, and its parts refer to each other
        gc.collect()
    start.destroy()


OWN = {
    "machine": machine,
    "symmetric products": symmetric_products,
    "newton-schulz": newton_schulz,
    "model flops": model_flops,
}


def print_wheels() -> None:
    """Print what must be installed beside torch and its usual company."""
    pins = dict(re.findall(r"^([\w-]+)==(\S+)", (ROOT / "constraints.txt").read_text(), re.M))
    print("| package | version | MB | for |\n|---|---|---|---|")
    for name, size, why in WHEELS:
        print(f"| {name} | {pins[name]} | {size} | {why} |")
    print(f"together {sum(size for _, size, _ in WHEELS):.1f} MB. Each from where it can be fetched:")
    binary = " ".join(f"{name}=={pins[name]}" for name, _, _ in WHEELS if name != "deepspeed")
    platforms = " ".join(f"--platform manylinux{each}_x86_64" for each in ("2014", "_2_17", "_2_28"))
    print(f"    pip download --no-deps --only-binary=:all: --python-version 3.12 {platforms} -d wheels {binary}")
    print(f"    pip wheel --no-deps --no-build-isolation -w wheels deepspeed=={pins['deepspeed']}")
    print("where they are needed (megamult itself is used as it lies here):")
    print("    pip install --no-index --no-deps wheels/*.whl")


def main() -> int:
    """Run the command line; return the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=Path("runs/gpu.md"), help="file of the table")
    parser.add_argument("--parts", nargs="+", help="only these parts")
    parser.add_argument("--toy", action="store_true", help="sizes for a CPU, to see that everything runs")
    parser.add_argument("--wheels", action="store_true", help="print what must be installed, and end")
    parser.add_argument("--part", choices=OWN, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.wheels:
        print_wheels()
        return 0
    if arguments.part:
        OWN[arguments.part](arguments.toy)
        return 0
    every = {part.name: part for part in parts(arguments.toy)}
    unknown = set(arguments.parts or ()) - set(every)
    if unknown:
        parser.error(f"there are no parts {', '.join(sorted(unknown))}: use {', '.join(every)}")
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))  # and `run` ends the part
    table, began = Table(arguments.output), time.monotonic()
    table.row("part", "measured", "figure")
    table.write("|---|---|---|")
    chosen = [every[name] for name in arguments.parts or every]
    succeeded = [run(part, table, SECONDS - (time.monotonic() - began)) for part in chosen]
    failed = [part.name for part, good in zip(chosen, succeeded, strict=True) if not good]
    table.row("all", "failed parts", ", ".join(failed) or "none")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
