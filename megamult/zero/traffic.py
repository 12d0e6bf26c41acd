"""Traffic of ZeRO in one optimizer step: what collectives work on, and the time for which a rank waits for them.

Pure functions. `tests/train/test_zero_traffic.py` compares them with counted collectives.
"""

from __future__ import annotations

RING = {"allreduce": 2, "reduce_scatter": 1, "allgather": 1}
"""Number of ring passes of a collective. In a pass, D ranks move (D - 1) / D of the whole tensor through each rank."""


def whole_bytes(stage: int, accumulation: int, size: int = 2, summed: int = 4) -> dict[str, float]:
    """Return the bytes per parameter that one step's collectives work on, by kind.

    Args:
        stage: the ZeRO stage.
        accumulation: number of micro-batches of a step.
        size: bytes of an element of a parameter.
        summed: bytes of an element of an accumulated gradient.
    """
    if stage == 0:
        return {"allreduce": float(summed)}
    if stage == 1:
        # With sums in fp32 beside bf16 parameters, a rank averages only its own part (megamult/zero/bf16.py).
        return {"reduce_scatter" if size < summed else "allreduce": float(summed), "allgather": float(size)}
    if stage == 2:
        return {"allreduce": float(summed * accumulation), "allgather": float(size)}
    # Parameters are gathered for the forward pass and again for the backward pass.
    return {"reduce_scatter": float(summed * accumulation), "allgather": float(2 * size * accumulation)}


def waited(
    stage: int, accumulation: int, gradients: float, parameters: float, forward: float, backward: float
) -> float:
    """Return the seconds of one step in which a rank communicates over the data-parallel ranks and computes nothing.

    ZeRO 0 and 1 reduce gradients after the last backward pass. ZeRO 2 and 3 reduce them during every backward pass, and
    only the time by which the communication takes longer than the pass counts. ZeRO 1 and 2 gather parameters after the
    update, ZeRO 3 during every forward and backward pass.

    Args:
        stage: the ZeRO stage.
        accumulation: number of micro-batches of a step.
        gradients, parameters: seconds that the reductions and the gathers of a whole step take.
        forward, backward: seconds that one micro-batch's passes take.
    """
    if stage < 2:
        return gradients + parameters
    reducing = gradients / accumulation
    if stage == 2:
        return parameters + accumulation * max(0.0, reducing - backward)
    gathering = parameters / accumulation / 2
    return accumulation * (max(0.0, gathering - forward) + max(0.0, gathering + reducing - backward))
