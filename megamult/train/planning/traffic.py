"""Bytes that a rank sends in one optimizer step, by kind. Every collective counts as a ring.

A ring pass moves (N - 1) / N of the whole tensor through each of N ranks; an all-reduce is two passes, a
reduce-scatter or an all-gather one.
"""

from __future__ import annotations

from collections.abc import Mapping

from megamult.config import Config
from megamult.models.common.activation_memory import Pass
from megamult.models.common.config import DecoderConfig
from megamult.optim.two_phase import TwoPhaseOptimizer
from megamult.parameters.spec import ParameterSpec
from megamult.train.planning.memory import exchanged_size, matrix_rules
from megamult.zero.partition import Partition
from megamult.zero.traffic import RING, whole_bytes

GRADIENTS, PARAMETERS = "gradient reduction", "parameter gather"
TENSOR, MUON = "tensor parallel", "Muon's exchange"


def traffic(
    config: Config, specs: Mapping[str, ParameterSpec], partition: Partition, run: Pass, optimizer: TwoPhaseOptimizer
) -> dict[str, float]:
    """Return the bytes that the rank that sends most sends per step, by kind.

    Args:
        config: configuration of the run.
        specs: specs of all parameters, by name.
        partition: partition of a rank.
        run: forward pass of a micro-batch.
        optimizer: optimizer whose rules are bound to a partition.
    """
    grid = partition.mesh.grid
    accumulation = config.accumulation(grid.data)
    size, summed = run.size, config.train.torch_accumulation_dtype.itemsize
    share = (grid.data - 1) / grid.data
    elements = sum(partition.shards.values())
    found = {GRADIENTS: 0.0, PARAMETERS: 0.0}
    for collective, whole in whole_bytes(config.parallel.zero_stage, accumulation, size, summed).items():
        kind = PARAMETERS if collective == "allgather" else GRADIENTS
        found[kind] += share * RING[collective] * whole * elements
    found[TENSOR] = accumulation * tensor_parallel_bytes(specs, run, config.train.recompute == "full", config.model)
    found[MUON] = 0.0
    for rule in matrix_rules(optimizer):
        assert rule.plan is not None
        found[MUON] += float(rule.plan.sent.max(initial=0)) * exchanged_size(rule)
        if config.parallel.zero_stage == 0:  # each rank sends the updates of its share to all others
            found[MUON] += (
                share * exchanged_size(rule) * sum(matrix.numel for matrix in rule.plan.matrices) / grid.tensor
            )
    return found


def tensor_parallel_bytes(
    specs: Mapping[str, ParameterSpec], run: Pass, recompute: bool, model: DecoderConfig
) -> float:
    """Return the bytes that a rank sends to its tensor-parallel group in one micro-batch.

    A column-parallel layer all-reduces the gradient of its input, and a row-parallel layer its output. With sequence
    parallelism a column-parallel layer gathers its input in both passes and scatters its gradient, and a row-parallel
    layer scatters its output and gathers its gradient. With fewer query groups than ranks, Megatron gathers the output
    of the fused projection of attention and scatters its gradient. Recomputation repeats what the layers send in
    forward. The embedding sends its output, and the loss three numbers per token.

    Args:
        specs: specs of all parameters, by name.
        run: forward pass of the micro-batch.
        recompute: whether the layers are recomputed.
        model: the model's sizes, of which the number of query groups and tied embeddings count.
    """
    ring = (run.tensor - 1) / run.tensor * run.tokens
    if run.tensor == 1:
        return 0.0
    passes = 0.0  # ring passes, each times the width of what it sends
    for spec in specs.values():
        dim = spec.dim_over("tensor")
        embedding, head = spec.kind == "embedding", spec.kind == "head"
        if dim is None or not (spec.orthogonalize or embedding or head):
            continue
        forward = (1 if run.sequence else 2) if dim == 1 or embedding else (1 if run.sequence else 0)
        backward = (1 if run.sequence else 0) if dim == 1 or embedding else 2
        again = forward if recompute and spec.orthogonalize else 0
        width = spec.shape[0] if dim == 1 else spec.shape[1]
        passes += width * (forward + backward + again)
        if model.query_groups < run.tensor and any(part.name == "k" for part in spec.parts):
            passes += spec.shape[0] * (3 if recompute else 2)
        if embedding and model.tie_embeddings:
            passes += width * (3 if run.sequence else 2)
    loss = 2 * 3 * 4
    return ring * (passes * run.size + loss)
