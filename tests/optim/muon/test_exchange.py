"""The exchange on many grids in one process: ranks are threads, and what they get is what whole matrices give."""

from __future__ import annotations

import itertools
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import cache, partial
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from examples.benchmarks.muon_plan import zero_cuts
from megamult.distributed.mesh import Mesh
from megamult.optim.muon.exchange import Exchange
from megamult.optim.muon.newton_schulz import flops
from megamult.optim.muon.plan import Plan, make_plan
from megamult.parameters import megatron
from megamult.parameters.axes import Grid
from megamult.parameters.spec import ParameterSpec
from megamult.zero.partition import Cut, even_intervals
from tests.sharding import megatron_shard

GRIDS = list(itertools.product((1, 2, 3, 5), (1, 2, 4)))  # data-parallel x tensor-parallel
BUCKET_ELEMENTS = {"single": 1, "several": 130, "together": 2**25}
PRIME = 1021
"""Results are integers below it: exact in float64, rounded in bf16, which has 8 significant bits."""
GUARD = -7.0
COST = partial(flops, steps=5)
"""Cost of a matrix by its shape."""


@dataclass(eq=False)
class Collective:
    """One rank's part in one all-to-all; stands in for torch.distributed.Work."""

    network: Network
    rank: int
    index: int
    output: Tensor
    output_sizes: list[int]
    input: Tensor
    input_sizes: list[int]
    posted: Tensor = field(init=False)
    pieces: tuple[Tensor, ...] = field(init=False)
    """Of `posted`, by receiver."""
    waited: bool = False

    def __post_init__(self) -> None:
        assert self.output.is_contiguous() and self.output.numel() == sum(self.output_sizes)
        assert self.input.is_contiguous() and self.input.numel() == sum(self.input_sizes)
        assert self.input.dtype == self.output.dtype
        self.posted = self.input.clone()
        self.pieces = self.posted.split(self.input_sizes)
        self.output.fill_(float("nan"))  # whoever reads before waiting has nothing

    def wait(self) -> None:
        """Receive what all ranks posted as their `index`-th collective."""
        assert torch.equal(self.input, self.posted), "sent buffer changed while the collective was reading it"
        for source, target in enumerate(self.output.split(self.output_sizes)):
            sender = self.network.part(source, self.index)
            assert sender.posted.dtype == target.dtype and len(sender.pieces[self.rank]) == len(target)
            if len(target):
                target.copy_(sender.pieces[self.rank])
        self.waited = True


class Network:
    """In place of torch.distributed between threads. Nothing is delivered before its receiver waits for it."""

    def __init__(self, ranks: int) -> None:
        self.ranks = ranks
        self.posted: list[list[Collective]] = [[] for _ in range(ranks)]
        self._ended = [False] * ranks
        self._changed = threading.Condition()
        self._thread = threading.local()

    def all_to_all_single(
        self,
        output: Tensor,
        input: Tensor,
        output_sizes: list[int],
        input_sizes: list[int],
        group: object = None,
        async_op: bool = False,
    ) -> Collective | None:
        """Signature of torch's, for the calling thread's rank."""
        rank = self._thread.rank
        with self._changed:
            mine = self.posted[rank]
            mine.append(Collective(self, rank, len(mine), output, output_sizes, input, input_sizes))
            self._changed.notify_all()
        if async_op:
            return mine[-1]
        mine[-1].wait()
        return None

    def part(self, rank: int, index: int) -> Collective:
        """Of `rank` in the `index`-th collective, as soon as it takes part."""
        with self._changed:
            self._changed.wait_for(lambda: len(self.posted[rank]) > index or self._ended[rank])
        if len(self.posted[rank]) <= index:
            raise ConnectionError(f"rank {rank} ended before collective {index}")
        return self.posted[rank][index]

    def in_flight(self) -> int:
        """How many collectives the calling thread's rank has begun and not waited for."""
        return sum(not collective.waited for collective in self.posted[self._thread.rank])

    def sent_to_others(self, rank: int) -> int:
        """Bytes."""
        return sum(c.input.element_size() * (sum(c.input_sizes) - c.input_sizes[rank]) for c in self.posted[rank])

    def run(self, on_rank: Callable[[int], None]) -> None:
        """`on_rank(rank)` on every rank at once; raises what the first rank raised by itself."""

        def thread(rank: int) -> None:
            self._thread.rank = rank
            try:
                on_rank(rank)
            finally:
                with self._changed:
                    self._ended[rank] = True
                    self._changed.notify_all()

        with ThreadPoolExecutor(self.ranks) as pool:
            futures = [pool.submit(thread, rank) for rank in range(self.ranks)]
        failures = [failure for future in futures if (failure := future.exception()) is not None]
        for failure in sorted(failures, key=lambda failure: isinstance(failure, ConnectionError)):
            raise failure
        assert all(collective.waited for rank in self.posted for collective in rank)


def fuse_qkv(parts: Sequence[Tensor]) -> Tensor:
    """Row by row, as Megatron does it: two groups of three heads of four rows."""
    q, k, v = parts
    rows = [(q[g * 12 : g * 12 + 12], k[g * 4 : g * 4 + 4], v[g * 4 : g * 4 + 4]) for g in (0, 1)]
    return torch.cat([matrix for group in rows for matrix in group])


def only(parts: Sequence[Tensor]) -> Tensor:
    """Of a parameter that is one matrix."""
    (matrix,) = parts
    return matrix


Fuse = Callable[[Sequence[Tensor]], Tensor]
"""The global parameter from its logical matrices."""
STATED: list[tuple[ParameterSpec, Fuse]] = [
    (megatron.fused_qkv(6, 2, 4, 5), fuse_qkv),  # 40 rows, 20 per group: TP 4 cuts through a group, and a head
    (megatron.single_matrix("attention_out", 12, 8, 1), only),
    (megatron.fused_gate_up(12, 5), lambda parts: torch.cat(list(parts))),
    (megatron.single_matrix("up", 8, 12, 0), only),
    (megatron.single_matrix("gate", 7, 9, None), only),  # as a router: every TP rank has it whole
]


@dataclass
class Held:
    """What one rank holds: one buffer with every slice between guards, last cut first."""

    buffer: Tensor
    values: list[Tensor]
    slice_of_cut: dict[int, int]


def held(plan: Plan, parameters: Sequence[Tensor], rank: int, dtype: torch.dtype) -> Held:
    """`parameters`: of each cut, before tensor parallelism."""
    data_rank, tp_rank = divmod(rank, plan.grid.tensor)
    guard = torch.full((1,), GUARD, dtype=torch.float64)
    pieces = [guard]
    slice_of_cut: dict[int, int] = {}
    for index, (cut, full) in reversed(list(enumerate(zip(plan.cuts, parameters, strict=True)))):
        start, length = cut.intervals[data_rank]
        if length:
            slice_of_cut[index] = len(slice_of_cut)
            flat = megatron_shard(cut.spec, full, tp_rank, plan.grid.tensor).reshape(-1)
            pieces += [flat[start : start + length], guard]
    buffer = torch.cat(pieces).to(dtype)
    return Held(buffer, list(buffer.split([len(piece) for piece in pieces]))[1::2], slice_of_cut)


def whole_matrix_function(matrices: Sequence[Tensor]) -> Tensor:
    """Integers below PRIME, [batch, rows, cols], from matrices of integers, [rows, cols] each.

    Each depends on its place, and on every element and the place of that: none can be missing or elsewhere.
    """
    x = torch.stack([matrix.double() for matrix in matrices])
    place = torch.arange(1.0, x[0].numel() + 1, dtype=x.dtype).view(x.shape[1:])
    return (2 * x + place + (place * x).sum((1, 2), keepdim=True)) % PRIME


def random_matrices(stated: ParameterSpec, generator: torch.Generator) -> list[Tensor]:
    """The logical matrices of one parameter."""
    return [torch.randint(PRIME, part.shape, generator=generator, dtype=torch.float64) for part in stated.parts]


def lies_whole(plan: Plan, i: int) -> bool:
    """Whether the owner of a matrix holds it as one piece, and need not copy it."""
    pieces = [r for _, r in plan.fragments(i, plan.owners[i], counted=True)]
    return [(r.height, r.width) for r in pieces] == [(plan.matrices[i].rows, plan.matrices[i].cols)]


def expected(matrix: Tensor, dtype: torch.dtype, steps: int, whole: bool) -> Tensor:
    """What one process makes of it, where results and all that is put together from pieces is rounded to `dtype`."""
    for _ in range(steps):
        given = matrix if whole else matrix.to(dtype)
        matrix = whole_matrix_function([given])[0].to(dtype).double()
    return matrix


def check_exchange(
    plan: Plan,
    fuse: Sequence[Fuse],
    monkeypatch: pytest.MonkeyPatch,
    dtype: torch.dtype = torch.float64,
    values_dtype: torch.dtype = torch.float64,
    steps: int = 1,
) -> None:
    """Every rank's slices of random matrices become the same slices of the results, bit by bit."""
    generator = torch.Generator().manual_seed(5)
    matrices = [random_matrices(cut.spec, generator) for cut in plan.cuts]
    whole = {(m.cut, m.part): lies_whole(plan, i) for i, m in enumerate(plan.matrices)}
    results = [
        [expected(matrix, dtype, steps, whole[cut, part]) for part, matrix in enumerate(parts)]
        for cut, parts in enumerate(matrices)
    ]
    before = [join(parts) for join, parts in zip(fuse, matrices, strict=True)]
    after = [join(parts) for join, parts in zip(fuse, results, strict=True)]
    network = Network(plan.ranks)
    monkeypatch.setattr(torch.distributed, "all_to_all_single", network.all_to_all_single)

    def on_rank(rank: int) -> None:
        mine = held(plan, before, rank, values_dtype)
        if rank % plan.grid.tensor:
            for index, slice_index in mine.slice_of_cut.items():
                if plan.cuts[index].spec.dim_over("tensor") is None:
                    mine.values[slice_index].add_(1)  # the first replica alone counts
        exchange = Exchange(plan, Mesh(plan.grid.coordinates(rank)), mine.slice_of_cut, dtype, torch.device("cpu"))
        for _ in range(steps):
            exchange.run(mine.values, lambda batch, _: whole_matrix_function(batch))
        assert torch.equal(mine.buffer, held(plan, after, rank, values_dtype).buffer), f"rank {rank}"
        assert exchange.bytes_sent == steps * plan.sent[rank] * dtype.itemsize == network.sent_to_others(rank)

    network.run(on_rank)


@cache
def grid_plan(data: int, tensor: int, stage: int, bucket_elements: int) -> tuple[Plan, tuple[Fuse, ...]]:
    """Parameters enough for several matrices per rank, and a function for each that fuses it."""
    stated = STATED * (2 + data * tensor // 5)
    cuts = zero_cuts([s for s, _ in stated], tensor, data, stage)
    return make_plan(cuts, Grid(tensor=tensor, data=data), COST, bucket_elements), tuple(fuse for _, fuse in stated)


@pytest.fixture(autouse=True)
def new_memory_is_nan() -> Iterator[None]:
    """Else what was never written could be right by chance: the same memory, from the case before."""
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True)
    assert torch.empty(3).isnan().all()
    yield
    torch.use_deterministic_algorithms(before)


@pytest.mark.parametrize("bucket_elements", BUCKET_ELEMENTS.values(), ids=BUCKET_ELEMENTS)
@pytest.mark.parametrize("stage", [1, 3])
@pytest.mark.parametrize(("data", "tensor"), GRIDS)
def test_every_rank_holds_its_slices_of_what_whole_matrices_give(
    data: int, tensor: int, stage: int, bucket_elements: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    check_exchange(*grid_plan(data, tensor, stage, bucket_elements), monkeypatch)


@pytest.mark.parametrize("bucket_elements", BUCKET_ELEMENTS.values(), ids=BUCKET_ELEMENTS)
@pytest.mark.parametrize("stage", [1, 3])
@pytest.mark.parametrize(("data", "tensor"), GRIDS)
def test_in_bf16_pieces_and_results_are_rounded_once_wherever_they_are(
    data: int, tensor: int, stage: int, bucket_elements: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Half of the numbers are no bf16 numbers. A matrix that lies whole on its owner is not rounded; its results are,
    so that all copies of them are equal."""
    plan, fuse = grid_plan(data, tensor, stage, bucket_elements)
    check_exchange(plan, fuse, monkeypatch, torch.bfloat16, torch.float32)


@pytest.mark.parametrize(("data", "tensor"), GRIDS)
def test_the_grids_above_have_one_and_several_and_many_buckets(data: int, tensor: int) -> None:
    """Else they would show nothing of what two buckets in flight can do to each other."""
    for stage in (1, 3):
        counts = {name: len(grid_plan(data, tensor, stage, n)[0].buckets) for name, n in BUCKET_ELEMENTS.items()}
        assert counts["together"] == 1 < counts["several"] < counts["single"] and counts["single"] >= 4


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
@pytest.mark.parametrize(("data", "tensor"), [(1, 1), (3, 2)])
def test_an_exchange_serves_every_step(
    data: int, tensor: int, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    plan, fuse = grid_plan(data, tensor, 1, BUCKET_ELEMENTS["several"])
    check_exchange(plan, fuse, monkeypatch, dtype, steps=3)


@pytest.mark.parametrize("bucket_elements", BUCKET_ELEMENTS.values(), ids=BUCKET_ELEMENTS)
@pytest.mark.parametrize("tensor", [1, 2])
def test_a_rank_that_holds_nothing_can_own_or_only_take_part(
    tensor: int, bucket_elements: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Matrices of 2 elements per tensor-parallel shard, over 5 data-parallel ranks, one more than have holders."""
    stated = megatron.single_matrix("down", 2, tensor, 1)
    cuts = [Cut(f"{i}", stated, even_intervals(2, 5), torch.float32) for i in range(2 * tensor + 1)]
    plan = make_plan(cuts, Grid(tensor=tensor, data=len(cuts[0].intervals)), COST, bucket_elements)
    empty = set(np.flatnonzero(plan.held.sum(axis=0) == 0))
    assert len(empty) == 3 * tensor and len(empty & set(plan.owners)) == 1
    check_exchange(plan, [only] * len(cuts), monkeypatch)


def test_while_one_bucket_is_computed_the_next_arrives_and_the_previous_returns(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    stated = megatron.single_matrix("down", 6, 8, None)
    plan = make_plan(
        [Cut(f"{i}", stated, even_intervals(48, 2), torch.float32) for i in range(8)],
        Grid(data=2),
        COST,
        bucket_elements=1,
    )
    assert [sorted(plan.owners[i] for i in bucket) for bucket in plan.buckets] == [[0, 1]] * 4
    network = Network(2)
    monkeypatch.setattr(torch.distributed, "all_to_all_single", network.all_to_all_single)
    seen: list[list[int]] = [[], []]

    def on_rank(rank: int) -> None:
        def compute(batch: list[Tensor], _: Sequence[int]) -> Tensor:
            seen[rank].append(network.in_flight())
            return torch.stack(batch)

        exchange = Exchange(
            plan, Mesh(plan.grid.coordinates(rank)), {i: i for i in range(8)}, torch.float64, torch.device("cpu")
        )
        exchange.run([torch.zeros(24, dtype=torch.float64) for _ in range(8)], compute)

    network.run(on_rank)
    assert seen == [[1, 2, 2, 1]] * 2


class Copies(TorchDispatchMode):
    """Counts the elements that the exchange copies. Those that the network stands in for are not counted."""

    def __init__(self) -> None:
        super().__init__()
        self.elements = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.overloadpacket is torch.ops.aten._foreach_copy_:
            self.elements += sum(target.numel() for target in args[0])
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("where", ["alone", "of two, all here", "of two, in pieces"])
def test_a_matrix_that_lies_whole_on_its_owner_is_not_copied(where: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two equal matrices. Where they lie whole on the ranks that own them, nothing but results is written."""
    stated, numel = megatron.single_matrix("down", 6, 8, None), 48
    intervals = {"alone": [[(0, 48)], [(0, 48)]], "of two, all here": [[(0, 48), (48, 0)], [(0, 0), (0, 48)]]}
    pieces = intervals.get(where, [even_intervals(48, 2), even_intervals(48, 2)])
    cuts = [Cut(f"{i}", stated, tuple(each), torch.float32) for i, each in enumerate(pieces)]
    plan = make_plan(cuts, Grid(data=len(pieces[0])), COST)
    network = Network(plan.ranks)
    monkeypatch.setattr(torch.distributed, "all_to_all_single", network.all_to_all_single)

    def on_rank(rank: int) -> None:
        mine = held(plan, [torch.ones(6, 8).double()] * 2, rank, torch.float32)
        own = [i for i, owner in enumerate(plan.owners) if owner == rank]
        results = torch.ones(len(own), 6, 8, dtype=torch.bfloat16)
        exchange = Exchange(
            plan, Mesh(plan.grid.coordinates(rank)), mine.slice_of_cut, torch.bfloat16, torch.device("cpu")
        )
        at = {value.data_ptr() for value in mine.values}
        there = where != "of two, in pieces"

        def compute(matrices: list[Tensor], _: Sequence[int]) -> Tensor:
            assert [matrix.data_ptr() in at for matrix in matrices] == [there] * len(own)
            return results

        with Copies() as copies:
            exchange.run(mine.values, compute)
        # Of a matrix in two halves, each rank packs one half and puts together a whole one, and both ways.
        assert copies.elements == (len(own) * numel if there else 2 * (24 + 48))

    network.run(on_rank)


def test_without_matrices_nothing_is_sent(monkeypatch: pytest.MonkeyPatch) -> None:
    check_exchange(make_plan([], Grid(tensor=2), COST), [], monkeypatch)
