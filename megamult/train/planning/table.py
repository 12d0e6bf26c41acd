"""Text of a plan: one column for each sharding, and what the figures assume."""

from __future__ import annotations

from collections.abc import Sequence

from megamult.monitor import screen
from megamult.train.planning.cluster import Cluster
from megamult.train.planning.estimate import PARTS, Estimate
from megamult.train.planning.memory import KEPT, PASSES, UPDATE
from megamult.train.planning.traffic import GRADIENTS, MUON, PARAMETERS, TENSOR

_LABEL, _COLUMN = 40, 20


def sharding(made: Estimate) -> str:
    """Return a sharding as keys of a run."""
    parallel, train = made.config.parallel, made.config.train
    return (
        f"--parallel.tensor {parallel.tensor} --parallel.sequence {str(parallel.sequence).lower()} "
        f"--parallel.zero_stage {parallel.zero_stage} --train.micro_batch_size {train.micro_batch_size} "
        f"--train.recompute {train.recompute} (accumulation {made.config.accumulation(made.grid.data)})"
    )


def lines_of(columns: Sequence[tuple[str, Estimate]], cluster: Cluster) -> list[str]:
    """Return the lines of a table of estimates.

    Args:
        columns: heading and estimate of each column.
        cluster: the cluster.
    """
    estimates = [each for _, each in columns]
    lines = [_row("", [heading for heading, _ in columns])]

    def add(label: str, values: Sequence[str]) -> None:
        lines.append(_row(label, values))

    add("tensor x data parallel", [f"{each.grid.tensor} x {each.grid.data}" for each in estimates])
    add("sequence parallel", ["yes" if each.config.parallel.sequence else "no" for each in estimates])
    add("ZeRO stage", [str(each.config.parallel.zero_stage) for each in estimates])
    add(
        "micro-batch x accumulation",
        [f"{each.config.train.micro_batch_size} x {each.config.accumulation(each.grid.data)}" for each in estimates],
    )
    add("recompute", [each.config.train.recompute for each in estimates])
    for heading, kinds in (
        ("memory per rank, all the time", KEPT),
        ("beside it, in forward and backward", PASSES),
        ("or beside it, in reduction and update", UPDATE),
    ):
        lines.append(heading)
        for kind in kinds:
            if any(each.memory.by_kind.get(kind) for each in estimates):
                add(f"  {kind}", [screen.size(each.memory.by_kind.get(kind, 0)) for each in estimates])
    lines.append("memory per rank")
    add("  at the peak", [screen.size(each.memory.peak) for each in estimates])
    add(f"  of {screen.size(cluster.usable)} that may be used", [_room(each, cluster) for each in estimates])
    if any(each.newton_schulz for each in estimates):
        lines.append("Newton-Schulz per step")
        pairs = [each.newton_schulz or (0.0, 0.0) for each in estimates]
        add("  GFLOP of the busiest rank", [f"{busiest / 1e9:,.0f}" for busiest, _ in pairs])
        add("  busiest over mean", [f"{busiest / mean:.3f}" if mean else "-" for busiest, mean in pairs])
    lines.append("bytes that a rank sends per step")
    for kind in (GRADIENTS, PARAMETERS, TENSOR, MUON):
        if any(each.traffic[kind] for each in estimates):
            add(f"  {kind}", [screen.size(each.traffic[kind]) for each in estimates])
    lines.append("seconds of a step")
    for part in PARTS:
        if any(each.seconds[part] for each in estimates):
            add(f"  {part}", [f"{each.seconds[part]:.3g}" for each in estimates])
    add("  together", [f"{each.step:.3g}" for each in estimates])
    add("tokens per second", [f"{each.tokens_per_second:,.0f}" for each in estimates])
    add("MFU", [f"{100 * each.mfu:.1f} %" for each in estimates])
    return lines


def assumptions(cluster: Cluster, source: str) -> list[str]:
    """Return what the figures assume, one line for each group of figures."""
    overlap = (
        "ZeRO 2 reduces under backward, ZeRO 3 reduces and gathers under forward and backward (without DeepSpeed's "
        "overlap_comm no reduction hides); ZeRO 0 and 1, the gather of ZeRO 1 and 2, and tensor-parallel collectives "
        "hide under nothing"
        if cluster.cuda
        else "no collective hides under computation"
    )
    return [
        f"cluster: {source}",
        "memory: tensors by name and shape, each kind on the rank that needs most; buckets and gathered parameters are "
        f"upper bounds; {100 * cluster.reserve:g} % of the memory (--reserve) is left to the rest",
        f"compute: {100 * cluster.efficiency:g} % of {cluster.peak:g} TFLOP/s (--efficiency, --peak), in passes and in "
        "Newton-Schulz, which is not split over ranks; updates element by element, data and stragglers take no time",
        f"communication: rings at {cluster.within:g} GB/s within a node (--within), and between nodes at "
        f"{cluster.between:g} GB/s (--between) times a group's ranks in a node, each with a network adapter, and at "
        f"most {cluster.within:g} GB/s; without latencies; {overlap}; Muon's exchange sends {cluster.between:g} GB/s "
        "between nodes and hides under Newton-Schulz but for one bucket",
        "MFU: the model's FLOPs without recomputation, attention causal, over the peak",
    ]


def missing(label: str, made: Estimate, cluster: Cluster) -> str:
    """Return by how much a sharding does not fit."""
    over = made.memory.peak - cluster.usable
    return (
        f"{label} needs {screen.size(made.memory.peak)} per rank, {screen.size(over)} more than the "
        f"{screen.size(cluster.usable)} that may be used"
    )


def _room(made: Estimate, cluster: Cluster) -> str:
    over = made.memory.peak - cluster.usable
    return f"{screen.size(over)} too much" if over > 0 else f"{screen.size(-over)} left"


def _row(label: str, values: Sequence[str]) -> str:
    return f"{label:<{_LABEL}}" + "".join(f"{value:>{_COLUMN}}" for value in values)
