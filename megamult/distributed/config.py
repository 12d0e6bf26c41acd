"""The section `parallel` of a run's configuration."""

from __future__ import annotations

from dataclasses import dataclass

from megamult.validation import positive, require


@dataclass
class ParallelConfig:
    """Sharding of the run. The data-parallel size is the number of processes divided by `tensor`."""

    tensor: int = 1
    """Tensor-parallel size."""
    sequence: bool = False
    """Use sequence parallelism: the activations of norms and residuals are sharded over the tensor-parallel ranks."""
    zero_stage: int = 2
    """DeepSpeed ZeRO stage: 0 shards nothing, 1 the optimizer state, 2 also the gradients, 3 also the parameters. Stage
    1 keeps whole gradients and reduces them once per step, after the last backward pass. Stage 2 reduces them in every
    micro-batch while backward runs. With one micro-batch per step both send the same in fp32, and stage 1 less in bf16;
    with several, stage 2 sends more. Stage 1 is faster if there is enough memory for it and micro-batches are too short
    to hide the traffic of stage 2 (examples/benchmarks/zero_stages.py)."""
    tensor_across_nodes: bool = False
    """Allow tensor-parallel groups to span nodes. The collectives of every layer then cross the network."""
    rendezvous_seconds: float = 45.0
    """Seconds to wait for all processes at the start. If some are still missing after this time, the run ends with a
    message that names them."""
    timeout_minutes: float = 10.0
    """Minutes without progress after which the run ends with a report of each rank's last step and stack. Every
    micro-batch, evaluation and part of start-up counts as progress. The last 15 seconds of this time (its second half,
    if the time is below 30 seconds) serve to collect the ranks' stacks. A micro-batch, an evaluation or a part of
    start-up must therefore take less than the rest of the time."""

    def __post_init__(self) -> None:
        positive(
            "parallel",
            tensor=self.tensor,
            rendezvous_seconds=self.rendezvous_seconds,
            timeout_minutes=self.timeout_minutes,
        )
        require(self.zero_stage in (0, 1, 2, 3), f"parallel.zero_stage is {self.zero_stage}: use 0, 1, 2 or 3")
