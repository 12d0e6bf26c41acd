"""Conversion of our sentencepiece model to files for `transformers.AutoTokenizer`, with the same ids on any text.

Both libraries run byte-pair merging, so pieces and the order of merges define the result. They differ in four points,
which are handled here:

* sentencepiece writes a space as U+2581 and would take that character in a text for a space, so
  :class:`megamult.data.tokenizer.Tokenizer` spells it in bytes. Here the pieces hold real spaces and nothing is
  normalized: U+2581 is a character that no piece has, and falls back to bytes by itself.
* sentencepiece ranks merges by the merged piece only, `tokenizers` by the pair. A piece that several pairs can form
  gets all of these pairs, one after the other. The result is the same: if nothing has merged across the ends of a piece
  before its turn, its characters have merged in a way that does not depend on the surrounding text, so only one of the
  pairs ever occurs.
* Text that looks like a special token ("</s>") is plain text to us. transformers would read it as a special token, so
  `split_special_tokens` is set.
* No token is put in front of a text (`add_bos_token` is false), because none was in training.

One difference is left, for byte tokens that are not UTF-8, which no text has. They decode to U+FFFD: `tokenizers`
writes it for every byte token of such a sequence, sentencepiece only for the wrong ones.
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

from megamult.data.tokenizer import Tokenizer

_SPACE_MARK = "\u2581"
_HARD_TEXTS = (
    "",
    " ",
    "  two  spaces \n\n\tand tabs\t\r\n ",
    "\u2581 a\u2581\u2581b\u2585",
    "<s>a</s> <unk><0x0A><0x",
    "e\u0301 \u4e2d\u6587 \u0645\u0631 \u2028\x00\x7f\ufeff\U0001f468\u200d\U0001f469\U0010ffff",
)
"""Texts that show differences between tokenizers first."""


def special_ids(model: Path) -> dict[str, int]:
    """Return `bos_token_id` and `eos_token_id` of a sentencepiece model, as far as it has them."""
    processor = sentencepiece.SentencePieceProcessor(model_file=Tokenizer(model).model_path)
    found = {"bos_token_id": processor.bos_id(), "eos_token_id": processor.eos_id()}
    return {key: value for key, value in found.items() if value >= 0}


def convert(model: Path, max_length: int) -> dict[str, bytes]:
    """Return `tokenizer.json` and `tokenizer_config.json` for a sentencepiece model, after comparing their ids with
    its.

    Args:
        model: the `.model` file that the run's data was encoded with.
        max_length: sequence length that the language model was trained at; transformers warns about longer texts.

    Raises:
        ValueError: the file is no sentencepiece model, or one whose ids `tokenizers` would not reproduce.
    """
    ours = Tokenizer(model)
    proto = sentencepiece_model_pb2.ModelProto.FromString(model.read_bytes())
    _check_expressible(model, proto)
    kinds = sentencepiece_model_pb2.ModelProto.SentencePiece
    # Only pieces of text hold spaces; "<unk>" and byte tokens are names.
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
        # Any other class builds its own backend from the vocabulary, with a mark for spaces.
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
    """Check that the conversion can reproduce all features of the model.

    Raises:
        ValueError: it cannot.
    """
    trainer, normalizer = proto.trainer_spec, proto.normalizer_spec
    kinds = sentencepiece_model_pb2.ModelProto.SentencePiece
    count = Counter(piece.type for piece in proto.pieces)
    known = (kinds.NORMAL, kinds.UNKNOWN, kinds.CONTROL, kinds.BYTE)
    found = {
        "model_type": (trainer.ModelType.Name(trainer.model_type), "BPE"),
        "byte_fallback": (trainer.byte_fallback, True),
        "byte pieces": (count[kinds.BYTE], 256),
        "unused and user-defined pieces": (sum(n for kind, n in count.items() if kind not in known), 0),
        "treat_whitespace_as_suffix": (trainer.treat_whitespace_as_suffix, False),
        "bytes of normalization rules": (len(normalizer.precompiled_charsmap), 0),
        "bytes of denormalization rules": (len(proto.denormalizer_spec.precompiled_charsmap), 0),
        "add_dummy_prefix": (normalizer.add_dummy_prefix, False),
        "remove_extra_whitespaces": (normalizer.remove_extra_whitespaces, False),
        "escape_whitespaces": (normalizer.escape_whitespaces, True),
    }
    for what, (is_, must) in found.items():
        if is_ != must:
            raise ValueError(f"the tokenizer {model} has {what} {is_}, but only {must} can be converted: {_REMEDY}")


_REMEDY = "put the files of its own Hugging Face tokenizer into a folder hf_tokenizer beside it, and export again"


def _merges(scores: dict[str, float]) -> list[tuple[str, str]]:
    """List every pair of pieces that forms a piece, best piece first."""
    pairs: list[tuple[str, str]] = []
    for piece in sorted(scores, key=lambda piece: -scores[piece]):  # stable: pieces of one score stay in order of id
        splits = ((piece[:cut], piece[cut:]) for cut in range(1, len(piece)))
        pairs += [(left, right) for left, right in splits if left in scores and right in scores]
    return pairs


def _check_same_ids(model: Path, ours: Tokenizer, backend: Any, text: dict[int, str]) -> None:
    """Check that the converted tokenizer gives our ids for every piece, for pairs of neighbours, and for hard texts.

    Raises:
        ValueError: it gives others.
    """
    pieces = list(text.values())
    probes = [*_HARD_TEXTS, *pieces, *map("".join, pairwise(pieces))]
    for probe, encoding in zip(probes, backend.encode_batch(probes, add_special_tokens=False), strict=True):
        if encoding.ids != ours.encode(probe):
            raise ValueError(
                f"the tokenizer {model} gives {probe!r} the ids {ours.encode(probe)}, and its conversion gives "
                f"{encoding.ids}: {_REMEDY}"
            )
