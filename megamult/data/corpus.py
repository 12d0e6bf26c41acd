"""A corpus made ready for training: documents encoded by several processes into indexed train and valid sets.

The output bytes depend on the input, the tokenizer and the split alone, never on the number of processes.
Everything is written in a hidden directory next to the output and renamed once all of it is complete and
checked.
"""

import contextlib
import os
import shutil
import tempfile
import warnings
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from megamult.data.documents import Document, read_documents
from megamult.data.encoding import encode_in_order
from megamult.data.indexed import unigram_entropy, validate_indexed
from megamult.data.split import ValidSplit
from megamult.data.splitmix import splitmix
from megamult.data.tokenizer import Tokenizer, train_tokenizer

# sentencepiece holds its training text in memory, and more than this hardly changes the merges.
_TOKENIZER_BYTES = 200_000_000
_SAMPLE_SEED = 1


@dataclass(frozen=True)
class CorpusSummary:
    """What was written: counts per set, UTF-8 bytes of text, entropy of the training tokens (nats/token)."""

    train_documents: int
    valid_documents: int
    train_tokens: int
    valid_tokens: int
    text_bytes: int
    vocab_size: int
    unigram_entropy: float

    @property
    def bytes_per_token(self) -> float:
        """UTF-8 bytes of text per token, end-of-document tokens included."""
        return self.text_bytes / (self.train_tokens + self.valid_tokens)


def prepare_corpus(
    inputs: Sequence[str | Path],
    output: str | Path,
    vocab_size: int | None = None,
    tokenizer: str | Path | None = None,
    valid_fraction: float = 0.01,
    json_key: str = "text",
    workers: int = 1,
) -> CorpusSummary:
    """Write OUTPUT_{train,valid}.{bin,idx} and OUTPUT.model; earlier ones are replaced at the very end.

    Either a tokenizer of `vocab_size` is trained on the training documents (a sample of them beyond 200 MB),
    or the given model file is used. Each document must decode to itself and is followed by the
    end-of-document token. With `valid_fraction` 0 there is no valid set, and an earlier one under the same
    name is removed.

    Raises:
        ValueError: bad input (file and line are named), options that do not fit, or text the tokenizer
            cannot keep.
    """
    if (vocab_size is None) == (tokenizer is None):
        raise ValueError(f"vocab_size is {vocab_size} and tokenizer is {tokenizer}; give exactly one of them")
    if workers < 1:
        raise ValueError(f"workers is {workers}; give at least 1 process")
    given = Tokenizer(tokenizer) if tokenizer is not None else None
    prefix = _checked_prefix(output)
    count, text_bytes = _survey(read_documents(inputs, json_key))
    split = ValidSplit.of(count, valid_fraction)

    prefix.parent.mkdir(parents=True, exist_ok=True)
    partial = Path(tempfile.mkdtemp(prefix=f".{prefix.name}.", suffix=".partial", dir=prefix.parent))
    try:
        model = partial / "model"
        if given is not None:
            shutil.copyfile(given.model_path, model)
            encoder = Path(given.model_path)  # so that a message names the user's file
        else:
            encoder = model
            assert vocab_size is not None
            texts = _tokenizer_texts(read_documents(inputs, json_key), split, text_bytes)
            train_tokenizer(texts, vocab_size, model)
        size = Tokenizer(model).vocab_size
        documents = _with_progress(read_documents(inputs, json_key), text_bytes)
        with contextlib.closing(encode_in_order(documents, encoder, workers)) as encoded:
            written = _write_sets(encoded, partial, split, size)
        if sum(written.values()) != count:
            raise ValueError(
                f"the inputs held {count} documents when they were checked and {sum(written.values())} when "
                "they were encoded; run again when nothing else writes to them"
            )
        tokens = {name: validate_indexed(partial / name, size).tokens for name in written}
        entropy = unigram_entropy(partial / "train", size)
        _publish(partial, prefix)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return CorpusSummary(
        train_documents=written["train"],
        valid_documents=written.get("valid", 0),
        train_tokens=tokens["train"],
        valid_tokens=tokens.get("valid", 0),
        text_bytes=text_bytes,
        vocab_size=size,
        unigram_entropy=entropy,
    )


def _outputs(prefix: Path) -> dict[str, Path]:
    names = [f"{part}.{kind}" for part in ("train", "valid") for kind in ("bin", "idx")]
    return {name: prefix.with_name(f"{prefix.name}_{name}") for name in names} | {
        "model": prefix.with_name(f"{prefix.name}.model")
    }


def _checked_prefix(output: str | Path) -> Path:
    if str(output).endswith(("/", os.sep)) or Path(output).name in ("", ".", ".."):
        raise ValueError(f"output is {str(output)!r}; give a prefix such as data/corpus, not a directory")
    prefix = Path(output)
    for file in _outputs(prefix).values():
        if file.is_dir():
            raise ValueError(f"output file {file} is a directory; choose another prefix or move it")
    existing = next(parent for parent in prefix.absolute().parents if parent.exists())
    if not existing.is_dir() or not os.access(existing, os.W_OK):
        raise ValueError(f"cannot write under {existing}; choose an output prefix in a directory that you may write to")
    return prefix


def _survey(documents: Iterable[Document]) -> tuple[int, int]:
    count = size = 0
    for document in documents:
        count += 1
        size += len(document.text.encode())
    return count, size


def _tokenizer_texts(documents: Iterable[Document], split: ValidSplit, text_bytes: int) -> Iterator[str]:
    keep_below = 2**64 * _TOKENIZER_BYTES // max(text_bytes, 1)
    for number, document in enumerate(documents):
        if not split.is_valid(number) and splitmix(_SAMPLE_SEED, number) < keep_below:
            yield document.text


def _with_progress(documents: Iterable[Document], text_bytes: int) -> Iterator[Document]:
    # disable=None: a bar on a terminal only, so that logs and error messages stay clean.
    with tqdm(total=text_bytes, desc="encoding", unit="B", unit_scale=True, disable=None) as bar:
        for document in documents:
            yield document
            bar.update(len(document.text.encode()))


def _write_sets(encoded: Iterable[np.ndarray], partial: Path, split: ValidSplit, vocab_size: int) -> dict[str, int]:
    """Write each document's ids to its set; return the number of documents per set."""
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
        if (partial / name).exists():
            with open(partial / name, "rb") as stream:
                os.fsync(stream.fileno())
    for name, final in outputs.items():
        if (partial / name).exists():
            os.replace(partial / name, final)
        else:
            final.unlink(missing_ok=True)
