"""How many process groups a rank makes and how many sockets it holds, at up to 1,024 ranks.

    python examples/benchmarks/process_groups.py

One process plays the last rank of a launch and then rank 0. torch's fake backend answers for the other ranks.
`Megatron` makes the groups of `parallel_state.initialize_model_parallel`, and three gloo groups more: for the vote, for
saves and for a load. `megamult` makes the groups of `megamult.distributed.start.initialize` and of a run. The column
`calls` counts the calls in which the rank makes a group. If each process's NCCL communicator is bound to its GPU, every
call of Megatron splits the communicator of all ranks, even on ranks outside the group; megamult splits it once per
axis. Sockets are those of gloo, which connects every two ranks of a group, and those of the store and the watchdog.
`tests/distributed/test_process_groups.py` compares megamult's number of sockets with that of real processes.
"""

from __future__ import annotations

import argparse
import datetime
from collections.abc import Callable
from typing import Any
from unittest import mock

import torch
from megatron.core import parallel_state
from torch.testing._internal.distributed.fake_pg import FakeStore

from megamult.distributed import open_files, process_groups, start


def groups_made(rank: int, size: int, make: Callable[[], object]) -> list[tuple[list[int], bool]]:
    """Return (ranks, whether gloo is asked for) of each process group that `make` creates."""
    made: list[tuple[list[int], bool]] = []
    new_group = torch.distributed.new_group

    def noted(ranks: list[int] | None = None, backend: str | None = None, **options: Any) -> Any:
        made.append((list(range(size)) if ranks is None else list(ranks), backend == "gloo"))
        return new_group(ranks, **options)

    torch.distributed.init_process_group("fake", store=FakeStore(), rank=rank, world_size=size)
    with mock.patch.object(torch.distributed, "new_group", noted):
        make()
    start.destroy()
    return made


def sockets(rank: int, size: int, made: list[tuple[list[int], bool]], gloo: bool) -> int:
    """Count the sockets of gloo's groups, the store and the watchdog, as `distributed.open_files.sockets` does."""
    meshes = sum(len(ranks) - 1 for ranks, by_request in made if rank in ranks and (gloo or by_request))
    default = size - 1 if gloo else 0
    return meshes + default + (2 * (size + 1) if rank == 0 else 2)


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tensor", type=int, default=8, help="tensor-parallel size")
    parser.add_argument("--ranks", type=int, nargs="+", default=[8, 64, 1024], help="numbers of processes")
    arguments = parser.parse_args()
    tensor = arguments.tensor

    def megatron() -> None:
        parallel_state.initialize_model_parallel(tensor)
        for _ in ("vote", "saves", "load"):
            torch.distributed.new_group(backend="gloo")

    def megamult() -> None:
        process_groups.create(tensor, datetime.timedelta(minutes=1))
        process_groups.files()

    print(f"tensor parallel {tensor}; sockets of the last rank and of rank 0, training over NCCL and over gloo")
    by_backend = f"{'NCCL: last':>12}{'rank 0':>8}{'gloo: last':>12}{'rank 0':>8}"
    print(f"{'ranks':>6}  {'':<9}{'calls':>7}{'member of':>11}{by_backend}")
    for size in arguments.ranks:
        for name, make in (("Megatron", megatron), ("megamult", megamult)):
            rank = size - 1
            made = groups_made(rank, size, make)
            first = groups_made(0, size, make)
            member = sum(rank in ranks for ranks, _ in made)
            counts = [sockets(r, size, m, gloo) for gloo in (False, True) for r, m in ((rank, made), (0, first))]
            if name == "megamult":
                assert counts == [
                    open_files.sockets(r, size, tensor, gloo) for gloo in (False, True) for r in (rank, 0)
                ]
            columns = f"{counts[0]:>12,}{counts[1]:>8,}{counts[2]:>12,}{counts[3]:>8,}"
            print(f"{size:>6}  {name:<9}{len(made):>7,}{member:>11}{columns}")


if __name__ == "__main__":
    main()
