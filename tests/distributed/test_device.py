"""Preparations of a process before CUDA starts, on a machine that has none."""

from __future__ import annotations

import os

import pytest
import torch

from megamult.distributed import device


@pytest.mark.parametrize(
    ("tensor", "given", "expected"), [(1, None, None), (2, None, "1"), (2, "8", "8"), (1, "1", "1")]
)
def test_kernels_share_one_queue_only_for_tensor_parallel_overlap(
    monkeypatch: pytest.MonkeyPatch, tensor: int, given: str | None, expected: str | None
) -> None:
    selected: list[str | None] = []
    name = "CUDA_DEVICE_MAX_CONNECTIONS"
    monkeypatch.setenv(name, given) if given else monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(device, "has_cuda", lambda: True)
    # The variable counts when CUDA starts, which it does here.
    monkeypatch.setattr(torch.cuda, "set_device", lambda _: selected.append(os.environ.get(name)))
    device.prepare(tensor)
    assert selected == [expected]
    monkeypatch.delenv(name, raising=False)
