"""Interface of an architecture: what a folder `models/<name>/` provides to the rest of the package."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Generic, Protocol, TypeVar

import torch

from megamult.models.common.activation_memory import Pass, Saved
from megamult.models.common.hugging_face import Weight
from megamult.parameters.initial import Initial
from megamult.parameters.spec import Role, Side

PlacementSetting = str | Mapping[str, str | Sequence[str]]
"""Placement of multipliers as a user gives it: a name, or a mapping from role to sides. `{}` means no multipliers."""

Sizes = TypeVar("Sizes")
_Sizes = TypeVar("_Sizes", contravariant=True)


class ModelClass(Protocol[_Sizes]):
    """Function or class that builds this rank's part of a new model, in which every parameter has a spec."""

    def __call__(
        self,
        sizes: _Sizes,
        vocab_size: int,
        seed: int | None,
        *,
        placement: PlacementSetting = "all",
        shared_columns: bool = False,
        dtype: torch.dtype = torch.float32,
        tensor_parallel: int = 1,
        sequence_parallel: bool = False,
        recompute: bool = False,
        initial: Initial | None = None,
        document_end: int | None = None,
        note: Callable[[str], None] = lambda doing: None,
    ) -> torch.nn.Module:
        """Build the model. :class:`megamult.models.common.decoder.Decoder` describes the arguments.

        Returns:
            A module. Its forward takes tokens and labels, both ids [batch, seq], and optionally weights of the samples,
            [batch]. It returns two scalars: the objective to minimize, and the cross entropy in nats per token, which
            has no gradient: a mean over all tokens or, with weights, the weighted sum of the samples' means.
        """


class ToHuggingFace(Protocol[_Sizes]):
    """Function that makes the config.json of an exported model."""

    def __call__(
        self,
        sizes: _Sizes,
        vocab_size: int,
        *,
        tied: bool,
        dtype: str,
        token_ids: Mapping[str, Any],
        embedding_factor: float = 1.0,
    ) -> dict[str, Any]:
        """Return the content of config.json.

        Args:
            sizes: sizes of the model.
            vocab_size: exact number of tokens, without padding.
            tied: whether the exported model has one tensor for embedding and head.
            dtype: dtype of the weights, a key of :data:`megamult.models.common.hugging_face.DTYPES`.
            token_ids: ids of the tokenizer's special tokens, by their keys in config.json such as `bos_token_id`.
            embedding_factor: factor of the embedding's output that a tied head does not have. It is 1 unless
                :attr:`Architecture.embedding_factor` is true.

        Raises:
            ValueError: no class of transformers can express the model.
        """


@dataclass(frozen=True)
class Architecture(Generic[Sizes]):
    """Everything that code outside `models/<name>/` needs from the architecture in that folder.

    `Sizes` is the class of the architecture's configuration, the section `model` of a run. Vocabulary sizes are exact,
    without padding.
    """

    name: str
    """Name of the folder."""
    hugging_face_classes: Mapping[str, str]
    """Names of the model's classes in transformers, by `model_type` in Hugging Face's config.json."""
    sizes: type[Sizes]
    """Class of the architecture's configuration."""
    model: Callable[[], ModelClass[Sizes]]
    """Function that imports and returns the model's class. Only this import needs Megatron, so conversion to and from
    Hugging Face works without Megatron."""
    flops_per_token: Callable[[Sizes, int], float]
    """Function (sizes, vocabulary size) -> FLOPs per token of forward and backward, without those of recomputation."""
    activation_memory: Callable[[Sizes, int, Pass, frozenset[Side]], Saved]
    """Function (sizes, vocabulary size, forward pass, sides on which the embedding has multipliers in the layers) ->
    bytes that the forward pass of a micro-batch keeps for backward on one rank."""
    weights: Callable[[Sizes, int], Iterator[Weight]]
    """Function (sizes, vocabulary size) -> all weights in Hugging Face's order; the last is the head, even if tied."""
    standard_deviations: Callable[[Sizes], Mapping[str, float]]
    """Function from sizes to the standard deviation of the initial weights of each role."""
    to_hugging_face: ToHuggingFace[Sizes]
    """Function that makes the config.json of an exported model."""
    from_hugging_face: Callable[[Mapping[str, Any]], Sizes]
    """Function from the content of a config.json to sizes. It raises ValueError if this architecture's code cannot
    compute the function that config.json describes."""
    forward_multipliers: Callable[[Mapping[str, Any]], Mapping[tuple[Role, Side], float]] = lambda config: {}
    """Function from the content of a config.json to constant factors of the model, as multipliers of effective weights
    by role and side. Those of vectors, such as ("final_norm", "row"), are factors of the vector."""
    details: Callable[[Sizes, int, torch.dtype], str] = lambda sizes, tensor, dtype: ""
    """Function (sizes, tensor-parallel size, dtype) -> what the start of a run says of the model beside its sizes."""
    embedding_factor: bool = False
    """Whether config.json can have a factor of the embedding's output that a tied head does not have."""
