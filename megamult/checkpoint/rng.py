"""Random-number states of a rank as tensors. A checkpoint stores those of every rank.

megamult itself draws no random numbers during training: there is no dropout, and the order of the data is a function of
the seed. A user's model or hook may draw some.
"""

from __future__ import annotations

import random
from collections.abc import Mapping

import numpy as np
import torch
from megatron.core.tensor_parallel import get_cuda_rng_tracker
from torch import Tensor

from megamult.distributed import device

_TRACKED = "megatron."


def prefix(rank: int) -> str:
    """Return the prefix that the names of a rank's states have in a checkpoint."""
    return f"rng.rank_{rank:05d}."


def states() -> dict[str, Tensor]:
    """Return the random-number states of torch (CPU and this rank's GPU), Megatron's tracker, numpy and Python."""
    _, keys, position, has_gauss, cached = np.random.get_state()
    version, internal, gauss = random.getstate()
    found = {
        "torch": torch.get_rng_state(),
        "numpy.keys": torch.from_numpy(np.asarray(keys, dtype=np.int64)),
        "numpy.rest": torch.tensor([position, has_gauss, cached], dtype=torch.float64),
        "python.internal": torch.tensor([version, *internal], dtype=torch.int64),
        "python.gauss": torch.tensor([float("nan") if gauss is None else gauss], dtype=torch.float64),
    }
    if device.has_cuda():
        found["cuda"] = torch.cuda.get_rng_state()
        tracked = get_cuda_rng_tracker().get_states()
        found |= {_TRACKED + name: state for name, state in tracked.items() if isinstance(state, Tensor)}
    return found


def restore(found: Mapping[str, Tensor]) -> None:
    """Set the random-number states to those that :func:`states` returned."""
    torch.set_rng_state(found["torch"])
    position, has_gauss, cached = found["numpy.rest"].tolist()
    keys = found["numpy.keys"].numpy().astype(np.uint32)
    np.random.set_state(("MT19937", keys, int(position), int(has_gauss), cached))
    version, *internal = found["python.internal"].tolist()
    gauss = found["python.gauss"].item()
    random.setstate((version, tuple(internal), None if gauss != gauss else gauss))
    if device.has_cuda() and "cuda" in found:
        torch.cuda.set_rng_state(found["cuda"])
        tracker = get_cuda_rng_tracker()
        restored = {name.removeprefix(_TRACKED): state for name, state in found.items() if name.startswith(_TRACKED)}
        tracker.set_states(tracker.get_states() | restored)
