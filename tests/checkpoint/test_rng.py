"""Random-number states: what is drawn after restoring is what was drawn after asking."""

from __future__ import annotations

import random

import numpy as np
import torch

from megamult.checkpoint import rng


def draw() -> list[float]:
    """Of every kind; an odd number of normals, so that half a pair of each library stays cached."""
    return [
        *torch.randn(3).tolist(),
        *np.random.standard_normal(3).tolist(),
        *(random.gauss(0.0, 1.0) for _ in range(3)),
        random.random(),
    ]


def test_restored_states_draw_the_same_again() -> None:
    before = rng.states()
    try:
        draw()
        kept = {name: tensor.clone() for name, tensor in rng.states().items()}
        expected = draw()
        assert draw() != expected
        rng.restore(kept)
        assert draw() == expected
    finally:
        rng.restore(before)
