"""Tensors in the safetensors files of a Hugging Face model, and the weights of our model that they are."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from megamult.checkpoint.streamed import blocks
from megamult.models.architectures import architecture_of
from megamult.models.common.config import DecoderConfig
from megamult.models.common.hugging_face import Weight, by_tensor, whole_shape

_FLOATS = ("F32", "BF16", "F16")
# End of the names of tensors to ignore. These tables of rotary frequencies are in files of old models, but config.json
# determines them.
_DERIVED = ".rotary_emb.inv_freq"


@dataclass(frozen=True)
class Stored:
    """Tensor in a safetensors file of the model to import, or consecutive rows of one."""

    file: Any
    """Open file."""
    name: str
    shape: tuple[int, ...]
    dtype: str
    first: int = 0
    """First of these rows in the file's tensor."""

    def rows(self, start: int, stop: int, factor: float = 1.0) -> Tensor:
        """Return rows [start, stop) of these rows in fp32, times a factor."""
        values: Tensor = self.file.get_slice(self.name)[self.first + start : self.first + stop]
        return values.float() if factor == 1 else values.float() * factor


def open_tensors(source: Path, stack: contextlib.ExitStack) -> dict[str, Stored]:
    """Open the model's safetensors files and return all tensors by name. The files stay open until `stack` closes them.

    Raises:
        ValueError: a file cannot be read, or two files have a tensor of the same name.
    """
    found: dict[str, Stored] = {}
    for path in _files(source):
        try:
            file = stack.enter_context(safe_open(path, framework="pt"))
        except (SafetensorError, OSError) as error:
            raise ValueError(f"{path} cannot be read ({error}): it is missing or damaged, so fetch it again") from None
        for name in file.keys():  # noqa: SIM118 (it is no dict)
            if name.endswith(_DERIVED):
                continue
            if name in found:
                raise ValueError(f"{path} holds {name}, and so does another file of the model: keep it in only one")
            part = file.get_slice(name)
            found[name] = Stored(file, name, tuple(part.get_shape()), part.get_dtype())
    return found


def _files(source: Path) -> list[Path]:
    index, single = source / "model.safetensors.index.json", source / "model.safetensors"
    if index.is_file():
        try:
            return [source / name for name in sorted(set(read_json(index)["weight_map"].values()))]
        except (KeyError, AttributeError, TypeError):
            raise ValueError(f"{index} has no weight_map: the index is damaged, so fetch it again") from None
    if single.is_file():
        return [single]
    pickled = sorted(path.name for path in source.glob("pytorch_model*.bin"))
    if pickled:
        raise ValueError(
            f"{source} holds {pickled[0]}, a pickle, which can run code when it is read: convert it to safetensors "
            "(load it with transformers on a machine where that is safe, and use save_pretrained)"
        )
    raise ValueError(f"{source} holds neither model.safetensors nor {index.name}: give a directory with one of them")


_SHOWN = 5
"""Number of mistakes of one kind that a message shows."""


def match(
    source: Path, stored: dict[str, Stored], model: DecoderConfig, described: Mapping[str, Any]
) -> list[tuple[Weight, Stored]]:
    """Return pairs of a weight and its tensor in the model's files. A tied head is checked, and not returned.

    Args:
        source: directory of the model to import.
        stored: tensors in its files, by name.
        model: sizes of the model.
        described: content of its config.json.

    Raises:
        ValueError: tensors are missing or unknown, have another shape than config.json asks for, or are not F32, BF16
            or F16; or a tied head differs from the embedding. The message lists the mistakes of all tensors.
    """
    assert model.vocab_size is not None
    architecture = architecture_of(model)
    left = dict(stored)
    matched: list[tuple[Weight, Stored]] = []
    missing, wrong = [], []
    of_model = architecture.weights(model, model.vocab_size)
    for name, weights in by_tensor(of_model, lambda each: each).items():
        head_is_tied = weights[0].role == "head" and model.tie_embeddings
        shape = whole_shape(weights)
        if name not in left:
            if not head_is_tied:
                missing.append((name, shape))
            continue
        found = left.pop(name)
        if found.shape != shape:
            wrong.append(f"{name} has shape {found.shape}, and config.json asks for {shape}")
        elif found.dtype not in _FLOATS:
            wrong.append(f"{name} is of dtype {found.dtype}: save the model in one of {', '.join(_FLOATS)}")
        elif head_is_tied and matched and matched[0][0].role == "embedding":
            _check_equal(source, found, matched[0][1])
        else:
            first = 0
            for weight in weights:
                matched.append((weight, replace(found, shape=weight.shape, first=first)))
                first += weight.shape[0]
    mistakes = []
    if missing:
        mistakes.append(
            f"has no tensor {_listed([f'{name} {shape}' for name, shape in missing])}: config.json asks "
            f"for {'it' if len(missing) == 1 else 'them'}" + _about_tie([name for name, _ in missing], described)
        )
    if wrong:
        mistakes.append(_listed(wrong))
    if left:
        kind = architecture.hugging_face_classes[described["model_type"]]
        mistakes.append(
            f"holds {_listed([f'{name} {left[name].shape}' for name in sorted(left)])}, which a {kind} with this "
            f"config.json does not have (number of such tensors: {len(left)}): if config.json lacks a field that asks "
            "for them, such as attention_bias, correct it; otherwise this model cannot be imported"
        )
    if mistakes:
        raise ValueError(f"{source} {'; '.join(mistakes)}")
    return matched


def _listed(texts: list[str]) -> str:
    more = len(texts) - _SHOWN
    return ", ".join(texts[:_SHOWN]) + (f" and {more} more" if more > 0 else "")


def _about_tie(missing: list[str], described: Mapping[str, Any]) -> str:
    """Return a remedy for a missing head: the model may be tied without saying so in config.json."""
    if "lm_head.weight" not in missing:
        return ""
    tied = described.get("tie_word_embeddings")
    remedy = (
        '"tie_word_embeddings": true is probably missing in config.json: add it'
        if tied is None
        else f'set "tie_word_embeddings" in config.json to true (it is {json.dumps(tied)})'
    )
    return f"; if the head is tied to the embedding, {remedy}"


def _check_equal(source: Path, head: Stored, embedding: Stored) -> None:
    """Check that the head in the files of a tied model equals the embedding.

    Raises:
        ValueError: the head differs from the embedding.
    """
    if any(not torch.equal(head.rows(*block), embedding.rows(*block)) for block in blocks(embedding.shape)):
        raise ValueError(
            f"{source}: tie_word_embeddings is true, but {head.name} differs from {embedding.name}: remove the "
            "head, or set tie_word_embeddings to false in config.json"
        )


def read_json(path: Path) -> dict[str, Any]:
    """Return the JSON object that a file of the model holds.

    Raises:
        ValueError: the file cannot be read, or holds none.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ValueError(
            f"{path} cannot be read ({error.strerror}): give the directory of a Hugging Face model"
        ) from None
    except ValueError as error:
        raise ValueError(f"{path} is no JSON file ({error}): fetch it again") from None
    if not isinstance(content, dict):
        raise ValueError(f"{path} holds no JSON object: fetch it again")
    return content
