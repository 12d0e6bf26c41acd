"""Preparation of a corpus for training: several processes encode documents into indexed train and valid sets.

The output bytes depend only on the input, the tokenizer and the split, never on the number of processes. All files are
written into a hidden directory next to the output, and are renamed once all of them are complete and checked.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from tqdm import tqdm

from megamult.data.defects import Kind, Report
from megamult.data.documents import Document, read_documents
from megamult.data.encoding import Encoded, encode_in_order
from megamult.data.indexed import unigram_entropy, validate_indexed
from megamult.data.inputs import expand
from megamult.data.sentencepiece_tokenizer import train_tokenizer
from megamult.data.split import ValidSplit
from megamult.data.splitmix import splitmix
from megamult.data.stamp import SUFFIX, Stamp
from megamult.data.tokenizer_files import SENTENCEPIECE, TOKENIZER_FILES, TOKENIZER_FOLDER
from megamult.data.tokenizer_kinds import open_tokenizer
from megamult.data.writing import IndexedWriter
from megamult.runtime.console import uninterrupted
from megamult.runtime.partial import partial_folder

# Limit of the text that trains a tokenizer. sentencepiece holds it in memory, and more text hardly changes the merges.
_TOKENIZER_BYTES = 200_000_000
_SAMPLE_SEED = 1
# Names in the partial folder: the sentencepiece model, or the directory of tokenizer files in Hugging Face's format.
_MODEL, _FOLDER = "model", "tokenizer"


@dataclass(frozen=True)
class CorpusSummary:
    """Summary of a corpus: counts per set, UTF-8 bytes of text, entropy of the training tokens in nats per token.

    `report` has what was left out of the inputs, and what was changed in their text.
    """

    train_documents: int
    valid_documents: int
    train_tokens: int
    valid_tokens: int
    text_bytes: int
    vocab_size: int
    unigram_entropy: float
    report: Report
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
    on_error: str = "fail",
    eod: int | str | None = None,
) -> CorpusSummary:
    """Write OUTPUT_{train,valid}.{bin,idx,stamp.json} and the tokenizer. Earlier files are replaced at the very end.

    `inputs` are files, folders and patterns (see `megamult.data.inputs.expand`) of text, JSON lines and Parquet (see
    `megamult.data.documents.read_documents`). Blank lines of JSON lines, documents without text and files without text
    are skipped and counted. A document that cannot be read is an error; if `on_error` is `skip`, it is dropped and
    counted.

    If `vocab_size` is given, a sentencepiece model of this size is trained on the training documents (on a sample of
    them if the text exceeds 200 MB). If `tokenizer` is given, this one is used
    (:func:`megamult.data.tokenizer_kinds.open_tokenizer`). The tokenizer is written to OUTPUT.model if it is a
    sentencepiece model, and its files to the directory OUTPUT_tokenizer if it is in Hugging Face's format. The
    end-of-document token, `eod` or the one that the tokenizer names, is written after each document. If
    `valid_fraction` is 0, there is no valid set, and an earlier valid set under the same name is removed. Unfinished
    files that a killed call left under the same name are removed when writing begins.

    Raises:
        ValueError: inputs are bad (the message has the count and the first places of each kind of mistake), or an
            option is wrong.
    """
    if (vocab_size is None) == (tokenizer is None):
        raise ValueError(f"vocab_size is {vocab_size} and tokenizer is {tokenizer}: give exactly one of them")
    if workers < 1:
        raise ValueError(f"workers is {workers}: give at least 1 process")
    if on_error not in ("fail", "skip"):
        raise ValueError(f"on_error is {on_error!r}: give 'fail' or 'skip'")
    given = open_tokenizer(tokenizer, eod) if tokenizer is not None else None
    prefix = _checked_prefix(output, inputs)
    report = Report()
    files, count, text_bytes = _survey(expand(inputs, _outputs(prefix).values(), report), json_key, report)
    report.refuse(skip_defects=on_error == "skip")
    if not count:
        found = "; ".join(report.lines())
        raise ValueError(f"the inputs hold no document to read ({found}): give files with text")
    split = ValidSplit.of(count, valid_fraction)

    prefix.parent.mkdir(parents=True, exist_ok=True)
    with _named_in_errors(prefix), partial_folder(prefix) as partial:
        model = partial / _MODEL
        if given is None:
            assert vocab_size is not None
            texts = _tokenizer_texts(read_documents(files, json_key, Report()), split, text_bytes)
            train_tokenizer(texts, vocab_size, model)
        used = given or open_tokenizer(model, eod)
        size = used.vocab_size
        for name, content in used.files().items():
            file = model if name == SENTENCEPIECE else partial / _FOLDER / name.removeprefix(f"{TOKENIZER_FOLDER}/")
            file.parent.mkdir(exist_ok=True)
            file.write_bytes(content)
        documents = _with_progress(read_documents(files, json_key, Report()), text_bytes)
        changes = _Changes()
        with contextlib.closing(encode_in_order(documents, used.path, eod, workers)) as encoded:
            written = _write_sets(_noting(encoded, changes), partial, split, size)
        if sum(written.values()) != count:
            raise ValueError(
                f"the inputs held {count} documents when they were checked and {sum(written.values())} when "
                "they were encoded: run again when nothing else writes to them"
            )
        tokens = {}
        for name in written:
            indexed = validate_indexed(partial / name, size)
            tokens[name] = indexed.tokens
            Stamp.of(indexed, used).write(partial / f"{name}{SUFFIX}")
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
        report=report,
        tokenizer=_outputs(prefix)[_FOLDER if folder else _MODEL],
        changed=changes.documents,
        first_change=changes.first,
    )


@dataclass
class _Changes:
    documents: int = 0
    first: str | None = None


def _noting(encoded: Iterable[Encoded], changes: _Changes) -> Iterator[Encoded]:
    """Yield all of `encoded`, and note in `changes` which documents' text changes."""
    changed: str | None = None
    for each in encoded:
        changed = changed or each.changed
        if each.last:
            changes.documents += changed is not None
            changes.first = changes.first or changed
            changed = None
        yield each


@contextlib.contextmanager
def _named_in_errors(prefix: Path) -> Iterator[None]:
    """Name the output in an OSError that names no file, such as that of a full disk."""
    try:
        yield
    except OSError as error:
        error.filename = error.filename or str(prefix)
        raise


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
    _check_folder(_outputs(prefix)[_FOLDER])
    existing = next(parent for parent in prefix.absolute().parents if parent.exists())
    if not existing.is_dir() or not os.access(existing, os.W_OK):
        raise ValueError(f"cannot write under {existing}: choose an output prefix in a directory that you may write to")
    return prefix


def _check_folder(folder: Path) -> None:
    """Check that the directory for the tokenizer's files does not exist, or holds only files of a tokenizer.

    Raises:
        ValueError: it holds other files, or is a symbolic link.
    """
    if folder.is_symlink():
        raise ValueError(f"output directory {folder} is a symbolic link: choose another prefix, or remove the link")
    others = [path.name for path in folder.iterdir() if path.name not in TOKENIZER_FILES] if folder.is_dir() else []
    if others:
        raise ValueError(
            f"output directory {folder} holds {', '.join(sorted(others)[:8])}, which are no files of a tokenizer: "
            "choose another prefix, or move the directory"
        )


def _survey(files: Sequence[str], json_key: str, report: Report) -> tuple[list[str], int, int]:
    """Return the files that are not damaged, and the numbers of their documents and UTF-8 bytes.

    What is skipped in any file, damaged or not, is added to `report`.
    """
    whole, count, size = [], 0, 0
    for file in files:
        damaged = report.count(Kind.DAMAGED)
        sizes = [0, 0]
        for document in read_documents([file], json_key, report):
            sizes[0] += 1
            sizes[1] += document.size
        if report.count(Kind.DAMAGED) == damaged:
            whole.append(file)
            count, size = count + sizes[0], size + sizes[1]
    return whole, count, size


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
            bar.update(document.size)


def _write_sets(encoded: Iterable[Encoded], partial: Path, split: ValidSplit, vocab_size: int) -> dict[str, int]:
    """Write the ids of each document to the train or the valid set; return the number of documents per set."""
    names = ["train", "valid"] if split.valid else ["train"]
    with contextlib.ExitStack() as stack:
        writers = {name: stack.enter_context(IndexedWriter(partial / name, vocab_size)) for name in names}
        number = 0
        for each in encoded:
            writers["valid" if split.is_valid(number) else "train"].add(each.ids, each.last)
            number += each.last
    return {name: writer.documents for name, writer in writers.items()}


def _publish(partial: Path, prefix: Path) -> None:
    outputs = _outputs(prefix)
    for file in partial.rglob("*"):
        if file.is_file():
            with open(file, "rb") as stream:
                os.fsync(stream.fileno())
    with uninterrupted():
        for name, final in outputs.items():
            if name.endswith(SUFFIX):  # an old stamp must not vouch for new files
                final.unlink(missing_ok=True)
        for name, final in outputs.items():
            if final.is_dir():  # a directory cannot be replaced by a rename
                for earlier in TOKENIZER_FILES:
                    (final / earlier).unlink(missing_ok=True)
                final.rmdir()
            if (partial / name).exists():
                os.replace(partial / name, final)
            else:
                final.unlink(missing_ok=True)
