"""The section `parallel` of a run."""

from __future__ import annotations

from dataclasses import dataclass

from megamult.validation import positive, require


@dataclass
class ParallelConfig:
    """How the model is spread; data parallel = processes / tensor."""

    tensor: int = 1
    """Tensor-parallel size."""
    sequence: bool = False
    """Sequence parallelism: norms and residuals sharded over the tensor-parallel ranks."""
    zero_stage: int = 2
    """DeepSpeed ZeRO stage: 0 nothing sharded, 1 optimizer state, 2 and gradients, 3 and parameters. 1 keeps whole
    gradients and reduces them once per step, after the last backward pass. 2 reduces them in every micro-batch while
    backward runs: the same traffic with one micro-batch per step, more with several. Where memory allows 1 and short
    micro-batches do not hide the traffic of 2, 1 is faster (examples/benchmarks/zero_stages.py)."""
    tensor_across_nodes: bool = False
    """Let the ranks of a tensor-parallel group run on several nodes, with every layer's collectives on the network."""
    rendezvous_seconds: float = 45.0
    """Seconds within which all processes must have come together; a host that is down is named then."""
    timeout_minutes: float = 10.0
    """Minutes within which a run without any progress (a micro-batch, an evaluation, a part of start-up) is ended, with
    each rank's last step and stack. Of less than half a minute a third to a half is for asking them: no part of the run
    may take longer than the rest."""

    def __post_init__(self) -> None:
        positive(
            "parallel",
            tensor=self.tensor,
            rendezvous_seconds=self.rendezvous_seconds,
            timeout_minutes=self.timeout_minutes,
        )
        require(self.zero_stage in (0, 1, 2, 3), f"parallel.zero_stage is {self.zero_stage}: use 0, 1, 2 or 3")
