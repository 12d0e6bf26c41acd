"""Seconds in which one rank's CPU gives Llama-3's weights their first values: by index, or drawn whole and sliced.

    python examples/benchmarks/model_start.py

All times are CPU seconds of one core. `whole` is the measured time per element of Megatron's `use_cpu_initialization`
with `torch.normal`, multiplied by the number of elements of the model, because every rank draws each matrix whole and
keeps a slice. `by index` is measured on one block and on the embedding of one rank's shard, through
`megamult.models.common.initialization.initialize`, and multiplied by the numbers of blocks and vocabulary matrices.
`resume` is measured in the same way, for a run that will load a checkpoint.
"""

from __future__ import annotations

import argparse
import platform
import time
from pathlib import Path
from types import SimpleNamespace

import torch
from megatron.core.tensor_parallel.layers import _initialize_affine_weight_cpu
from muon_plan import LLAMA, Llama

from megamult.models.common.initialization import initialize
from megamult.models.common.vocabulary import padded_vocab_size
from megamult.parameters import megatron
from megamult.parameters.axes import Grid, tensor_shard
from megamult.parameters.spec import ParameterSpec, Role
from megamult.parameters.stated import set_spec

VOCAB = 128_256
_STD: dict[Role, float] = dict.fromkeys(
    ("q", "k", "v", "attention_out", "gate", "up", "down", "embedding", "head"), 0.02
)


def rank_holds(specs: list[ParameterSpec], tensor: int, data: int) -> torch.nn.Module:
    """Return a module with the bf16 parameters of the last rank of each axis.

    If `data` is above 1, the parameters are partitioned as at ZeRO 3.
    """
    held = torch.nn.Module()
    for i, stated in enumerate(specs):
        rows, cols = stated.local_shape(Grid(tensor=tensor))
        size = -(-rows * cols // data)
        parameter = torch.nn.Parameter(torch.zeros((rows, cols) if data == 1 else 0, dtype=torch.bfloat16))
        if data > 1:
            parameter.ds_tensor = torch.zeros(size, dtype=torch.bfloat16)  # type: ignore[attr-defined]
            parameter.ds_process_group = SimpleNamespace(rank=lambda: data - 1)  # type: ignore[attr-defined]
            parameter.ds_numel = rows * cols  # type: ignore[attr-defined]
            parameter.ds_secondary_tensor = None  # type: ignore[attr-defined]
        set_spec(parameter, stated)
        held.register_parameter(f"weight_{i}", parameter)
    return held


def seconds_to_set(model: Llama, tensor: int, data: int, seed: int | None) -> float:
    """Return the seconds in which a rank sets its parameters. One block is timed, and counts once for every block."""
    padded, total = padded_vocab_size(VOCAB), 0.0
    for specs, times in (
        (model.specs()[:4], model.layers),
        ([megatron.vocabulary("embedding", VOCAB, padded, model.hidden)], 2),
    ):
        held = rank_holds(specs, tensor, data)
        began = time.process_time()
        initialize(held, _STD, seed, tensor_shard(tensor - 1, tensor))
        total += times * (time.process_time() - began)
    return total


def elements(model: Llama) -> int:
    """Return the number of elements of the whole model's matrices, embedding and head."""
    return sum(each.shape[0] * each.shape[1] for each in model.specs()) + 2 * padded_vocab_size(VOCAB) * model.hidden


def seconds_per_element_of_a_whole_draw(tensor: int) -> float:
    """Return the seconds per element of Megatron's `use_cpu_initialization`.

    It calls `torch.normal` in fp32, copies into the whole matrix, casts and slices.
    """
    generator, best = torch.Generator().manual_seed(1), float("inf")
    rows, cols = 8192, 8192
    weight = torch.nn.Parameter(torch.zeros(rows // tensor, cols, dtype=torch.bfloat16))

    def draw(whole: torch.Tensor) -> torch.Tensor:
        return whole.copy_(torch.normal(0.0, 0.02, tuple(whole.shape), generator=generator))

    for _ in range(3):
        began = time.process_time()
        _initialize_affine_weight_cpu(
            weight,
            rows,
            cols,
            rows // tensor,
            0,
            draw,
            params_dtype=torch.bfloat16,
            rank=0,
            world_size=tensor,
            skip_set_tensor_parallel_attributes=True,
        )
        best = min(best, time.process_time() - began)
    return best / (rows * cols)


def processor() -> str:
    """Return the name of this machine's processor."""
    lines = Path("/proc/cpuinfo").read_text(encoding="ascii", errors="replace").splitlines()
    return next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), platform.machine())


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tensor", type=int, default=8, help="tensor-parallel size")
    parser.add_argument("--data", type=int, default=8, help="data-parallel size at ZeRO 3")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    # Time the first call, which makes the table of the normal distribution: once per process.
    began = time.process_time()
    initialize(rank_holds([megatron.single_matrix("down", 8, 8, None)], 1, 1), _STD, 1, tensor_shard(0, 1))
    table = time.process_time() - began
    rate = seconds_per_element_of_a_whole_draw(arguments.tensor)
    print(f"{processor()}, one core; torch {torch.__version__}; tensor parallel {arguments.tensor}")
    print(f"drawn whole: {rate * 1e9:.1f} ns per element; table for draws by index: {table:.2f} s, once")
    columns = f"{'whole, s':>10}{'by index, s':>13}{'ns/element':>12}{'resume, s':>11}"
    print(f"{'model':<7}{'ZeRO':>8}{'elements here':>15}{columns}")
    for name, model in LLAMA.items():
        for stage, data in (("0 to 2", 1), (f"3, of {arguments.data}", arguments.data)):
            here = elements(model) // arguments.tensor // data
            drawn, loaded = (seconds_to_set(model, arguments.tensor, data, seed) for seed in (1, None))
            print(
                f"{name:<7}{stage:>8}{here:>15,}{rate * elements(model):>10.0f}{drawn:>13.1f}"
                f"{drawn / here * 1e9:>12.1f}{loaded:>11.1f}"
            )


if __name__ == "__main__":
    main()
