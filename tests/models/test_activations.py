"""What the hooks measure, against the whole tensors in float64."""

from __future__ import annotations

import pytest
import torch

from megamult.models.common.activations import sum_of_squares


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_squares_are_summed_in_full_precision_also_of_a_part_of_the_columns(dtype: torch.dtype) -> None:
    values = torch.randn(7, 3, 50, generator=torch.Generator().manual_seed(0)).to(dtype)
    part = values[..., :41]
    assert sum_of_squares(part).item() == pytest.approx(part.double().square().sum().item(), rel=1e-6)
    assert sum_of_squares(values[..., :0]).item() == 0.0
