"""Choice of the class for a tokenizer that a user gives: sentencepiece's format, or Hugging Face's."""

from __future__ import annotations

from pathlib import Path

from megamult.data.hugging_face_tokenizer import TOKENIZER_JSON, HuggingFaceTokenizer
from megamult.data.sentencepiece_tokenizer import SentencePieceTokenizer
from megamult.data.tokenizer import Tokenizer
from megamult.data.tokenizer_files import SENTENCEPIECE


def open_tokenizer(path: str | Path, eod: int | str | None = None) -> Tokenizer:
    """Open a tokenizer by its content.

    Args:
        path: a sentencepiece model, a tokenizer.json, or a directory with one of them. If a directory has both,
            tokenizer.json counts, as for `transformers`.
        eod: end-of-document token, as id or as text; None means the one that the tokenizer's files name.

    Raises:
        ValueError: there is no tokenizer, it is damaged, or it has no end-of-document token.
    """
    given = Path(path)
    if given.is_dir():
        if (given / TOKENIZER_JSON).is_file():
            return HuggingFaceTokenizer(given, eod)
        if (given / SENTENCEPIECE).is_file():
            return SentencePieceTokenizer(given / SENTENCEPIECE, eod)
        slow = (given / "vocab.json").is_file()
        remedy = (
            "it has only vocab.json and merges.txt: load it once with transformers.AutoTokenizer.from_pretrained and "
            "write tokenizer.json with save_pretrained"
            if slow
            else "give the directory of a Hugging Face tokenizer, or a file"
        )
        raise ValueError(f"the directory {given} has neither {TOKENIZER_JSON} nor {SENTENCEPIECE}: {remedy}")
    # A JSON object begins with a brace; a sentencepiece model is a binary message, which does not.
    try:
        with given.open("rb") as file:
            start = file.read(64).lstrip(b"\xef\xbb\xbf \t\r\n")
    except OSError as error:
        raise ValueError(
            f"cannot read the tokenizer {path} ({error.strerror}): give the .model file that launch/prepare_data.py "
            "wrote, or a tokenizer.json"
        ) from None
    return HuggingFaceTokenizer(path, eod) if start.startswith(b"{") else SentencePieceTokenizer(path, eod)
