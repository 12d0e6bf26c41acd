"""Use of a tokenizer in Hugging Face's format, tokenizer.json, by the library `tokenizers`."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import tokenizers

from megamult.data.tokenizer import Tokenizer, not_unicode
from megamult.data.tokenizer_files import TOKENIZER_FOLDER, read_files, tokenizer_identities
from megamult.data.word_ends import is_word_end, words_end

TOKENIZER_JSON = "tokenizer.json"


class HuggingFaceTokenizer(Tokenizer):
    """Tokenizer of a tokenizer.json, with the ids that `transformers` gives without special tokens at the ends.

    Args:
        path: a tokenizer.json or its directory. Other files of the tokenizer beside it, such as tokenizer_config.json,
            are kept in checkpoints and exports.
        eod: end-of-document token, as id or as text. None means the token that the tokenizer's files call
            `eos_token`, or else the `eos_token_id` of generation_config.json or config.json.

    Raises:
        ValueError: the file is missing or damaged, or there is no end-of-document token.
    """

    def __init__(self, path: str | Path, eod: int | str | None = None) -> None:
        self.path = str(path)
        directory = Path(path) if Path(path).is_dir() else Path(path).parent
        self._files = read_files(directory)
        given = Path(path) / TOKENIZER_JSON if Path(path).is_dir() else Path(path)
        try:
            self._files[TOKENIZER_JSON] = given.read_bytes()
        except OSError as error:
            raise ValueError(f"cannot read the tokenizer {given} ({error.strerror}): give a tokenizer.json") from None
        try:
            self._backend = tokenizers.Tokenizer.from_buffer(self._files[TOKENIZER_JSON])
        except Exception as error:  # the library raises plain exceptions
            raise ValueError(
                f"the tokenizer {given} is no tokenizer.json that the library tokenizers {tokenizers.__version__} can "
                f"read ({error}): copy it again, or update the library"
            ) from None
        # A file may ask for batches of equal length, which would cut documents or fill them up.
        config = _json(self._files.get("tokenizer_config.json", b""))
        self._backend.encode_special_tokens = config.get("split_special_tokens") is True
        self._backend.no_truncation()
        self._backend.no_padding()
        self.vocab_size = max(self._backend.get_vocab(with_added_tokens=True).values()) + 1
        ((self.defined_by, self.sha256),) = tokenizer_identities({TOKENIZER_JSON: self._files[TOKENIZER_JSON]}).items()
        self.eod = self._end_of_document(eod, directory)

    def _end_of_document(self, given: int | str | None, directory: Path) -> int:
        """Return the id of the end-of-document token.

        Raises:
            ValueError: `given` is no token of this tokenizer, or it is None and the files name no such token.
        """
        token = _eos_token(self._files) if given is None else given
        if token is None:
            configurations = self._files.get("generation_config.json", b""), _bytes(directory / "config.json")
            token = next((number for each in configurations if (number := _eos_id(each)) is not None), None)
        found = token if isinstance(token, int) else None if token is None else self._backend.token_to_id(token)
        if found is not None and 0 <= found < self.vocab_size:
            return found
        special = [each.content for _, each in sorted(self._backend.get_added_tokens_decoder().items()) if each.special]
        shown = ", ".join(map(repr, special[:12])) + (", ..." if len(special) > 12 else "")
        some = f"; its special tokens are {shown}" if special else ""
        if token is None:
            raise ValueError(
                f"the tokenizer {self.path} does not say which token ends a document (no eos_token in "
                f"tokenizer_config.json or special_tokens_map.json beside it){some}: give as eod "
                "the token that ends a document, by its id or its text"
            )
        whose = "is given as eod" if given is not None else "the files beside it name as eos_token"
        raise ValueError(
            f"the tokenizer {self.path} has no token {token!r}, which {whose}{some}: give one of its tokens as eod"
        )

    def encode(self, text: str) -> list[int]:
        """Return the token ids of `text`. No token that marks its beginning or end is added.

        The text of a special token in `text` gives this token, unless tokenizer_config.json has `split_special_tokens`,
        as in `transformers`.

        Raises:
            ValueError: `text` holds a lone surrogate, which is not a Unicode character.
        """
        try:
            ids: list[int] = self._backend.encode(text, add_special_tokens=False).ids
        except (TypeError, UnicodeEncodeError):
            raise not_unicode(text) from None
        return ids

    def decode(self, ids: Iterable[int]) -> str:
        """Return the text of token ids. Special tokens give their text."""
        text: str = self._backend.decode([int(i) for i in ids], skip_special_tokens=False)
        return text

    def places_to_cut(self) -> Callable[[str, int], bool] | None:
        """Return a function (text, at) -> whether the text can be cut before its character `at`, or None if nowhere."""
        return is_word_end if words_end(_json(self._files[TOKENIZER_JSON])) else None

    def files(self) -> dict[str, bytes]:
        """Return the tokenizer's files for a checkpoint: unchanged contents by path in the checkpoint."""
        return {f"{TOKENIZER_FOLDER}/{name}": content for name, content in self._files.items()}


def _eos_token(files: Mapping[str, bytes]) -> str | None:
    """Return the text of the token that the files call `eos_token`, or None if none does."""
    for name in ("tokenizer_config.json", "special_tokens_map.json"):
        token = _json(files.get(name, b"")).get("eos_token")
        if isinstance(token, dict):
            token = token.get("content")
        if isinstance(token, str):
            return token
    return None


def _eos_id(content: bytes) -> int | None:
    """Return the first `eos_token_id` of a configuration file, or None if it has none."""
    found = _json(content).get("eos_token_id")
    found = found[0] if isinstance(found, list) and found else found
    return found if isinstance(found, int) else None


def _bytes(path: Path) -> bytes:
    return path.read_bytes() if path.is_file() else b""


def special_ids(files: Mapping[str, bytes]) -> dict[str, int]:
    """Return `bos_token_id` and `eos_token_id`, each only if tokenizer_config.json gives the text of its token."""
    config = _json(files.get("tokenizer_config.json", b""))
    if TOKENIZER_JSON not in files:
        return {}
    backend, found = tokenizers.Tokenizer.from_buffer(files[TOKENIZER_JSON]), {}
    for name in ("bos_token", "eos_token"):
        token = config.get(name)
        token = token.get("content") if isinstance(token, dict) else token
        if isinstance(token, str) and (number := backend.token_to_id(token)) is not None:
            found[f"{name}_id"] = number
    return found


def _json(content: bytes) -> dict[str, Any]:
    """Return the mapping in a JSON file; {} if the file has none."""
    try:
        found = json.loads(content)
    except ValueError:
        return {}
    return found if isinstance(found, dict) else {}
