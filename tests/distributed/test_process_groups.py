"""Few process groups: as many calls at 1,024 ranks as at 8, and Megatron's getters answer as with its own groups."""

from __future__ import annotations

import datetime
import inspect
import resource
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from megatron.core import parallel_state
from torch.testing._internal.distributed.fake_pg import FakeStore

from megamult.checkpoint.saver import Saver
from megamult.distributed import open_files, process_groups, start
from megamult.distributed.mesh import current_mesh
from tests.invariance import Case
from tests.processes import run_distributed
from tests.small import VOCAB

TIMEOUT = datetime.timedelta(minutes=1)


@contextmanager
def rank_of(rank: int, size: int) -> Iterator[list[list[int]]]:
    """This process as one rank of many that are not there: torch's fake backend answers for them, for gloo too.

    Yields:
        The ranks of each group that was made, or not made because this rank is not in it.
    """
    made: list[list[int]] = []
    new_group = torch.distributed.new_group

    def fake_group(ranks: list[int] | None = None, backend: str | None = None, **options: Any) -> Any:
        made.append(list(range(size)) if ranks is None else ranks)
        return new_group(ranks, **options)

    torch.distributed.init_process_group("fake", store=FakeStore(), rank=rank, world_size=size)
    with mock.patch.object(torch.distributed, "new_group", fake_group):
        try:
            yield made
        finally:
            start.destroy()


def answers() -> dict[str, Any]:
    """What every getter of Megatron's parallel state says without arguments; of a group, its ranks."""
    found: dict[str, Any] = {}
    for name, getter in inspect.getmembers(parallel_state, inspect.isfunction):
        # Megatron's own gloo groups, and what is no group.
        if not name.startswith("get_") or name.endswith("_gloo") or "buffer" in name or "nccl" in name:
            continue
        required = [p for p in inspect.signature(getter).parameters.values() if p.default is p.empty]
        if required:
            continue
        for more in ({}, {"with_context_parallel": True}, {"partial_expert_data_parallel": True}):
            if more.keys() <= inspect.signature(getter).parameters.keys():
                try:
                    answer = getter(**more)
                except (AssertionError, KeyError) as error:
                    answer = str(error)
                if isinstance(answer, torch.distributed.ProcessGroup):
                    answer = ("ranks", torch.distributed.get_process_group_ranks(answer))
                found[f"{name} {more}"] = answer
    return found


def variables() -> dict[str, Any]:
    """Megatron's module variables, but for its gloo groups: a group's ranks, a list as it is."""
    found = {}
    for name, value in vars(parallel_state).items():
        if isinstance(value, torch.distributed.ProcessGroup) and not name.endswith("_GLOO"):
            found[name] = torch.distributed.get_process_group_ranks(value)
        elif isinstance(value, list) and name.isupper():
            found[name] = value
    return found


@pytest.mark.parametrize(("size", "tensor"), [(1, 1), (4, 1), (4, 4), (8, 2), (12, 4)])
def test_megatron_answers_as_with_groups_of_its_own(size: int, tensor: int) -> None:
    for rank in range(size):
        with rank_of(rank, size):
            parallel_state.initialize_model_parallel(tensor)
            theirs = answers(), variables()
        with rank_of(rank, size):
            process_groups.create(tensor, TIMEOUT)
            ours = answers(), variables()
        assert ours == theirs, f"rank {rank}"
        assert len(ours[0]) > 40, "the getters were not found"


@pytest.mark.parametrize(
    ("sizes", "said"),
    [
        ({"expert_model_parallel_size": 2}, r"expert-parallel size is 2: megamult supports .*; leave it at 1"),
        ({"context_parallel_size": 2}, r"in Megatron's order; leave pipeline, context and expert parallelism at 1"),
        ({"pipeline_model_parallel_size": 2}, r"leave pipeline, context and expert parallelism at 1"),
    ],
)
def test_groups_of_axes_that_no_mesh_here_has_are_refused(sizes: dict[str, int], said: str) -> None:
    with rank_of(5, 8):
        parallel_state.initialize_model_parallel(2, **sizes)
        with pytest.raises(ValueError, match=said):
            current_mesh()


@pytest.mark.parametrize(("tensor", "calls"), [(1, 2), (8, 4)])
def test_a_rank_makes_as_many_groups_at_1024_ranks_as_at_16(tmp_path: Path, tensor: int, calls: int) -> None:
    for size in (16, 64, 1024):
        with rank_of(size - 3, size) as made:
            process_groups.create(tensor, TIMEOUT)
            # Every save and load uses one group of CPUs.
            assert (
                Saver(tmp_path, current_mesh()).group is Saver(tmp_path, current_mesh()).group is process_groups.files()
            )
        # Tensor parallel, data parallel, this rank by itself, files: all ranks, and one rank, are never made twice.
        assert len(made) == calls and all(size - 3 in ranks for ranks in made)


def test_a_default_group_that_is_bound_to_its_device_is_split_once_per_axis(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[list[list[int]]] = []

    def split(split_ranks: list[list[int]], **options: Any) -> Any:
        asked.append(split_ranks)
        mine = next(ranks for ranks in split_ranks if torch.distributed.get_rank() in ranks)
        return torch.distributed.new_group(mine, use_local_synchronization=True)

    monkeypatch.setattr(torch.distributed, "split_group", split)
    monkeypatch.setattr(process_groups, "_is_bound", lambda default: True)
    with rank_of(5, 8):
        process_groups.create(4, TIMEOUT)
        assert asked == [
            [[0, 1, 2, 3], [4, 5, 6, 7]],
            [[0, 4], [1, 5], [2, 6], [3, 7]],
            [[0], [1], [2], [3], [4], [5], [6], [7]],
        ]


def sums_over_groups(order: list[int]) -> list[tuple[float, float, float]]:
    """Sums of ranks over the tensor-parallel, data-parallel and pipeline-parallel group, for one tensor-parallel size
    after the other."""
    found = []
    for tensor in order:
        start.initialize(tensor, timeout_minutes=1)
        sums = []
        for group in (
            current_mesh().groups["tensor"],
            current_mesh().groups["data"],
            parallel_state.get_pipeline_model_parallel_group(),
        ):
            value = torch.tensor(float(torch.distributed.get_rank()))
            torch.distributed.all_reduce(value, group=group)
            sums.append(value.item())
        found.append(tuple(sums))
    return found  # type: ignore[return-value]


def test_groups_communicate_and_may_be_made_again_for_another_size() -> None:
    order = [2, 1, 2, 4, 2]
    for rank, found in enumerate(run_distributed(4, sums_over_groups, order)):
        for tensor, got in zip(order, found, strict=True):
            first = rank - rank % tensor
            assert got == (sum(range(first, first + tensor)), sum(range(rank % tensor, 4, tensor)), rank)


def groups_of_a_run(folder: Path) -> list[list[int]]:
    """The ranks of each group that this rank makes, from the first to an engine of every ZeRO stage with a save."""
    from megamult.train.checkpoints import RunCheckpoints
    from megamult.train.deepspeed_engine import build

    made: list[list[int]] = []
    new_group = torch.distributed.new_group

    def noted(ranks: list[int] | None = None, **options: Any) -> Any:
        made.append(list(range(torch.distributed.get_world_size())) if ranks is None else list(ranks))
        return new_group(ranks, **options)

    with mock.patch.object(torch.distributed, "new_group", noted):
        mesh = start.initialize(2)
        for stage in range(4):
            config = Case(world=4, tensor=2, zero=stage).config()
            engine = build(config, VOCAB, mesh)
            checkpoints = RunCheckpoints(folder, config, VOCAB, current_mesh())
            checkpoints.save(engine, stage, 0, None, {})
            checkpoints.wait()
            engine.deepspeed.destroy()
    return made


def test_deepspeed_and_checkpoints_make_no_group_of_their_own(tmp_path: Path) -> None:
    for rank, made in enumerate(run_distributed(4, groups_of_a_run, tmp_path)):
        first = rank - rank % 2
        assert made == [[first, first + 1], [rank % 2, rank % 2 + 2], [rank], [0, 1, 2, 3]]


def limit_of_open_files(lowered: int) -> tuple[int, int]:
    """The soft limit that this rank is left with, and the hard one."""
    hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    resource.setrlimit(resource.RLIMIT_NOFILE, (lowered, hard))
    start.initialize(1)
    torch.distributed.barrier()  # rank 0 serves the store
    return resource.getrlimit(resource.RLIMIT_NOFILE)


def test_every_rank_may_open_as_many_files_as_the_system_allows() -> None:
    for soft, hard in run_distributed(2, limit_of_open_files, 200):
        assert soft == hard


def sockets_of_this_rank(tensor: int) -> tuple[int, int]:
    """Established TCP sockets of this process between ranks: counted in /proc, and computed."""
    start.initialize(tensor)
    process_groups.files()
    torch.distributed.barrier()
    mine = {link.readlink().name for link in Path("/proc/self/fd").iterdir() if link.is_symlink() and link.exists()}
    established = 0
    for table in ("tcp", "tcp6"):
        for line in Path(f"/proc/self/net/{table}").read_text().splitlines()[1:]:
            fields = line.split()
            established += fields[3] == "01" and f"socket:[{fields[9]}]" in mine
    torch.distributed.barrier()
    rank, size = torch.distributed.get_rank(), torch.distributed.get_world_size()
    return established, open_files.sockets(rank, size, tensor, gloo=True)


def test_the_sockets_of_a_rank_are_as_many_as_was_computed() -> None:
    """A limit that is checked against too small a number would let a run begin that cannot connect."""
    for rank, (found, computed) in enumerate(run_distributed(6, sockets_of_this_rank, 2)):
        # There is no watchdog here: one connection less, and on rank 0 six that it serves.
        assert found == computed - (7 if rank == 0 else 1)


def test_a_hard_limit_that_is_too_low_is_an_error_with_its_remedy(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(resource, "getrlimit", lambda which: (1024, 4096))
    open_files.check_limit(1, 1024, 8, gloo=False)
    open_files.check_limit(0, 1024, 8, gloo=False)
    with pytest.raises(ValueError, match=r"open files is 4096 per process, and rank 0 of 2048 needs \d+: raise it"):
        open_files.check_limit(0, 2048, 8, gloo=False)
    open_files.check_limit(1, 8, 8, gloo=False, corpora=3000)
    with pytest.raises(ValueError, match=r"open files is 4096 per process, and rank 1 of 8 needs 16265: raise it"):
        open_files.check_limit(1, 8, 8, gloo=False, corpora=16000)
