"""Tokenizers of Hugging Face's format that always end a word before a space or a punctuation mark.

A tokenizer.json divides a text in stages (its `pre_tokenizer`), and merges bytes only within the resulting words. The
patterns of GPT-2, Llama 3, Qwen, GPT-4 and GPT-4o are searched from left to right. None of their alternatives matches a
letter together with a following character of `ENDS`, and the text after a letter never changes how the text up to this
letter is matched. So a word always ends between a letter and a following character of `ENDS`, and the text can be cut
there: the words on both sides stay the same.
"""

from __future__ import annotations

import unicodedata
from collections.abc import Iterator, Mapping
from typing import Any

ENDS = " \n,.;:!?\u3002\u3001\uff0c\uff1b\uff1a\uff01\uff1f"
"""Characters that are no letter, mark or apostrophe, and that no normalization joins with the character before."""

_OLD = unicodedata.ucd_3_2_0
_CONTRACTIONS = "(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_UPPER, _LOWER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
# Alternatives that match every letter, with what may stand before it or, as an apostrophe, after it.
_LETTERS = {
    r" ?\p{L}+",
    r"[^\r\n\p{L}\p{N}]?\p{L}+",
    r"[^\r\n\p{L}\p{N}]?+\p{L}+",
    *(f"[^\\r\\n\\p{{L}}\\p{{N}}]?{_UPPER}*{_LOWER}+{suffix}" for suffix in ("", f"{_CONTRACTIONS}?")),
    *(f"[^\\r\\n\\p{{L}}\\p{{N}}]?{_UPPER}+{_LOWER}*{suffix}" for suffix in ("", f"{_CONTRACTIONS}?")),
}
# Alternatives that match no letter, or only the letters of a contraction.
_OTHERS = {
    *(_CONTRACTIONS, "'(?i:[sdmt]|ll|ve|re)", "'s", "'t", "'re", "'ve", "'m", "'ll", "'d"),
    *(r"\p{N}", r"\p{N}+", r"\p{N}{1,3}", r" ?\p{N}+", r"\p{N}{1,3}+"),
    *(f" ?[^\\s\\p{{L}}\\p{{N}}]+{ends}" for ends in ("", r"[\r\n]*", r"[\r\n/]*")),
    *(r"\s*[\r\n]+", r"\s*[\r\n]", r"\s+(?!\S)", r"\s+"),
}


def is_word_end(text: str, at: int) -> bool:
    """Return whether character number `at` of a text is one of `ENDS` and directly follows a letter.

    Then a word surely ends between the two. False does not mean that no word ends there. `at` must be at least 1 and
    less than the text's length.
    """
    before = text[at - 1]
    # A library of other age may not know the newest letters, and NFC makes a letter and a mark of some letters.
    return text[at] in ENDS and _OLD.category(before)[0] == "L" and unicodedata.is_normalized("NFC", before)


def words_end(tokenizer: Mapping[str, Any]) -> bool:
    """Return whether the tokenizer of a tokenizer.json is known to end a word wherever `is_word_end` says so."""
    normalizer = tokenizer.get("normalizer") or {"type": "NFC"}
    model: Mapping[str, Any] = tokenizer.get("model") or {}
    if normalizer.get("type") != "NFC" or model.get("type") != "BPE" or model.get("dropout"):
        return False
    for token in tokenizer.get("added_tokens") or []:
        content = token["content"]
        # Tokens of their own are found first, and some take the space beside them.
        if token.get("lstrip") or token.get("rstrip"):
            return False
        if any(is_word_end(content, at) for at in range(1, len(content))):
            return False
    # Each stage divides the parts that the one before made. None may match across a word's end, and one must divide.
    kinds = [_divides(stage) for stage in _stages(tokenizer.get("pre_tokenizer"))]
    return None not in kinds and True in kinds


def _stages(stage: Mapping[str, Any] | None) -> Iterator[Mapping[str, Any]]:
    if stage is not None and stage.get("type") == "Sequence":
        for each in stage["pretokenizers"]:
            yield from _stages(each)
    elif stage is not None:
        yield stage


def _divides(stage: Mapping[str, Any]) -> bool | None:
    """Return whether a stage divides the text at every end of a word.

    False: it does not, but no match of it contains an end of a word. None: a match may contain one, or the stage is not
    known.
    """
    kind = stage.get("type")
    if kind == "ByteLevel" and not stage.get("add_prefix_space", True):
        return bool(stage.get("use_regex", True))
    if kind == "Digits":
        return False
    if kind == "Split" and stage.get("behavior") == "Isolated" and not stage.get("invert"):
        alternatives = set(_alternatives(stage["pattern"].get("Regex", "")))
        if alternatives <= _LETTERS | _OTHERS:
            return bool(alternatives & _LETTERS)
    return None


def _alternatives(pattern: str) -> Iterator[str]:
    """Yield the alternatives of a pattern, which `|` divides outside of parentheses and brackets."""
    depth, start = 0, 0
    for at, character in enumerate(pattern):
        depth += (character in "([") - (character in ")]")
        if character == "|" and depth == 0:
            yield pattern[start:at]
            start = at + 1
    yield pattern[start:]
