"""Storages that autograd keeps for backward, so that activations can be measured whatever the allocator does."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any
from unittest import mock

import torch
from torch import Tensor

from megamult.multipliers import wrapped


@contextlib.contextmanager
def saved_storages(model: torch.nn.Module) -> Iterator[dict[int, int]]:
    """Yield a mapping that fills with {address: bytes} of each storage that autograd saves in the context.

    Storages of the model's parameters and buffers are left out. Layers with multipliers have hooks of their own on what
    they save (:mod:`megamult.multipliers.wrapped`). torch calls only the innermost hooks, so theirs are watched too.
    """
    found: dict[int, int] = {}
    kept: list[Tensor] = []  # else a storage could be freed, and its address used for another
    hooks = torch.autograd.graph.saved_tensors_hooks

    def own(tensor: Tensor) -> bool:
        address = tensor.untyped_storage().data_ptr()
        tensors = [*model.parameters(), *model.buffers()]
        tensors += [value for p in model.parameters() for value in vars(p).values() if isinstance(value, Tensor)]
        return any(each.untyped_storage().data_ptr() == address for each in tensors)

    def note(saved: Any) -> Any:
        if isinstance(saved, Tensor) and not own(saved):
            storage = saved.untyped_storage()
            found[storage.data_ptr()] = storage.nbytes()
            kept.append(saved)
        return saved

    def watched(pack: Callable[[Tensor], Any], unpack: Callable[[Any], Tensor]) -> Any:
        return hooks(lambda tensor: note(pack(tensor)), unpack)

    with (
        mock.patch.object(wrapped.torch.autograd.graph, "saved_tensors_hooks", watched),
        hooks(note, lambda saved: saved),
    ):
        yield found
