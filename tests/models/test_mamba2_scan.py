"""Fused kernels of a mixer: what they are given, against plain torch, with stand-ins that compute what the packages say
of themselves; and when they are used.

The packages need a GPU. Their conventions are from causal_conv1d_interface.py (causal-conv1d 1.5) and ssd_combined.py
(mamba-ssm 2.2).
"""

from __future__ import annotations

import importlib.machinery
import sys
from dataclasses import replace
from types import ModuleType
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from megamult.models.common.convolution import causal_convolution
from megamult.models.common.mamba2 import scan
from megamult.models.common.mamba2.sizes import MixerSizes
from megamult.models.common.ssd import recurrence
from megamult.models.falcon_h1.architecture import FALCON_H1
from megamult.models.falcon_h1.config import FalconH1Config

SIZES = MixerSizes(heads=4, head_dim=4, state=4, groups=2, chunk=8)
CUDA = torch.device("cuda")  # named, not used


def causal_conv1d_fn(
    x: Tensor, weight: Tensor, bias: Tensor | None = None, seq_idx: Tensor | None = None, activation: str | None = None
) -> Tensor:
    """x: (batch, dim, seqlen), weight: (dim, width); seq_idx: (batch, seqlen) int32, only with channels last."""
    assert activation == "silu" and weight.dim() == 2 and weight.shape[0] == x.shape[1]
    assert x.stride(1) == 1 and x.stride(2) % 8 == 0 and x.stride(0) % 8 == 0
    assert seq_idx is None or (seq_idx.dtype == torch.int32 and seq_idx.is_contiguous())
    return F.silu(causal_convolution(x.transpose(1, 2), weight.unsqueeze(1), bias, seq_idx)).transpose(1, 2)


def mamba_chunk_scan_combined(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    chunk_size: int,
    D: Tensor | None = None,
    dt_bias: Tensor | None = None,
    seq_idx: Tensor | None = None,
    dt_softplus: bool = False,
) -> Tensor:
    """x: (batch, seqlen, nheads, headdim), dt: (batch, seqlen, nheads), B and C: (batch, seqlen, ngroups, dstate)."""
    assert dt_softplus and dt_bias is not None and A.dtype == dt_bias.dtype == torch.float32
    assert chunk_size == SIZES.chunk and x.shape[2:] == (4, 4) and B.shape[2:] == C.shape[2:] == (2, 4)
    return recurrence(x, F.softplus(dt.float() + dt_bias), A, B, C, D, documents=seq_idx)[0]


@pytest.fixture
def packages(monkeypatch: pytest.MonkeyPatch) -> None:
    """The packages, as if they were installed beside a GPU."""
    contents: dict[str, dict[str, Any]] = {
        "causal_conv1d": {"causal_conv1d_fn": causal_conv1d_fn},
        **{name: {} for name in ("mamba_ssm", "mamba_ssm.ops", "mamba_ssm.ops.triton")},
        "mamba_ssm.ops.triton.ssd_combined": {"mamba_chunk_scan_combined": mamba_chunk_scan_combined},
    }
    for name, content in contents.items():
        module = ModuleType(name)
        module.__spec__ = importlib.machinery.ModuleSpec(name, None)
        vars(module).update(content)
        monkeypatch.setitem(sys.modules, name, module)
    monkeypatch.setattr(
        "importlib.metadata.version", lambda package: {"mamba-ssm": "2.2", "causal-conv1d": "1.5"}[package]
    )


@pytest.mark.parametrize("documents", [None, torch.tensor([[0] * 5 + [1] * 8, [0] * 13])])
@pytest.mark.parametrize("bias", [True, False])
def test_the_fused_kernels_are_asked_for_what_torch_computes(
    packages: None, documents: Tensor | None, bias: bool
) -> None:
    generator = torch.Generator().manual_seed(3)

    def leaf(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator).requires_grad_()

    channels = SIZES.inner + 2 * SIZES.shared
    given = [leaf(2, 13, channels + 8), leaf(2, 13, 4), leaf(channels, 1, 4), leaf(channels), leaf(4), leaf(4), leaf(4)]
    objective = torch.randn(2, 13, SIZES.inner, generator=generator)
    found = []
    for fused in (False, True):
        projected, dt, weight, b, a, d, dt_bias = given
        y = scan.scan(
            # As in the mixer, a part of a wider row.
            *(projected[..., 8:], dt, weight, b if bias else None, -a.exp(), d, dt_bias),
            *(SIZES, documents, fused),
        )
        gradients = torch.autograd.grad((y * objective).sum(), given, allow_unused=True)
        found.append([y, *(each for each in gradients if each is not None)])
    assert len(found[0]) == len(found[1]) == (8 if bias else 7)
    for plain, fused_value in zip(*found, strict=True):
        torch.testing.assert_close(fused_value, plain, rtol=1e-4, atol=1e-5)  # fp32, sums in another order


def test_they_are_used_where_they_can_be(packages: None) -> None:
    bf16 = torch.bfloat16
    assert scan.use_fused(SIZES, CUDA, bf16) and not scan.use_fused(SIZES, torch.device("cpu"), bf16)
    assert not scan.use_fused(replace(SIZES, kernels="torch"), CUDA, bf16)
    reasons = {
        "model.ssm_kernel is 5": replace(SIZES, kernel=5),
        "a rank has 20 channels": replace(SIZES, heads=3, groups=1),
        "model.ssm_chunk is 12": replace(SIZES, chunk=12),
    }
    for reason, sizes in reasons.items():
        assert not scan.use_fused(sizes, CUDA, bf16)
        with pytest.raises(ValueError, match=f"model.ssm_kernels is fused, and {reason}.*: mend this, or set"):
            scan.use_fused(replace(sizes, kernels="fused"), CUDA, bf16)
    assert "float64" in str(scan.why_not_fused(SIZES, CUDA, torch.float64))


def test_a_run_says_which_kernels_it_uses(packages: None, monkeypatch: pytest.MonkeyPatch) -> None:
    config, bf16 = FalconH1Config(), torch.bfloat16
    assert FALCON_H1.details(config, 1, bf16) == "mixers by plain torch (the device is no CUDA GPU)"
    monkeypatch.setattr("megamult.distributed.device.local_device", lambda: CUDA)
    said = FALCON_H1.details(config, 1, bf16)
    assert said == "mixers by fused kernels (causal-conv1d 1.5, mamba-ssm 2.2)"
    assert "model.ssm_kernels" in FALCON_H1.details(replace(config, ssm_kernels="torch"), 1, bf16)
    monkeypatch.delitem(sys.modules, "mamba_ssm")
    assert FALCON_H1.details(config, 1, bf16) == "mixers by plain torch (the package mamba-ssm is not installed)"
    assert FALCON_H1.details(FalconH1Config(num_layers=2, layers="*-"), 1, bf16) == ""
