"""Conversion of a sentencepiece model to files for `transformers.AutoTokenizer`, with the same ids for every text.

Both sentencepiece and the library `tokenizers`, which transformers uses, merge pairs of pieces (byte-pair encoding).
The result depends only on the pieces and the order of merges. Four differences are handled here:

* sentencepiece stores a space in a piece as U+2581, and would read this character in a text as a space.
  :class:`megamult.data.sentencepiece_tokenizer.SentencePieceTokenizer` therefore encodes U+2581 in a text as bytes.
  The converted pieces contain real spaces, and the converted tokenizer does not normalize text. No converted piece
  contains U+2581, so `tokenizers` encodes it as bytes too.
* sentencepiece orders merges by the piece that they form, and `tokenizers` orders them by the pair that they join. If
  several pairs form the same piece, the converted list has a merge for each of these pairs, one after the other. Their
  order does not change the ids: a piece can form only if no earlier merge has crossed its borders. The merges inside
  the piece then depend only on its own characters, so the last one always joins the same pair. The merges of the other
  pairs are never used.
* Text that looks like a special token, such as "</s>", is plain text in training data. transformers would read it as a
  special token, so the conversion sets `split_special_tokens`.
* transformers can put a bos token before a text. Training data has no such token, so the conversion sets
  `add_bos_token` to false.

One difference remains, in the decoding of a sequence of byte tokens that is not valid UTF-8. Encoding a text never
gives such a sequence. `tokenizers` decodes each of its byte tokens as U+FFFD, and sentencepiece only the invalid ones.
"""

from __future__ import annotations

import json
from collections import Counter
from itertools import pairwise
from pathlib import Path
from typing import Any

import sentencepiece
import tokenizers
from sentencepiece import sentencepiece_model_pb2
from tokenizers import decoders, models

from megamult.data.sentencepiece_tokenizer import SentencePieceTokenizer

_SPACE_MARK = "\u2581"
_HARD_TEXTS = (
    "",
    " ",
    "  two  spaces \n\n\tand tabs\t\r\n ",
    "\u2581 a\u2581\u2581b\u2585",
    "<s>a</s> <unk><0x0A><0x",
    "e\u0301 \u4e2d\u6587 \u0645\u0631 \u2028\x00\x7f\ufeff\U0001f468\u200d\U0001f469\U0010ffff",
)
"""Texts for which tokenizers are most likely to give different ids."""


def special_ids(model: Path) -> dict[str, int]:
    """Return those of `bos_token_id` and `eos_token_id` that a sentencepiece model has."""
    processor = sentencepiece.SentencePieceProcessor(model_file=str(model))
    found = {"bos_token_id": processor.bos_id(), "eos_token_id": processor.eos_id()}
    return {key: value for key, value in found.items() if value >= 0}


def convert(model: Path, max_length: int) -> dict[str, bytes]:
    """Return the contents of `tokenizer.json` and `tokenizer_config.json` for a sentencepiece model.

    The ids of the converted tokenizer are compared with those of the sentencepiece model on many texts.

    Args:
        model: the `.model` file with which the run's data was encoded.
        max_length: sequence length with which the language model was trained. transformers warns about longer texts.

    Raises:
        ValueError: the file is no sentencepiece model, or `tokenizers` cannot reproduce the ids that the model gives.
    """
    ours = SentencePieceTokenizer(model, eod=0)  # only its encoding is needed
    proto = sentencepiece_model_pb2.ModelProto.FromString(model.read_bytes())
    _check_expressible(model, proto)
    kinds = sentencepiece_model_pb2.ModelProto.SentencePiece
    # Only pieces of text can contain spaces; "<unk>" and the names of byte tokens cannot.
    text = {i: p.piece.replace(_SPACE_MARK, " ") for i, p in enumerate(proto.pieces) if p.type == kinds.NORMAL}
    vocabulary = {text.get(i, p.piece): i for i, p in enumerate(proto.pieces)}
    scores = {piece: proto.pieces[i].score for i, piece in text.items()}
    backend = tokenizers.Tokenizer(
        models.BPE(vocab=vocabulary, merges=_merges(scores), byte_fallback=True, fuse_unk=True)
    )
    backend.decoder = decoders.Sequence([decoders.ByteFallback(), decoders.Fuse()])
    special = [p.piece for p in proto.pieces if p.type in (kinds.UNKNOWN, kinds.CONTROL)]
    backend.add_special_tokens([tokenizers.AddedToken(name, normalized=False, special=True) for name in special])
    backend.encode_special_tokens = True
    _check_same_ids(model, ours, backend, text)
    ids = special_ids(model)
    config: dict[str, Any] = {
        # Other classes do not use tokenizer.json as it is: they build a tokenizer from the vocabulary, with U+2581 for
        # spaces.
        "tokenizer_class": "PreTrainedTokenizerFast",
        **{key.removesuffix("_id"): proto.pieces[i].piece for key, i in ids.items()},
        "unk_token": next(piece.piece for piece in proto.pieces if piece.type == kinds.UNKNOWN),
        "add_bos_token": False,
        "add_eos_token": False,
        "clean_up_tokenization_spaces": False,
        "model_input_names": ["input_ids", "attention_mask"],
        "model_max_length": max_length,
        "split_special_tokens": True,
    }
    return {
        "tokenizer.json": backend.to_str(pretty=True).encode(),
        "tokenizer_config.json": (json.dumps(config, indent=2, ensure_ascii=False) + "\n").encode(),
    }


def _check_expressible(model: Path, proto: Any) -> None:
    """Check that a sentencepiece model has only features that the conversion can reproduce.

    Raises:
        ValueError: the model has other features. The message names all of them.
    """
    trainer, normalizer = proto.trainer_spec, proto.normalizer_spec
    kinds = sentencepiece_model_pb2.ModelProto.SentencePiece
    count = Counter(piece.type for piece in proto.pieces)
    known = (kinds.NORMAL, kinds.UNKNOWN, kinds.CONTROL, kinds.BYTE)
    found = {
        "model_type": (trainer.ModelType.Name(trainer.model_type), "BPE"),
        "byte_fallback": (trainer.byte_fallback, True),
        "number of byte pieces": (count[kinds.BYTE], 256),
        "number of unused and user-defined pieces": (sum(n for kind, n in count.items() if kind not in known), 0),
        "treat_whitespace_as_suffix": (trainer.treat_whitespace_as_suffix, False),
        "size of the normalization rules": (len(normalizer.precompiled_charsmap), 0),
        "size of the denormalization rules": (len(proto.denormalizer_spec.precompiled_charsmap), 0),
        "add_dummy_prefix": (normalizer.add_dummy_prefix, False),
        "remove_extra_whitespaces": (normalizer.remove_extra_whitespaces, False),
        "escape_whitespaces": (normalizer.escape_whitespaces, True),
    }
    others = [f"its {what} is {is_}, not {must}" for what, (is_, must) in found.items() if is_ != must]
    if others:
        raise ValueError(f"the tokenizer {model} cannot be converted, because {', and '.join(others)}: {_REMEDY}")


_REMEDY = (
    "put the files of this tokenizer, in Hugging Face's format, into a folder hf_tokenizer beside the .model file, and "
    "export again"
)


def _merges(scores: dict[str, float]) -> list[tuple[str, str]]:
    """Return all pairs of pieces that form a piece, ordered by the score of that piece, highest first."""
    pairs: list[tuple[str, str]] = []
    for piece in sorted(scores, key=lambda piece: -scores[piece]):  # stable: equal scores stay in the order of ids
        splits = ((piece[:cut], piece[cut:]) for cut in range(1, len(piece)))
        pairs += [(left, right) for left, right in splits if left in scores and right in scores]
    return pairs


def _check_same_ids(model: Path, ours: SentencePieceTokenizer, backend: Any, text: dict[int, str]) -> None:
    """Check that the converted tokenizer gives the same ids as the sentencepiece model.

    The texts of the check are all pieces, all pairs of pieces with neighbouring ids, and :data:`_HARD_TEXTS`.

    Args:
        model: file of the sentencepiece model, for the message.
        ours: the sentencepiece model.
        backend: the converted tokenizer.
        text: pieces of text by id, with real spaces.

    Raises:
        ValueError: the converted tokenizer gives other ids for a text.
    """
    pieces = list(text.values())
    probes = [*_HARD_TEXTS, *pieces, *map("".join, pairwise(pieces))]
    for probe, encoding in zip(probes, backend.encode_batch(probes, add_special_tokens=False), strict=True):
        if encoding.ids != ours.encode(probe):
            raise ValueError(
                f"the tokenizer {model} gives {probe!r} the ids {ours.encode(probe)}, and its conversion gives "
                f"{encoding.ids}: {_REMEDY}"
            )
