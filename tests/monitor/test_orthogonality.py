"""Muon's orthogonality error, against singular values in float64."""

from __future__ import annotations

import pytest
import torch

from megamult.monitor.orthogonality import orthogonality_error


@pytest.mark.parametrize("shape", [(5, 9), (9, 5), (6, 6)])
def test_the_error_is_the_rms_of_the_squared_singular_values_minus_one(shape: tuple[int, int]) -> None:
    matrices = torch.randn(3, *shape, generator=torch.Generator().manual_seed(0)) / 3
    singular = torch.linalg.svdvals(matrices.double())
    expected = (singular.square() - 1).square().mean(-1).sqrt()
    torch.testing.assert_close(orthogonality_error(matrices).double(), expected, rtol=1e-5, atol=0.0)


def test_an_orthogonal_matrix_has_no_error_and_zero_has_one() -> None:
    q = torch.linalg.qr(torch.randn(7, 7, generator=torch.Generator().manual_seed(0)))[0]
    assert orthogonality_error(q[None, :4]).item() < 1e-6
    assert orthogonality_error(torch.zeros(1, 4, 7)).item() == 1.0
