"""Export of a checkpoint as a Hugging Face model, with multipliers merged into the weights.

The export streams one file of weights at a time. The output directory appears only when it is complete.
"""

from __future__ import annotations

import json
import re
import shutil
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import split_torch_state_dict_into_shards
from safetensors.torch import save_file
from torch import Tensor
from tqdm import tqdm

from megamult.checkpoint.saved import SavedCheckpoint
from megamult.data.hugging_face_tokenizer import special_ids
from megamult.data.tokenizer_files import SENTENCEPIECE, TOKENIZER_FOLDER, read_files
from megamult.effective.reading import EffectiveModel, EffectiveWeight
from megamult.huggingface import model_card as hf_card
from megamult.huggingface import tokenizer as hf_tokenizer
from megamult.huggingface.files import check_output
from megamult.models.architectures import architecture_of
from megamult.models.common.hugging_face import DTYPES, by_tensor, whole_shape
from megamult.runtime.partial import partial_folder

_RUN_DTYPES = {"fp32": "float32", "bf16": "bfloat16"}


@dataclass
class Exported:
    """Result of an export."""

    tensors: int
    """Number of tensors."""
    parameters: int
    """Number of elements in these tensors."""
    files: list[str]
    """Names of all files in the output directory."""
    dtype: str
    """Dtype of the weights, a key of :data:`megamult.models.common.hugging_face.DTYPES`."""
    notes: list[str] = field(default_factory=list)
    """Texts for the user about possibly unexpected properties of the result."""


def export(checkpoint: Path, output: Path, dtype: str = "auto", max_shard_size: str = "5GB") -> Exported:
    """Write a directory that `AutoModelForCausalLM` and `AutoTokenizer` of transformers can load.

    Memory holds one safetensors file at a time, and three fp32 copies of one tensor while its multipliers are merged.

    Args:
        checkpoint: directory of the checkpoint. All of its files are verified first.
        output: directory to write. It appears only when it is complete.
        dtype: dtype of the weights, a key of :data:`megamult.models.common.hugging_face.DTYPES`. "auto" means the dtype
            in which the run computed.
        max_shard_size: largest size of a safetensors file, such as "5GB". A larger tensor is the only one in its file.

    Raises:
        ValueError: there is no checkpoint, the checkpoint is damaged, the output exists and is not empty, an argument
            is wrong, no class of transformers can express the model, or a weight overflows in `dtype`.
    """
    check_output(output)
    if dtype not in ("auto", *DTYPES):
        raise ValueError(f"dtype is {dtype!r}: use auto, {', '.join(DTYPES)}")
    if not re.fullmatch(r"\d+(\.\d+)?[KMGT]B", max_shard_size):
        raise ValueError(f"max_shard_size is {max_shard_size!r}: give a number and KB, MB, GB or TB, such as 5GB")
    saved = SavedCheckpoint(checkpoint)
    saved.verify()
    model = EffectiveModel(saved)
    if dtype == "auto":
        dtype = _RUN_DTYPES[saved.info.config["train"]["dtype"]]
    architecture = architecture_of(model.sizes)
    factor = model.embedding_factor() if architecture.embedding_factor else None
    tied = model.sizes.tie_embeddings and (factor is not None or not model.head_differs())
    weights = model.weights(tied, embedding_factor=factor is not None)

    output.parent.mkdir(parents=True, exist_ok=True)
    with partial_folder(output) as partial:
        files, token_ids, notes = _tokenizer(saved, model.sizes.seq_length)
        if model.sizes.tie_embeddings and not tied:
            notes.append(
                "the embedding is tied to the head, but only the embedding has multipliers: lm_head.weight is written "
                "separately, with tie_word_embeddings false"
            )
        rounded = dict.fromkeys(each.weight.hugging_face.rpartition(".")[2] for each in weights if each.weight.fp32)
        if rounded and dtype != "float32":
            notes.append(
                f"the run reads {', '.join(rounded)} in fp32, and {dtype} rounds them, as transformers would at load: "
                "--dtype float32 keeps them exact"
            )
        # Before the tensors: no family of Hugging Face models may have this combination of options.
        described = architecture.to_hugging_face(
            model.sizes,
            saved.info.vocab_size,
            tied=tied,
            dtype=dtype,
            token_ids=token_ids,
            embedding_factor=1.0 if factor is None else factor,
        )
        shards, parameters = _write_tensors(weights, DTYPES[dtype], max_shard_size, partial)
        files["config.json"] = _json(described)
        files.setdefault("generation_config.json", _json(token_ids))
        files["README.md"] = hf_card.render(saved.info, described, parameters, bool(model.placement)).encode()
        for name, content in files.items():
            (partial / name).write_bytes(content)
        for name in shards:
            # safetensors makes files that only their owner can read.
            shutil.copymode(partial / "config.json", partial / name)
        partial.rename(output)
    return Exported(len(weights), parameters, [*shards, *files], dtype, notes)


def _write_tensors(
    weights: list[EffectiveWeight], dtype: torch.dtype, max_shard_size: str, directory: Path
) -> tuple[list[str], int]:
    """Write the safetensors files, and an index if there are several.

    Returns:
        Names of the files, and the number of parameters in them.
    """
    by_name = by_tensor(weights, lambda each: each.weight)
    shapes = {name: whole_shape([each.weight for each in parts]) for name, parts in by_name.items()}
    sizes = {name: torch.empty(shape, dtype=dtype, device="meta") for name, shape in shapes.items()}
    split = split_torch_state_dict_into_shards(sizes, max_shard_size=max_shard_size)
    total = sum(size.nbytes for size in sizes.values())
    # With disable=None, tqdm draws the bar only on a terminal, so it is not in log files.
    with tqdm(total=total, desc="exporting", unit="B", unit_scale=True, disable=None) as bar:
        for file, names in split.filename_to_tensors.items():
            shard = {}
            for name in names:
                parts = [_read(each, dtype) for each in by_name[name]]
                shard[name] = parts[0] if len(parts) == 1 else torch.cat(parts)
                bar.update(shard[name].nbytes)
            save_file(shard, directory / file, metadata={"format": "pt"})
            del shard  # before the next one is filled
    files = list(split.filename_to_tensors)
    if split.is_sharded:
        index = {"metadata": split.metadata, "weight_map": split.tensor_to_filename}
        files.append("model.safetensors.index.json")
        (directory / files[-1]).write_bytes(_json(index))
    return files, sum(size.numel() for size in sizes.values())


def _read(weight: EffectiveWeight, dtype: torch.dtype) -> Tensor:
    """Read a weight, merge the multipliers into it in fp32, and cast the result to `dtype`.

    Raises:
        ValueError: a finite value overflows in `dtype`.
    """
    effective = weight.exported()
    tensor = effective.to(dtype)
    if not tensor.isfinite().all() and effective.isfinite().all():
        raise ValueError(
            f"{weight.weight.hugging_face} holds {effective.abs().max().item():g}, and the largest value of {dtype} "
            f"is {torch.finfo(dtype).max:g}: export with --dtype {'bfloat16 or ' * (dtype == torch.float16)}float32"
        )
    return tensor.contiguous()


def _tokenizer(saved: SavedCheckpoint, max_length: int) -> tuple[dict[str, bytes], dict[str, Any], list[str]]:
    """Return the tokenizer's files by name, the ids of special tokens by config.json's keys, and notes for the user.

    Args:
        saved: the checkpoint.
        max_length: sequence length of the model.
    """
    folder, model = saved.path / TOKENIZER_FOLDER, saved.path / SENTENCEPIECE
    files: dict[str, bytes] = {}
    ids: dict[str, Any] = hf_tokenizer.special_ids(model) if model.is_file() else {}
    if folder.is_dir():
        files = read_files(folder)
        ids |= special_ids(files)
        generation = json.loads(files.get("generation_config.json", b"{}"))
        ids |= {key: generation[key] for key in ("bos_token_id", "eos_token_id", "pad_token_id") if key in generation}
    elif model.is_file():
        files = {SENTENCEPIECE: model.read_bytes()}
        try:
            files |= hf_tokenizer.convert(model, max_length)
        except ValueError as error:
            return files, ids, [f"the export has tokenizer.model and no tokenizer.json: {error}"]
    known, trained = ids.get("eos_token_id"), saved.info.eod
    if trained is not None and trained not in (known if isinstance(known, list) else [known]):
        ids["eos_token_id"] = trained  # generation stops where documents ended in training
    if any(name.startswith("tokenizer") for name in files):
        return files, ids, []
    return (
        files,
        ids,
        ["the checkpoint has no tokenizer, so the export has none: put tokenizer files into the output directory"],
    )


def _json(content: Any) -> bytes:
    return (json.dumps(content, indent=2, ensure_ascii=False) + "\n").encode()
