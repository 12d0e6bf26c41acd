"""Registers, shared memory and spills of the Triton kernel for symmetric products on each GPU, compiled without one.

    python examples/benchmarks/kernel_resources.py

Registers are those of a thread, and shared memory that of a block of 8 warps, out of what the GPU has for a block (CUDA
C++ programming guide, table of compute capabilities). Blocks of a multiprocessor are what registers (65,536) and shared
memory allow.
"""

from __future__ import annotations

import itertools
import re
import subprocess
import tempfile
from dataclasses import dataclass
from pathlib import Path

GPUS = {
    # Compute capability: instruction of the products, KiB of shared memory for a block and for a multiprocessor.
    80: (r"mma\.sync", 163, 164),
    86: (r"mma\.sync", 99, 100),
    89: (r"mma\.sync", 99, 100),
    90: (r"wgmma\.mma_async", 227, 228),
    100: (r"tcgen05\.mma", 227, 228),
    120: (r"mma\.sync", 99, 100),
}
OPERANDS = {
    "R^2 + R": (True, ("left_col", "right_col")),
    "X X^T": (False, ("left_col", "right_row")),
    "X^T X": (False, ("left_row", "right_col")),
}
"""Products that Newton-Schulz computes: (whether a matrix is added, strides of the operands that are 1)."""
_THREADS = 256
_REGISTERS = 65536


@dataclass(frozen=True)
class Compiled:
    """The compiled kernel."""

    ptx: str
    registers: int
    """Registers of a thread."""
    shared: int
    """Bytes of shared memory of a block."""
    spilled: int
    """Bytes of a thread in local memory, to which registers are spilled."""


def compiled(capability: int, dtype: str, product: str) -> Compiled:
    """Compile the kernel for sizes that it is chosen for.

    Args:
        capability: compute capability of the GPU, a key of :data:`GPUS`.
        dtype: bf16 or fp16.
        product: a key of :data:`OPERANDS`.
    """
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from megamult.optim.muon import symmetric_triton

    add, contiguous = OPERANDS[product]
    kernel = symmetric_triton._lower_tiles
    constants = symmetric_triton.CONSTANTS | {"HAS_ADD": add} | dict.fromkeys(contiguous, 1)
    types = dict.fromkeys(("left", "right", "add", "out"), f"*{dtype}") | {"alpha": "fp32", "beta": "fp32"}
    signature = {name: "constexpr" if name in constants else types.get(name, "i32") for name in kernel.arg_names}
    aligned = [i for i, name in enumerate(kernel.arg_names) if signature[name] not in ("constexpr", "fp32")]
    source = ASTSource(
        kernel,
        signature,
        {(kernel.arg_names.index(name),): value for name, value in constants.items()},
        {(i,): [["tt.divisibility", 16]] for i in aligned},
    )
    result = triton.compile(source, target=GPUTarget("cuda", capability, 32), options=symmetric_triton.OPTIONS)
    with tempfile.NamedTemporaryFile(suffix=".cubin") as binary:
        binary.write(result.asm["cubin"])
        binary.flush()
        tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
        dump = [tool, "--dump-resource-usage", binary.name]
        said = subprocess.run(dump, capture_output=True, text=True, check=True).stdout
    used = {name: int(number) for name, number in re.findall(r"(REG|STACK|LOCAL):(\d+)", said)}
    return Compiled(result.asm["ptx"], used["REG"], result.metadata.shared, used["STACK"] + used["LOCAL"])


def main() -> None:
    """Print the table."""
    print("| GPU | dtype | product | registers | shared KiB | of | blocks | spilled bytes |\n|" + "---|" * 8)
    for (capability, (_, block, whole)), dtype, product in itertools.product(GPUS.items(), ("bf16",), OPERANDS):
        made = compiled(capability, dtype, product)
        # A block of each multiprocessor's shared memory also takes 1 KiB for the system.
        blocks = min(_REGISTERS // (made.registers * _THREADS), whole * 1024 // (made.shared + 1024))
        print(
            f"| sm_{capability} | {dtype} | {product} | {made.registers} | {made.shared / 1024:.0f} | {block} | "
            f"{blocks} | {made.spilled} |"
        )


if __name__ == "__main__":
    main()
