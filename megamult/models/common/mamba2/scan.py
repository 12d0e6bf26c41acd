"""What a Mamba-2 mixer does between its projections: convolution, SiLU and SSD, by plain torch or by fused kernels.

The fused kernels are those of the packages causal-conv1d and mamba-ssm, on a CUDA GPU. They compute the same function,
up to rounding, and are faster, because nothing of the size of a chunk's square is stored. Which of the two a model uses
is chosen where it is built, and said at the start of a run.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util

import torch
import torch.nn.functional as F
from torch import Tensor

from megamult.models.common.convolution import causal_convolution
from megamult.models.common.mamba2.sizes import MixerSizes
from megamult.models.common.ssd import ssd

_PACKAGES = {"causal_conv1d": "causal-conv1d", "mamba_ssm": "mamba-ssm"}


def why_not_fused(sizes: MixerSizes, device: torch.device, dtype: torch.dtype) -> str | None:
    """Return why the fused kernels cannot compute a mixer on a rank, or None if they can.

    Args:
        sizes: sizes on one rank.
        device: device of the model.
        dtype: dtype of the model.
    """
    if not _is_cuda(device):
        return "the device is no CUDA GPU"
    missing = [package for module, package in _PACKAGES.items() if importlib.util.find_spec(module) is None]
    if missing:
        return f"the package {' and '.join(missing)} is not installed"
    channels = sizes.inner + 2 * sizes.shared
    limits = (
        (dtype in (torch.float32, torch.bfloat16, torch.float16), f"the dtype is {dtype}"),
        (2 <= sizes.kernel <= 4, f"model.ssm_kernel is {sizes.kernel}, and they take 2 to 4"),
        (channels % 8 == 0, f"a rank has {channels} channels, and they take multiples of 8"),
        (sizes.chunk & (sizes.chunk - 1) == 0, f"model.ssm_chunk is {sizes.chunk}, and they take powers of 2"),
    )
    return next((why for fits, why in limits if not fits), None)


def use_fused(sizes: MixerSizes, device: torch.device, dtype: torch.dtype) -> bool:
    """Return whether a mixer uses the fused kernels; arguments as in :func:`why_not_fused`.

    Raises:
        ValueError: they are asked for and cannot be used.
    """
    if device.type == "meta":  # the model is only described
        return False
    problem = why_not_fused(sizes, device, dtype) if sizes.kernels != "torch" else None
    if sizes.kernels == "fused" and problem is not None:
        raise ValueError(f"model.ssm_kernels is fused, and {problem}: mend this, or set model.ssm_kernels to auto")
    return sizes.kernels != "torch" and problem is None


def described(sizes: MixerSizes, device: torch.device, dtype: torch.dtype) -> str:
    """Return which kernels a mixer uses, and why, for people; arguments as in :func:`why_not_fused`."""
    if sizes.kernels == "torch":
        return "mixers by plain torch (model.ssm_kernels)"
    problem = why_not_fused(sizes, device, dtype)
    if problem is not None:
        return f"mixers by plain torch ({problem})"
    versions = ", ".join(f"{package} {importlib.metadata.version(package)}" for package in _PACKAGES.values())
    return f"mixers by fused kernels ({versions})"


def _is_cuda(device: torch.device) -> bool:
    return device.type == "cuda"


def scan(
    channels: Tensor,
    dt: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    a: Tensor,
    d: Tensor,
    dt_bias: Tensor,
    sizes: MixerSizes,
    documents: Tensor | None,
    fused: bool,
) -> Tensor:
    """Return SSD(x, softplus(dt + dt_bias), a, B, C, d) with [x, B, C] = SiLU(conv(channels)).

    Args:
        channels: [batch, seq, inner + 2 shared] x, B and C.
        dt: [batch, seq, heads].
        weight, bias: [inner + 2 shared, 1, kernel] and [inner + 2 shared] of the convolution.
        a, d, dt_bias: [heads] in fp32, or in fp64 as `channels`.
        sizes: sizes on this rank.
        documents: see :meth:`megamult.models.common.mamba2.mixer.Mixer.forward`.
        fused: whether to use the fused kernels (:func:`use_fused`).

    Returns:
        [batch, seq, inner].
    """
    if not fused:
        x, b, c = _split(F.silu(causal_convolution(channels, weight, bias, documents)), sizes)
        wide = dt if dt.dtype == torch.float64 else dt.float()
        y, _ = ssd(x, F.softplus(wide + dt_bias), a, b, c, d, documents=documents, chunk=sizes.chunk)
        return y.flatten(-2)
    from causal_conv1d import causal_conv1d_fn  # type: ignore[import-not-found]
    from mamba_ssm.ops.triton.ssd_combined import mamba_chunk_scan_combined  # type: ignore[import-not-found]

    numbers = None if documents is None else documents.to(torch.int32).contiguous()
    # The kernel takes [batch, channels, seq], and documents only if neighbouring channels are neighbours in memory.
    by_channel = channels.contiguous().transpose(1, 2)
    convolved = causal_conv1d_fn(by_channel, weight.squeeze(1), bias, seq_idx=numbers, activation="silu")
    x, b, c = _split(convolved.transpose(1, 2), sizes)
    y = mamba_chunk_scan_combined(
        x, dt, a, b, c, chunk_size=sizes.chunk, D=d, dt_bias=dt_bias, dt_softplus=True, seq_idx=numbers
    )
    return y.flatten(-2)


def _split(convolved: Tensor, sizes: MixerSizes) -> tuple[Tensor, Tensor, Tensor]:
    """Return x [batch, seq, heads, head_dim], B and C [batch, seq, groups, state]."""
    x, b, c = convolved.split([sizes.inner, sizes.shared, sizes.shared], -1)
    of_groups = (sizes.groups, sizes.state)
    return x.unflatten(-1, (sizes.heads, sizes.head_dim)), b.unflatten(-1, of_groups), c.unflatten(-1, of_groups)
