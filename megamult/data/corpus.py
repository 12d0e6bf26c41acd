"""Preparation of a corpus for training: several processes encode documents into indexed train and valid sets.

The output bytes depend only on the input, the tokenizer and the split, never on the number of processes. All files are
written into a hidden directory next to the output, and are renamed once all of them are complete and checked.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import warnings
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from megamult.data.documents import Document, read_documents
from megamult.data.encoding import Encoded, encode_in_order
from megamult.data.indexed import unigram_entropy, validate_indexed
from megamult.data.sentencepiece_tokenizer import train_tokenizer
from megamult.data.split import ValidSplit
from megamult.data.splitmix import splitmix
from megamult.data.stamp import SUFFIX, Stamp
from megamult.data.tokenizer_files import SENTENCEPIECE, TOKENIZER_FOLDER
from megamult.data.tokenizer_kinds import open_tokenizer
from megamult.runtime.partial import partial_folder

# Limit of the text that trains a tokenizer. sentencepiece holds it in memory, and more text hardly changes the merges.
_TOKENIZER_BYTES = 200_000_000
_SAMPLE_SEED = 1
# Names in the partial folder: the sentencepiece model, or the directory of tokenizer files in Hugging Face's format.
_MODEL, _FOLDER = "model", "tokenizer"


@dataclass(frozen=True)
class CorpusSummary:
    """Summary of a corpus: counts per set, UTF-8 bytes of text, entropy of the training tokens in nats per token."""

    train_documents: int
    valid_documents: int
    train_tokens: int
    valid_tokens: int
    text_bytes: int
    vocab_size: int
    unigram_entropy: float
    tokenizer: Path
    """The tokenizer that was written, which is the value of data.tokenizer for a run."""
    changed: int = 0
    """Number of documents whose token ids decode to another text."""
    first_change: str | None = None
    """Description of the first change."""

    @property
    def bytes_per_token(self) -> float:
        """UTF-8 bytes of text per token. End-of-document tokens count as tokens."""
        return self.text_bytes / (self.train_tokens + self.valid_tokens)


def prepare_corpus(
    inputs: Sequence[str | Path],
    output: str | Path,
    vocab_size: int | None = None,
    tokenizer: str | Path | None = None,
    valid_fraction: float = 0.01,
    json_key: str = "text",
    workers: int = 1,
    eod: int | str | None = None,
) -> CorpusSummary:
    """Write OUTPUT_{train,valid}.{bin,idx,stamp.json} and the tokenizer. Earlier files are replaced at the very end.

    If `vocab_size` is given, a sentencepiece model of this size is trained on the training documents (on a sample of
    them if the text exceeds 200 MB). If `tokenizer` is given, this one is used
    (:func:`megamult.data.tokenizer_kinds.open_tokenizer`). The tokenizer is written to OUTPUT.model if it is a
    sentencepiece model, and its files to the directory OUTPUT_tokenizer if it is in Hugging Face's format. The
    end-of-document token, `eod` or the one that the tokenizer names, is written after each document. If
    `valid_fraction` is 0, there is no valid set, and an earlier valid set under the same name is removed. Unfinished
    files that a killed call left under the same name are removed first.

    Raises:
        ValueError: an input is bad (the message names the first mistake in each file and its line), or an option is
            wrong.
    """
    if (vocab_size is None) == (tokenizer is None):
        raise ValueError(f"vocab_size is {vocab_size} and tokenizer is {tokenizer}: give exactly one of them")
    if workers < 1:
        raise ValueError(f"workers is {workers}: give at least 1 process")
    given = open_tokenizer(tokenizer, eod) if tokenizer is not None else None
    prefix = _checked_prefix(output, inputs)
    count, text_bytes = _survey(inputs, json_key)
    split = ValidSplit.of(count, valid_fraction)

    prefix.parent.mkdir(parents=True, exist_ok=True)
    with partial_folder(prefix) as partial:
        model = partial / _MODEL
        if given is None:
            assert vocab_size is not None
            texts = _tokenizer_texts(read_documents(inputs, json_key), split, text_bytes)
            train_tokenizer(texts, vocab_size, model)
        used = given or open_tokenizer(model, eod)
        size = used.vocab_size
        for name, content in used.files().items():
            file = model if name == SENTENCEPIECE else partial / _FOLDER / name.removeprefix(f"{TOKENIZER_FOLDER}/")
            file.parent.mkdir(exist_ok=True)
            file.write_bytes(content)
        documents = _with_progress(read_documents(inputs, json_key), text_bytes)
        with contextlib.closing(encode_in_order(documents, used.path, eod, workers)) as encoded:
            changes: list[str] = []
            written = _write_sets(_noting(encoded, changes), partial, split, size)
        if sum(written.values()) != count:
            raise ValueError(
                f"the inputs held {count} documents when they were checked and {sum(written.values())} when "
                "they were encoded: run again when nothing else writes to them"
            )
        tokens = {}
        for name in written:
            files = validate_indexed(partial / name, size)
            tokens[name] = files.tokens
            Stamp.of(files, used).write(partial / f"{name}{SUFFIX}")
        entropy = unigram_entropy(partial / "train", size)
        folder = (partial / _FOLDER).is_dir()
        _publish(partial, prefix)
    return CorpusSummary(
        train_documents=written["train"],
        valid_documents=written.get("valid", 0),
        train_tokens=tokens["train"],
        valid_tokens=tokens.get("valid", 0),
        text_bytes=text_bytes,
        vocab_size=size,
        unigram_entropy=entropy,
        tokenizer=_outputs(prefix)[_FOLDER if folder else _MODEL],
        changed=len(changes),
        first_change=changes[0] if changes else None,
    )


def _noting(encoded: Iterable[Encoded], changes: list[str]) -> Iterator[np.ndarray]:
    """Yield the ids of each document, and append a description of each change of a document's text to `changes`."""
    for each in encoded:
        if each.changed is not None:
            changes.append(each.changed if not changes else "")
        yield each.ids


def _outputs(prefix: Path) -> dict[str, Path]:
    """Map the name of each file in the partial folder to the path that the finished file gets.

    Stamps come last, because they vouch for the other files.
    """
    names = [f"{part}{kind}" for kind in (".bin", ".idx", SUFFIX) for part in ("train", "valid")]
    tokenizer = {_MODEL: f"{prefix.name}.model", _FOLDER: f"{prefix.name}_tokenizer"}
    return {name: prefix.with_name(final) for name, final in tokenizer.items()} | {
        name: prefix.with_name(f"{prefix.name}_{name}") for name in names
    }


def _checked_prefix(output: str | Path, inputs: Sequence[str | Path]) -> Path:
    if str(output).endswith(("/", os.sep)) or Path(output).name in ("", ".", ".."):
        raise ValueError(f"output is {str(output)!r}: give a prefix such as data/corpus, not a directory")
    prefix = Path(output)
    for name, file in _outputs(prefix).items():
        if file.is_dir() and name != _FOLDER:
            raise ValueError(f"output file {file} is a directory: choose another prefix or move it")
        for path in inputs:
            if file.exists() and Path(path).exists() and file.samefile(path):
                raise ValueError(f"input {path} is also the output file {file}: choose another prefix")
    existing = next(parent for parent in prefix.absolute().parents if parent.exists())
    if not existing.is_dir() or not os.access(existing, os.W_OK):
        raise ValueError(f"cannot write under {existing}: choose an output prefix in a directory that you may write to")
    return prefix


def _survey(inputs: Sequence[str | Path], json_key: str) -> tuple[int, int]:
    """Count the documents and UTF-8 bytes of all inputs. An error names every bad input, not only the first."""
    count = size = 0
    mistakes: list[str] = []
    for path in inputs:
        try:
            for document in read_documents([path], json_key):
                count += 1
                size += len(document.text.encode())
        except ValueError as error:
            mistakes.append(str(error))
    if len(mistakes) > 1:
        raise ValueError(f"{len(mistakes)} of {len(inputs)} inputs cannot be read: {'; '.join(mistakes)}")
    if mistakes:
        raise ValueError(mistakes[0])
    return count, size


def _tokenizer_texts(documents: Iterable[Document], split: ValidSplit, text_bytes: int) -> Iterator[str]:
    keep_below = 2**64 * _TOKENIZER_BYTES // max(text_bytes, 1)
    for number, document in enumerate(documents):
        if not split.is_valid(number) and splitmix(_SAMPLE_SEED, number) < keep_below:
            yield document.text


def _with_progress(documents: Iterable[Document], text_bytes: int) -> Iterator[Document]:
    # disable=None shows the bar only on a terminal, so that logs and error messages stay clean.
    with tqdm(total=text_bytes, desc="encoding", unit="B", unit_scale=True, disable=None) as bar:
        for document in documents:
            yield document
            bar.update(len(document.text.encode()))


def _write_sets(encoded: Iterable[np.ndarray], partial: Path, split: ValidSplit, vocab_size: int) -> dict[str, int]:
    """Write the ids of each document to the train or the valid set; return the number of documents per set."""
    with warnings.catch_warnings():
        # Megatron announces on import that Transformer Engine and Apex are missing.
        warnings.simplefilter("ignore")
        from megatron.core.datasets.indexed_dataset import DType, IndexedDatasetBuilder

    dtype = DType.optimal_dtype(vocab_size)
    builders: dict[str, Any] = {
        name: IndexedDatasetBuilder(str(partial / f"{name}.bin"), dtype=dtype)
        for name in (["train", "valid"] if split.valid else ["train"])
    }
    written = dict.fromkeys(builders, 0)
    try:
        for number, ids in enumerate(encoded):
            name = "valid" if split.is_valid(number) else "train"
            builders[name].add_document(ids, [len(ids)])
            written[name] += 1
        for name, builder in builders.items():
            builder.finalize(str(partial / f"{name}.idx"))
    finally:
        for builder in builders.values():
            builder.data_file.close()
    return written


def _publish(partial: Path, prefix: Path) -> None:
    outputs = _outputs(prefix)
    for name in outputs:
        if name.endswith(SUFFIX):  # an old stamp must not vouch for new files
            outputs[name].unlink(missing_ok=True)
        for file in [partial / name, *(partial / name).glob("*")]:
            if file.is_file():
                with open(file, "rb") as stream:
                    os.fsync(stream.fileno())
    for name, final in outputs.items():
        if final.is_dir():  # a directory cannot be replaced by a rename
            shutil.rmtree(final)
        if (partial / name).exists():
            os.replace(partial / name, final)
        else:
            final.unlink(missing_ok=True)
