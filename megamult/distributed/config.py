"""The section `parallel` of a run."""

from __future__ import annotations

from dataclasses import dataclass

from megamult.validation import positive, require


@dataclass
class ParallelConfig:
    """Sharding of the run. Data-parallel size = processes / tensor."""

    tensor: int = 1
    """Tensor-parallel size."""
    sequence: bool = False
    """Sequence parallelism: norms and residuals sharded over the tensor-parallel ranks."""
    zero_stage: int = 2
    """DeepSpeed ZeRO stage: 0 shards nothing, 1 the optimizer state, 2 also the gradients, 3 also the parameters. Stage
    1 keeps whole gradients and reduces them once per step, after the last backward pass. Stage 2 reduces them in every
    micro-batch while backward runs: the same traffic with one micro-batch per step, more with several. If memory allows
    1 and the micro-batches are too short to hide the traffic of 2, 1 is faster (examples/benchmarks/zero_stages.py)."""
    tensor_across_nodes: bool = False
    """Allow tensor-parallel groups that span nodes: every layer's collectives then cross the network."""
    rendezvous_seconds: float = 45.0
    """Seconds within which all processes must come together; otherwise the run ends and names the missing ones."""
    timeout_minutes: float = 10.0
    """Minutes without progress after which the run is ended, with each rank's last step and stack. Each micro-batch,
    evaluation and part of start-up is progress. The last 15 seconds of this time (half of it, if it is below 30
    seconds) are for collecting the stacks, so no part of the run may take longer than the rest."""

    def __post_init__(self) -> None:
        positive(
            "parallel",
            tensor=self.tensor,
            rendezvous_seconds=self.rendezvous_seconds,
            timeout_minutes=self.timeout_minutes,
        )
        require(self.zero_stage in (0, 1, 2, 3), f"parallel.zero_stage is {self.zero_stage}: use 0, 1, 2 or 3")
