"""Import of a Hugging Face model as a checkpoint from which a run can continue training.

The imported model computes the same function as the Hugging Face model. Its multipliers are 1, unless constant factors
of the Hugging Face model become their initial values (:mod:`megamult.huggingface.forward_multipliers`). Weights are
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
from functools import partial
from pathlib import Path
from typing import Any

import yaml

from megamult.checkpoint.info import CheckpointInfo
from megamult.checkpoint.streamed import Streamed, write_streamed
from megamult.config import Config
from megamult.data.sentencepiece_tokenizer import SentencePieceTokenizer
from megamult.data.tokenizer_files import SENTENCEPIECE, TOKENIZER_FOLDER, read_files, tokenizer_identities
from megamult.huggingface.files import check_output
from megamult.huggingface.forward_multipliers import ForwardMultipliers, assign
from megamult.huggingface.stored import match, open_tensors, read_json
from megamult.models.architectures import architecture_of_hugging_face
from megamult.models.common.config import DecoderConfig
from megamult.multipliers.config import MultipliersConfig
from megamult.parameters.roles import Placement, resolve
from megamult.train.config import TrainConfig

PLACEMENTS = ("all", "none", "symmetry_free", "scalar")


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


def import_(
    source: Path, output: Path, placement: str = "all", forward_multipliers: ForwardMultipliers = "merge"
) -> Imported:
    """Write a checkpoint at step 0, without optimizer state. Memory holds one file of the checkpoint at a time.

    Args:
        source: directory of the model, with config.json and safetensors files.
        output: directory of the checkpoint. It appears only when it is complete.
        placement: placement of multipliers, one of :data:`PLACEMENTS`. "none" means no multipliers.
        forward_multipliers: where constant factors of the model go (:class:`ForwardMultipliers`). All multipliers that
            get no factor are 1.

    Raises:
        ValueError: megamult's model cannot compute what the source computes, a file is missing or damaged, the output
            exists and is not empty, or the placement is unknown.
    """
    check_output(output)
    if placement not in PLACEMENTS:
        raise ValueError(f"placement is {placement!r}: use one of {', '.join(PLACEMENTS)}")
    described = read_json(source / "config.json")
    try:
        architecture = architecture_of_hugging_face(described)
        model: DecoderConfig = architecture.from_hugging_face(described)
    except ValueError as error:
        raise ValueError(f"{source}/{error}") from None
    assert model.vocab_size is not None
    files, tokenizers, notes = _tokenizer(source, described)
    resolved: Placement = resolve(placement, model.roles) if placement != "none" else {}
    factors = assign(
        architecture.forward_multipliers(described), forward_multipliers, resolved, bool(model.tie_embeddings)
    )
    with contextlib.ExitStack() as stack:
        stored = open_tensors(source, stack)
        matched = match(source, stored, model, described)
        parameters = sum(math.prod(weight.shape) for weight, _ in matched)
        multipliers = {name: shape for weight, _ in matched for name, shape in weight.multipliers(resolved).items()}
        initial = {
            weight.multiplier(side)[0]: factors.multipliers[weight.role, side]
            for weight, _ in matched
            for side in resolved.get(weight.role, ())
            if (weight.role, side) in factors.multipliers
        }
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
        weights = [
            Streamed(weight.logical, found.shape, partial(found.rows, factor=factors.weights.get(weight.role, 1.0)))
            for weight, found in matched
        ]
        write_streamed(output, weights, multipliers, info, files, "importing", initial)
    return Imported(parameters, sum(math.prod(shape) for shape in multipliers.values()), dtype, notes)


def _configuration(model: DecoderConfig, placement: str, dtype: Any) -> dict[str, Any]:
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
