"""Effective weights of a checkpoint: which ones its model has, and their values, which are read one by one."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from megamult.checkpoint.saved import SavedCheckpoint
from megamult.models.architectures import architecture_of, model_section
from megamult.models.common.hugging_face import Weight
from megamult.multipliers.reference import effective_weight
from megamult.multipliers.specs import LEAVES
from megamult.parameters.roles import Placement, resolve
from megamult.parameters.spec import Role, Side


@dataclass(frozen=True)
class EffectiveWeight:
    """One weight of a model with its multipliers merged, and the checkpoint's tensors from which it is computed."""

    saved: SavedCheckpoint
    weight: Weight
    """The weight in the model without multipliers."""
    stored: Weight
    """The weight that the checkpoint stores. It equals `weight`, except for a tied head: then it is the embedding."""
    sides: tuple[Side, ...]
    """Sides of the checkpoint's weight on which there are multipliers to merge."""

    def exported(self) -> Tensor:
        """Read the whole weight in fp32, in the shape that it has in a Hugging Face model."""
        if self.stored.stored_shape is None:
            return torch.ones(self.weight.shape)
        return self.read().expand(self.weight.shape)

    def read(self, start: int = 0, stop: int | None = None, dtype: torch.dtype = torch.float32) -> Tensor:
        """Read rows [start, stop), or all rows, in the stored shape, and merge the multipliers into them.

        Args:
            start, stop: first row, and the row after the last one.
            dtype: dtype of the result, in which the products are computed.
        """
        scales = {}
        for side in self.sides:
            name = f"model.{self.stored.multiplier(side)[0]}"
            scales[side] = (self.saved.read(name, start, stop) if side == "row" else self.saved.read(name)).to(dtype)
        rows = self.saved.read(f"model.{self.stored.logical}", start, stop).to(dtype)
        # Every weight is computed once, so the plain reference is fast enough. Its result depends on no kernel.
        return effective_weight(rows, **scales)


class EffectiveModel:
    """Model of a checkpoint, as effective weights.

    Args:
        saved: the checkpoint.

    Attributes:
        saved: the checkpoint.
        sizes: section `model` of the configuration.
        placement: placement of the multipliers that the checkpoint has.

    Raises:
        ValueError: this version does not know the configuration, or the checkpoint lacks a tensor, or has another
            tensor or another shape than the configuration asks for.
    """

    def __init__(self, saved: SavedCheckpoint) -> None:
        self.saved = saved
        config = saved.info.config
        try:
            self.sizes = model_section(config)
            multipliers = config["multipliers"]
            placed = multipliers["implementation"] != "none"
            self.placement: Placement = resolve(multipliers["placement"], self.sizes.roles) if placed else {}
        except (KeyError, TypeError) as error:
            raise ValueError(
                f"{saved.path} has a configuration with keys or values that this version does not know ({error!r}): "
                f"use the version that wrote it ({saved.info.versions.get('megamult')})"
            ) from None
        *weights, head = architecture_of(self.sizes).weights(self.sizes, saved.info.vocab_size)
        (self._embedding,) = (weight for weight in weights if weight.role == "embedding")
        self._head = head
        self._stored = weights if self.sizes.tie_embeddings else [*weights, head]
        self._check_tensors()

    def _check_tensors(self) -> None:
        expected: dict[str, tuple[int, ...]] = {}
        for weight in self._stored:
            stored = {} if weight.stored_shape is None else {weight.logical: weight.stored_shape}
            expected |= {**stored, **weight.multipliers(self.placement)}
        saved = self.saved
        for name, shape in expected.items():
            if saved.shapes.get(f"model.{name}") != shape:
                raise ValueError(
                    f"{saved.path} has {saved.shapes.get(f'model.{name}', 'no tensor')} under model.{name}, where its "
                    f"configuration asks for {shape}: the checkpoint's tensors and its configuration are not of the "
                    "same model"
                )
        for name in saved.shapes:
            if name.startswith("model.") and name.removeprefix("model.") not in expected:
                raise ValueError(
                    f"{saved.path} holds {name}, which its configuration does not have: the checkpoint's tensors and "
                    "its configuration are not of the same model"
                )

    def head_differs(self) -> bool:
        """Return whether the head is tied to an embedding that has multipliers other than 1.

        A tied head uses the embedding's matrix without the embedding's multipliers. If these are not 1, the effective
        weights of head and embedding differ.
        """
        names = self._embedding.multipliers(self.placement) if self.sizes.tie_embeddings else {}
        return any(bool((self.saved.read(f"model.{name}") != 1).any()) for name in names)

    def embedding_factor(self) -> float | None:
        """Return the factor of a tied embedding's output that the head does not have, if one scalar is all that it has.

        None if the embedding is not tied or has other multipliers.
        """
        if not self.sizes.tie_embeddings or self.placement.get(self._embedding.role) != frozenset({"scalar"}):
            return None
        return float(self.saved.read(f"model.{self.embedding_scalar}"))

    @property
    def embedding_scalar(self) -> str:
        """Logical name that a scalar of the embedding has, or would have."""
        return self._embedding.multiplier("scalar")[0]

    def all_ones(self, role: Role, side: Side) -> bool:
        """Return whether all multipliers of a role on one side are 1, so that the model is the same without them."""
        names = [
            name
            for weight in self._stored
            if weight.role == role
            for name in weight.multipliers({role: frozenset([side])})
        ]
        return all(bool((self.saved.read(f"model.{name}") == 1).all()) for name in names)

    def weights(self, tied: bool, embedding_factor: bool = False) -> list[EffectiveWeight]:
        """Return the weights in Hugging Face's order.

        Args:
            tied: whether to leave out the head, because it equals the embedding. They are equal only if the
                checkpoint's model is tied and :meth:`head_differs` is False, or with `embedding_factor`.
            embedding_factor: whether the embedding is returned without its multipliers (:meth:`embedding_factor`).
        """
        found = []
        for weight in self._stored:
            merged = not (embedding_factor and weight.role == self._embedding.role)
            placed = self.placement.get(weight.role, frozenset[Side]()) if merged else frozenset[Side]()
            found.append(EffectiveWeight(self.saved, weight, weight, tuple(side for side in LEAVES if side in placed)))
        if self.sizes.tie_embeddings and not tied:
            found.append(EffectiveWeight(self.saved, self._head, self._embedding, ()))
        return found
