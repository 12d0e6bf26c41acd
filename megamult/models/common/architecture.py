"""The contract between an architecture's folder and the rest of the package."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Generic, Protocol, TypeVar

import torch

from megamult.models.common.hugging_face import Weight

PlacementSetting = str | Mapping[str, str | Sequence[str]]
"""A placement of multipliers as a user gives it: a name, or a mapping from role to sides; `{}`: none."""

Sizes = TypeVar("Sizes")
_Sizes = TypeVar("_Sizes", contravariant=True)


class ModelClass(Protocol[_Sizes]):
    """Function or class that builds this rank's part of a new model, every parameter with its spec."""

    def __call__(
        self,
        sizes: _Sizes,
        vocab_size: int,
        seed: int | None,
        *,
        placement: PlacementSetting = "all",
        dtype: torch.dtype = torch.float32,
        tensor_parallel: int = 1,
        sequence_parallel: bool = False,
        recompute: bool = False,
        note: Callable[[str], None] = lambda doing: None,
    ) -> torch.nn.Module:
        """Build the model; the arguments are those of :class:`megamult.models.llama.model.GPT`.

        Returns:
            A module that takes tokens and labels, ids [batch, seq], and returns two scalars: the objective to minimize,
            and the cross entropy in nats per token, without gradient.
        """


class ToHuggingFace(Protocol[_Sizes]):
    """Function that makes the config.json of an exported model."""

    def __call__(
        self, sizes: _Sizes, vocab_size: int, *, tied: bool, dtype: str, token_ids: Mapping[str, Any]
    ) -> dict[str, Any]:
        """Return its content; the arguments are those of :func:`megamult.models.llama.hf_config.to_hugging_face`."""


@dataclass(frozen=True)
class Architecture(Generic[Sizes]):
    """Everything that code outside `models/<name>/` needs from that architecture.

    `Sizes` is its configuration, the section `model` of a run. Vocabulary sizes are exact, without padding.
    """

    name: str
    """The `model_type` that Hugging Face's config.json gives it."""
    hugging_face_class: str
    """The class of its models in transformers."""
    sizes: type[Sizes]
    """The class of its configuration."""
    model: Callable[[], ModelClass[Sizes]]
    """Function that imports and returns the class of its models. Only this import needs Megatron, so that export to and
    import from Hugging Face do not."""
    flops_per_token: Callable[[Sizes, int], float]
    """Function (sizes, vocabulary size) -> FLOPs of forward and backward per token, without recomputation."""
    weights: Callable[[Sizes, int], Iterator[Weight]]
    """Function (sizes, vocabulary size) -> every weight in Hugging Face's order, the head last even if it is tied."""
    to_hugging_face: ToHuggingFace[Sizes]
    """Function that makes an exported model's config.json."""
    from_hugging_face: Callable[[Mapping[str, Any]], Sizes]
    """Function that reads a config.json; its ValueError names what this architecture's code cannot compute."""
