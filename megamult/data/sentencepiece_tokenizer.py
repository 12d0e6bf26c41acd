"""Training of a sentencepiece BPE tokenizer that keeps every text (decode(encode(text)) is the text), and use of this
and of any other sentencepiece model.

Identity normalization, byte fallback, no dummy prefix and no whitespace removal make sentencepiece keep every
character, including newlines and tabs. Two characters have a special meaning in the library and are handled here:

* U+2581 is the library's mark for a space, and would be decoded as a space. `encode` encodes it by its bytes.
* U+2585 is the library's mark for an unknown character. The library silently drops a training sentence that contains
  it, so the text before and after this character is given to the training as two sentences. Encoding this character
  needs no special care.
"""

from __future__ import annotations

import hashlib
import io
import os
import re
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

import sentencepiece

from megamult.data.tokenizer import Tokenizer, not_unicode
from megamult.data.tokenizer_files import SENTENCEPIECE

UNK_ID, BOS_ID, EOS_ID = 0, 1, 2
_FIXED_PIECES = 3 + 256  # unk, bos, eos and one piece per byte
_SPACE_MARK = "\u2581"
_SPACES = " a  b "
_RESERVED = re.compile("[\u2581\u2585]")
# sentencepiece silently drops sentences of more than max_sentence_length bytes, so long texts are cut.
_MAX_SENTENCE_CHARS = 16384


def _training_sentences(texts: Iterable[str]) -> Iterator[str]:
    for text in texts:
        for part in _RESERVED.split(text):
            for start in range(0, len(part), _MAX_SENTENCE_CHARS):
                yield part[start : start + _MAX_SENTENCE_CHARS]


def train_tokenizer(
    texts: Iterable[str],
    vocab_size: int,
    model_path: str | Path,
    character_coverage: float = 0.9995,
) -> None:
    """Train a BPE model on `texts` and write it to `model_path`. The same texts give the same file.

    The ids of unk, bos and eos are 0, 1 and 2. The 256 bytes have the next ids. The most frequent characters, which
    make up the fraction `character_coverage` of the text, get a token each; the others are encoded by their bytes. The
    file gets its name only when it is complete.

    Raises:
        ValueError: the texts cannot yield a vocabulary of `vocab_size` tokens.
    """
    if vocab_size <= _FIXED_PIECES:
        raise ValueError(
            f"vocab_size is {vocab_size}, but 3 special tokens and 256 byte tokens come first: "
            f"ask for at least {_FIXED_PIECES + 1}, usually 4096 or more"
        )
    model = io.BytesIO()
    try:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=_training_sentences(texts),
            model_writer=model,
            model_type="bpe",
            vocab_size=vocab_size,
            character_coverage=character_coverage,
            byte_fallback=True,
            normalization_rule_name="identity",
            remove_extra_whitespaces=False,
            add_dummy_prefix=False,
            allow_whitespace_only_pieces=True,
            max_sentence_length=4 * _MAX_SENTENCE_CHARS,
            unk_id=UNK_ID,
            bos_id=BOS_ID,
            eos_id=EOS_ID,
            pad_id=-1,
            num_threads=1,
            minloglevel=2,
        )
    except RuntimeError as error:
        raise _training_error(str(error), vocab_size) from error
    partial = Path(f"{model_path}.partial")
    try:
        partial.write_bytes(model.getvalue())
        os.replace(partial, model_path)
    finally:
        partial.unlink(missing_ok=True)


def _training_error(message: str, vocab_size: int) -> Exception:
    too_high = re.search(r"Vocabulary size too high .*<= (\d+)", message)
    if too_high:
        return ValueError(
            f"vocab_size is {vocab_size}, but this text yields at most {too_high[1]} tokens: "
            f"ask for {too_high[1]} or fewer, or give more text"
        )
    too_low = re.search(r"smaller than required_chars\. \d+ vs (\d+)", message)
    if too_low:
        return ValueError(
            f"vocab_size is {vocab_size}, but special tokens, bytes and the characters of this text need "
            f"{too_low[1]} tokens: ask for {too_low[1]} or more"
        )
    if "sentences_.empty()" in message:
        return ValueError("there is no text to train the tokenizer on: give at least one non-empty document")
    return RuntimeError(f"sentencepiece could not train a tokenizer of {vocab_size} tokens: {message}")


class SentencePieceTokenizer(Tokenizer):
    """A trained sentencepiece model.

    Models that :func:`train_tokenizer` made keep every text. Others may change it, for example by normalization, which
    `decode(encode(text))` shows.

    Args:
        path: the `.model` file.
        eod: end-of-document token, as id or as a piece's text. None means sentencepiece's eos.

    Raises:
        ValueError: the file is missing, is not a sentencepiece model, or has no end-of-document token.
    """

    def __init__(self, path: str | Path, eod: int | str | None = None) -> None:
        self.path = str(path)
        try:
            self._proto = Path(path).read_bytes()
        except OSError as error:
            raise ValueError(
                f"cannot read the tokenizer {self.path} ({error.strerror}): "
                "give the .model file that launch/prepare_data.py wrote"
            ) from None
        try:
            if not self._proto:
                raise RuntimeError("the file is empty")
            self._processor = sentencepiece.SentencePieceProcessor(model_proto=self._proto)
        except RuntimeError:
            raise ValueError(
                f"the tokenizer {self.path} ({len(self._proto)} bytes) is neither a sentencepiece model nor a "
                "tokenizer.json, or is damaged: copy it again or rerun launch/prepare_data.py"
            ) from None
        self.sha256 = hashlib.sha256(self._proto).hexdigest()
        self.defined_by = SENTENCEPIECE
        self.vocab_size = self._processor.vocab_size()
        self.eod = self._end_of_document(eod)
        marks = [self._processor.piece_to_id(f"<0x{byte:02X}>") for byte in _SPACE_MARK.encode()]
        # A model that has no pieces for bytes, or that changes spaces, gets the whole text with the mark. Its ids are
        # then those that the library gives.
        changes = self._processor.decode(self._processor.encode(_SPACES)) != _SPACES
        self._space_mark_ids = None if changes or self._processor.unk_id() in marks else marks

    def _end_of_document(self, given: int | str | None) -> int:
        """Return the id of the end-of-document token.

        Raises:
            ValueError: `given` is no token of this tokenizer, or it is None and the model names no such token.
        """
        if given is None:
            found: int = self._processor.eos_id()
            if found < 0:
                raise ValueError(
                    f"the tokenizer {self.path} has no eos token to end documents with (eos_id is "
                    f"{found}): give one of its tokens as eod, or let launch/prepare_data.py train a tokenizer"
                )
            return found
        token = given if isinstance(given, int) else self._processor.piece_to_id(given)
        known = isinstance(given, int) or self._processor.id_to_piece(token) == given
        if not known or not 0 <= token < self.vocab_size:
            raise ValueError(
                f"the tokenizer {self.path} has no token {given!r}, which is given as eod; it has {self.vocab_size} "
                "tokens: give one of them as eod"
            )
        return int(token)

    def encode(self, text: str) -> list[int]:
        """Return the token ids of `text`, without bos and eos.

        Raises:
            ValueError: `text` holds a lone surrogate, which is not a Unicode character.
        """
        ids: list[int] = []
        try:
            for i, part in enumerate(text.split(_SPACE_MARK) if self._space_mark_ids else [text]):
                if i:
                    ids += self._space_mark_ids or []
                ids += self._processor.encode(part)
        except RuntimeError:
            raise not_unicode(text) from None
        return ids

    def decode(self, ids: Iterable[int]) -> str:
        """Return the text of token ids. Special tokens give no text, and an incomplete UTF-8 sequence gives U+FFFD."""
        text: str = self._processor.decode([int(i) for i in ids])
        return text

    def places_to_cut(self) -> Callable[[str, int], bool] | None:
        """Return a function (text, at) -> whether the text can be cut before its character `at`, or None if nowhere.

        A text can be cut between two characters that stand side by side in no token: byte-pair encoding only ever joins
        characters into tokens, so it joins nothing across the cut. The result is None
        if the tokenizer changes texts before it encodes them, if it has no pieces for the bytes of U+2581, or if its
        model is not BPE: a unigram model, for example, compares rounded sums of scores over whole texts.
        """
        from sentencepiece import sentencepiece_model_pb2  # a worker process does not need it

        proto = sentencepiece_model_pb2.ModelProto.FromString(self._proto)
        rules = proto.normalizer_spec
        changed = rules.precompiled_charsmap or rules.add_dummy_prefix or rules.remove_extra_whitespaces
        if proto.trainer_spec.model_type != proto.trainer_spec.BPE or changed or self._space_mark_ids is None:
            return None
        texts = (piece.piece.replace(_SPACE_MARK, " ") for piece in proto.pieces)
        neighbours = frozenset(text[at : at + 2] for text in texts for at in range(len(text) - 1))
        return lambda text, at: text[at - 1 : at + 1] not in neighbours

    def files(self) -> dict[str, bytes]:
        """Return what a checkpoint stores of this tokenizer: the sentencepiece model's bytes by their path in it."""
        return {SENTENCEPIECE: self._proto}
