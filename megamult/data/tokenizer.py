"""Training and use of a sentencepiece BPE tokenizer that keeps every text: decode(encode(text)) is the text.

Identity normalization, byte fallback, no dummy prefix and no whitespace removal make sentencepiece keep every
character, including newlines and tabs. Two characters have a special meaning in the library and are handled here:

* U+2581 is the library's mark for a space, and would be decoded as a space. `Tokenizer.encode` encodes it by its bytes.
* U+2585 is the library's mark for an unknown character. The library silently drops a training sentence that contains
  it, so the text before and after this character is given to the training as two sentences. Encoding this character
  needs no special care.
"""

from __future__ import annotations

import hashlib
import io
import os
import re
from collections.abc import Iterable, Iterator
from pathlib import Path

import sentencepiece

UNK_ID, BOS_ID, EOS_ID = 0, 1, 2
_FIXED_PIECES = 3 + 256  # unk, bos, eos and one piece per byte
_SPACE_MARK = "\u2581"
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


class Tokenizer:
    """A trained sentencepiece model read from a `.model` file.

    Attributes:
        vocab_size: number of tokens; every id lies in [0, vocab_size).
        eod: id of the end-of-document token (sentencepiece's eos).
        sha256: SHA-256 of the file. It identifies the tokenizer wherever the file is.
        unique_identifiers: values that Megatron's dataset configuration hashes to name its caches.

    There is deliberately no attribute `pad`: a GPTDataset would replace each token id equal to it by 0, and leave this
    token out of the loss.

    Raises:
        ValueError: the file is missing, is not a sentencepiece model, or has no end-of-document token.
    """

    def __init__(self, model_path: str | Path) -> None:
        self.model_path = str(model_path)
        try:
            proto = Path(model_path).read_bytes()
        except OSError as error:
            raise ValueError(
                f"cannot read the tokenizer {self.model_path} ({error.strerror}): "
                "give the .model file that launch/prepare_data.py wrote"
            ) from None
        try:
            if not proto:
                raise RuntimeError("the file is empty")
            self._processor = sentencepiece.SentencePieceProcessor(model_proto=proto)
        except RuntimeError:
            raise ValueError(
                f"the tokenizer {self.model_path} ({len(proto)} bytes) is not a sentencepiece model or is "
                "damaged: copy it again or rerun launch/prepare_data.py"
            ) from None
        self.sha256 = hashlib.sha256(proto).hexdigest()
        self.vocab_size: int = self._processor.vocab_size()
        self.eod: int = self._processor.eos_id()
        if self.eod < 0:
            raise ValueError(
                f"the tokenizer {self.model_path} has no eos token to end documents with (eos_id is "
                f"{self.eod}): train it with an eos_id, or let launch/prepare_data.py train one"
            )
        self.unique_identifiers: dict[str, str] = {"class": "megamult.Tokenizer", "sha256": self.sha256}
        self._space_mark_ids = [self._processor.piece_to_id(f"<0x{byte:02X}>") for byte in _SPACE_MARK.encode()]

    def encode(self, text: str) -> list[int]:
        """Return the token ids of `text`, without bos and eos.

        Raises:
            ValueError: `text` holds a lone surrogate, which is not a Unicode character.
        """
        ids: list[int] = []
        try:
            for i, part in enumerate(text.split(_SPACE_MARK)):
                if i:
                    ids += self._space_mark_ids
                ids += self._processor.encode(part)
        except RuntimeError:
            raise ValueError(f"text {text[:40]!r} is not valid Unicode: remove lone surrogates") from None
        return ids

    def neighbours(self) -> frozenset[str] | None:
        """Return all pairs of characters that are neighbours within a token, or None if they do not decide anything.

        Between two characters that are no such pair, a text can be cut without a change to its token ids: the merges of
        byte-pair encoding form only tokens, so none of them crosses the cut. This holds if nothing else is done to a
        text. Unigram models are excluded, because they add up rounded scores along the whole text.
        """
        from sentencepiece import sentencepiece_model_pb2  # a worker process does not need it

        proto = sentencepiece_model_pb2.ModelProto.FromString(self._processor.serialized_model_proto())
        rules = proto.normalizer_spec
        changed = rules.precompiled_charsmap or rules.add_dummy_prefix or rules.remove_extra_whitespaces
        if proto.trainer_spec.model_type != proto.trainer_spec.BPE or changed:
            return None
        texts = (piece.piece.replace(_SPACE_MARK, " ") for piece in proto.pieces)
        return frozenset(text[at : at + 2] for text in texts for at in range(len(text) - 1))

    def decode(self, ids: Iterable[int]) -> str:
        """Return the text of token ids. Special tokens give no text, and an incomplete UTF-8 sequence gives U+FFFD."""
        text: str = self._processor.decode([int(i) for i in ids])
        return text
