"""Memory that a Mamba-2 mixer keeps for backward, in bytes."""

from __future__ import annotations

from megamult.models.common.activation_memory import Pass
from megamult.models.common.mamba2.sizes import MixerSizes

_FP32 = 4


def mixer(run: Pass, sizes: MixerSizes, fused: bool) -> int:
    """Return the bytes of a mixer, without the input of its input projection.

    Args:
        run: the forward pass.
        sizes: global sizes of the mixer.
        fused: whether fused kernels compute what is between the projections
            (:mod:`megamult.models.common.mamba2.scan`). Their count follows from the source of causal-conv1d and
            mamba-ssm, and has not been measured.
    """
    here = sizes.local(run.tensor)
    tokens, size, inner, heads = run.tokens, run.size, here.inner, here.heads
    channels = inner + 2 * here.shared
    kept = tokens * size * sum(here.rows)  # the input projection's output
    kept += _gate(run, here)
    if fused:
        # The convolution's input by channels and its output, the scan's output, and step sizes and decays in fp32.
        return kept + tokens * (size * 2 * channels + 2 * _FP32 * heads)
    # The convolution's output, which is longer by the kernel, and SiLU's; the step sizes before and after softplus.
    kept += run.sequences * (run.seq_length + here.kernel - 1) * channels * size
    kept += tokens * (channels * size + 2 * _FP32 * heads)
    return kept + _chunks(run, here)


def _gate(run: Pass, here: MixerSizes) -> int:
    """Return the bytes of y SiLU(z) and the inner norm: y, SiLU(z), their product, and what the norm keeps in fp32."""
    kept = 3 * here.inner * run.size
    if here.norm != "none":
        kept += 2 * _FP32 * here.inner + _FP32 * here.groups
    return run.tokens * kept


def _chunks(run: Pass, here: MixerSizes) -> int:
    """Return the bytes of :func:`megamult.models.common.ssd.ssd`, which computes by chunks."""
    size, inner, heads, state = run.size, here.inner, here.heads, here.state
    chunk = min(here.chunk, run.seq_length)
    chunks = run.sequences * -(-run.seq_length // chunk)
    # Within chunks: exp of decays; C B^T for each group; their product; inputs, B and C by chunks.
    kept = chunks * chunk * chunk * (_FP32 * heads + size * (here.groups + heads))
    kept += chunks * chunk * size * (2 * here.groups * state + 2 * inner)
    # Between chunks: B and C of each head in fp32, inputs weighted by the decays to the end, what is read from the
    # state before the chunk, and the decays from the start and to the end.
    kept += chunks * chunk * _FP32 * (2 * heads * state + 2 * inner + 2 * heads)
    # The state before each chunk, by itself and side by side, and what is left of it at the chunk's end.
    return kept + chunks * _FP32 * (2 * inner * state + 2 * heads) + chunk * chunk
