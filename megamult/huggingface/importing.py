"""Import of a Hugging Face model as a checkpoint from which a run can continue training.

The imported model computes the same function as the Hugging Face model, and all of its multipliers are 1. Weights are
streamed: memory holds one file of the checkpoint at a time.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import yaml
from safetensors import SafetensorError, safe_open
from torch import Tensor

from megamult.checkpoint.info import CheckpointInfo
from megamult.checkpoint.streamed import Streamed, blocks, write_streamed
from megamult.config import Config, ModelConfig
from megamult.data.sentencepiece_tokenizer import SentencePieceTokenizer
from megamult.data.tokenizer_files import SENTENCEPIECE, TOKENIZER_FOLDER, read_files, tokenizer_identities
from megamult.huggingface.files import check_output
from megamult.models.architectures import architecture_of, architecture_of_hugging_face
from megamult.models.common.hugging_face import Weight
from megamult.multipliers.config import MultipliersConfig
from megamult.parameters.roles import Placement, resolve
from megamult.train.config import TrainConfig

PLACEMENTS = ("all", "none", "symmetry_free", "scalar")

_FLOATS = ("F32", "BF16", "F16")
# End of the names of tensors to ignore. These tables of rotary frequencies are in files of old models, but config.json
# determines them.
_DERIVED = ".rotary_emb.inv_freq"


@dataclass
class Imported:
    """Result of an import."""

    parameters: int
    """Number of parameters, without multipliers."""
    multipliers: int
    """Number of multipliers."""
    dtype: str
    """Dtype in which a run will compute, as in `train.dtype`."""
    notes: list[str] = field(default_factory=list)
    """Texts for the user about possibly unexpected properties of the result."""


@dataclass(frozen=True)
class _Stored:
    """Tensor in a safetensors file of the model to import."""

    file: Any
    """Open file."""
    name: str
    shape: tuple[int, ...]
    dtype: str

    def rows(self, start: int, stop: int) -> Tensor:
        """Return rows [start, stop) in fp32."""
        values: Tensor = self.file.get_slice(self.name)[start:stop]
        return values.float()


def import_(source: Path, output: Path, placement: str = "all") -> Imported:
    """Write a checkpoint at step 0, without optimizer state. Memory holds one file of the checkpoint at a time.

    Args:
        source: directory of the model, with config.json and safetensors files.
        output: directory of the checkpoint. It appears only when it is complete.
        placement: placement of multipliers, one of :data:`PLACEMENTS`. All multipliers are 1. "none" means no
            multipliers.

    Raises:
        ValueError: megamult's model cannot compute what the source computes, a file is missing or damaged, the output
            exists and is not empty, or the placement is unknown.
    """
    check_output(output)
    if placement not in PLACEMENTS:
        raise ValueError(f"placement is {placement!r}: use one of {', '.join(PLACEMENTS)}")
    described = _read_json(source / "config.json")
    try:
        model: ModelConfig = architecture_of_hugging_face(described).from_hugging_face(described)
    except ValueError as error:
        raise ValueError(f"{source}/{error}") from None
    assert model.vocab_size is not None
    files, tokenizers, notes = _tokenizer(source, described)
    resolved: Placement = resolve(placement, model.roles) if placement != "none" else {}
    with contextlib.ExitStack() as stack:
        stored = _open(source, stack)
        matched = _match(source, stored, model, described)
        parameters = sum(math.prod(weight.shape) for weight, _ in matched)
        multipliers = {name: shape for weight, _ in matched for name, shape in weight.multipliers(resolved).items()}
        dtype = "bf16" if all(found.dtype == "BF16" for _, found in matched) else "fp32"
        info = CheckpointInfo(
            step=0,
            samples=0,
            config=_configuration(model, placement, dtype),
            vocab_size=model.vocab_size,
            drawn=False,
        )
        info.tokenizers = tokenizers
        files["config.yaml"] = _run_configuration(info.config, output, files)
        weights = [Streamed(weight.logical, found.shape, found.rows) for weight, found in matched]
        write_streamed(output, weights, multipliers, info, files, "importing")
    return Imported(parameters, sum(math.prod(shape) for shape in multipliers.values()), dtype, notes)


def _configuration(model: ModelConfig, placement: str, dtype: Any) -> dict[str, Any]:
    """Return a run's configuration with this model, as plain values; all other keys have their defaults."""
    multipliers = (
        MultipliersConfig(implementation="none") if placement == "none" else MultipliersConfig("layer", placement)
    )
    config = dataclasses.asdict(Config(model=model, multipliers=multipliers, train=TrainConfig(dtype=dtype)))
    plain: dict[str, Any] = json.loads(json.dumps(config))  # turns tuples into lists, as in a file
    return plain


def _run_configuration(config: dict[str, Any], output: Path, files: Mapping[str, bytes]) -> bytes:
    """Return the configuration file of a run that continues from the checkpoint. It lacks data.train, and keys that
    have their defaults.

    Args:
        config: the checkpoint's whole configuration.
        output: directory of the checkpoint.
        files: files of the checkpoint.
    """
    where = output.resolve()
    chosen: dict[str, Any] = {
        "model": config["model"],
        "multipliers": {key: config["multipliers"][key] for key in ("implementation", "placement")},
        "train": {"dtype": config["train"]["dtype"]},
        "checkpoint": {"start": str(where)},
    }
    if f"{TOKENIZER_FOLDER}/tokenizer.json" in files:
        chosen["data"] = {"tokenizer": str(where / TOKENIZER_FOLDER)}
    elif SENTENCEPIECE in files:
        chosen["data"] = {"tokenizer": str(where / SENTENCEPIECE)}
    head = "# A run that continues from this imported model: add --data.train PREFIX_train.\n"
    return (head + yaml.safe_dump(chosen, sort_keys=False)).encode()


def _open(source: Path, stack: contextlib.ExitStack) -> dict[str, _Stored]:
    """Open the model's safetensors files and return all tensors by name. The files stay open until `stack` closes them.

    Raises:
        ValueError: a file cannot be read, or two files have a tensor of the same name.
    """
    found: dict[str, _Stored] = {}
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
            found[name] = _Stored(file, name, tuple(part.get_shape()), part.get_dtype())
    return found


def _files(source: Path) -> list[Path]:
    index, single = source / "model.safetensors.index.json", source / "model.safetensors"
    if index.is_file():
        try:
            return [source / name for name in sorted(set(_read_json(index)["weight_map"].values()))]
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


def _match(
    source: Path, stored: dict[str, _Stored], model: ModelConfig, described: Mapping[str, Any]
) -> list[tuple[Weight, _Stored]]:
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
    matched: list[tuple[Weight, _Stored]] = []
    missing, wrong = [], []
    for weight in architecture.weights(model, model.vocab_size):
        name = weight.hugging_face
        head_is_tied = weight.role == "head" and model.tie_embeddings
        if name not in left:
            if not head_is_tied:
                missing.append(weight)
            continue
        found = left.pop(name)
        if found.shape != weight.shape:
            wrong.append(f"{name} has shape {found.shape}, and config.json asks for {weight.shape}")
        elif found.dtype not in _FLOATS:
            wrong.append(f"{name} is of dtype {found.dtype}: save the model in one of {', '.join(_FLOATS)}")
        elif head_is_tied and matched and matched[0][0].role == "embedding":
            _check_equal(source, found, matched[0][1])
        else:
            matched.append((weight, found))
    mistakes = []
    if missing:
        mistakes.append(
            f"has no tensor {_listed([f'{w.hugging_face} {w.shape}' for w in missing])}: config.json asks "
            f"for {'it' if len(missing) == 1 else 'them'}" + _about_tie(missing, described)
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


def _about_tie(missing: list[Weight], described: Mapping[str, Any]) -> str:
    """Return a remedy for a missing head: the model may be tied without saying so in config.json."""
    if not any(weight.role == "head" for weight in missing):
        return ""
    tied = described.get("tie_word_embeddings")
    remedy = (
        '"tie_word_embeddings": true is probably missing in config.json: add it'
        if tied is None
        else f'set "tie_word_embeddings" in config.json to true (it is {json.dumps(tied)})'
    )
    return f"; if the head is tied to the embedding, {remedy}"


def _check_equal(source: Path, head: _Stored, embedding: _Stored) -> None:
    """Check that the head in the files of a tied model equals the embedding.

    Raises:
        ValueError: the head differs from the embedding.
    """
    if any(not torch.equal(head.rows(*block), embedding.rows(*block)) for block in blocks(embedding.shape)):
        raise ValueError(
            f"{source}: tie_word_embeddings is true, but {head.name} differs from {embedding.name}: remove the "
            "head, or set tie_word_embeddings to false in config.json"
        )


def _tokenizer(source: Path, described: dict[str, Any]) -> tuple[dict[str, bytes], dict[str, str], list[str]]:
    """Return the tokenizer's files, what defines it, and notes on the tokenizer for the user.

    Args:
        source: directory of the model to import.
        described: content of its config.json.

    Returns:
        Unchanged contents of the files by their paths in the checkpoint; the files that define the token ids
        (:attr:`megamult.checkpoint.info.CheckpointInfo.tokenizers`); and the notes.
    """
    found = read_files(source)
    identities = tokenizer_identities(found)
    files = {f"{TOKENIZER_FOLDER}/{name}": content for name, content in found.items()}
    notes = []
    with contextlib.suppress(ValueError):
        # Other files of this name, such as those of tiktoken, are not in sentencepiece's format.
        SentencePieceTokenizer(source / SENTENCEPIECE, eod=0)  # any token will do to see that it can be read
        identities.pop(f"{TOKENIZER_FOLDER}/{SENTENCEPIECE}", None)
        identities = {SENTENCEPIECE: hashlib.sha256(found[SENTENCEPIECE]).hexdigest(), **identities}
        files[SENTENCEPIECE] = found[SENTENCEPIECE]
    readable = {SENTENCEPIECE, f"{TOKENIZER_FOLDER}/tokenizer.json"}
    if not identities:
        notes.append("the input has no tokenizer: the checkpoint has none either, nor will an export of the checkpoint")
    elif not readable & identities.keys():
        names = next(iter(identities)).replace(f"{TOKENIZER_FOLDER}/", "")
        notes.append(
            f"the tokenizer ({names}) is neither a tokenizer.json nor a sentencepiece model, and nothing else can be "
            "read: its files are kept for export; to prepare a corpus, load it once with "
            "transformers.AutoTokenizer.from_pretrained and write a tokenizer.json with save_pretrained"
        )
    # Store the ids of special tokens from config.json, because the checkpoint does not store config.json itself.
    ids = {key: described[key] for key in ("bos_token_id", "eos_token_id", "pad_token_id") if key in described}
    files.setdefault(f"{TOKENIZER_FOLDER}/generation_config.json", (json.dumps(ids, indent=2) + "\n").encode())
    return files, identities, notes


def _read_json(path: Path) -> dict[str, Any]:
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
