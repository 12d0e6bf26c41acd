"""Places where a text can be cut for a tokenizer.json: found for known patterns, and only where ids stay the same."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import pytest
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

from megamult.data.hugging_face_tokenizer import HuggingFaceTokenizer
from megamult.data.word_ends import ENDS
from tests.data.conftest import make_documents
from tests.data.test_passages import assert_cuts_keep_ids

REST = r"|\s*[\r\n]+|\s+(?!\S)|\s+"
CONTRACTIONS = "(?i:'s|'t|'re|'ve|'m|'ll|'d)"
LLAMA = CONTRACTIONS + r"|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*" + REST
UPPER, LOWER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
BEFORE = r"[^\r\n\p{L}\p{N}]?"
GPT_4O = (
    f"{BEFORE}{UPPER}*{LOWER}+{CONTRACTIONS}?|{BEFORE}{UPPER}+{LOWER}*{CONTRACTIONS}?"
    r"|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n/]*" + REST
)


def split(pattern: str, behavior: str = "isolated") -> Any:
    stages = [pre_tokenizers.Split(Regex(pattern), behavior), pre_tokenizers.ByteLevel(False, use_regex=False)]
    return pre_tokenizers.Sequence(stages)


KNOWN: dict[str, Any] = {
    "GPT-2": pre_tokenizers.ByteLevel(add_prefix_space=False),
    "SmolLM": pre_tokenizers.Sequence([pre_tokenizers.Digits(True), pre_tokenizers.ByteLevel(False)]),
    "Llama 3": split(LLAMA),
    "Qwen": split(LLAMA.replace("{1,3}", "")),
    "GPT-4o": split(GPT_4O),
}
UNKNOWN: dict[str, Any] = {
    "a space put first": pre_tokenizers.ByteLevel(add_prefix_space=True),
    "no words": pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
    "only numbers": split(r"\p{N}{1,3}"),
    "two words": split(r"\p{L}+ \p{L}+| ?\p{L}+|\s+"),
    "ends removed": split(LLAMA, "removed"),
    "Metaspace": pre_tokenizers.Metaspace(),
    "none": None,
}


def made(path: Path, stage: Any, token: AddedToken | None = None, normalizer: Any = None) -> HuggingFaceTokenizer:
    backend = Tokenizer(models.BPE())
    backend.decoder = decoders.ByteLevel()
    if stage is not None:
        backend.pre_tokenizer = stage
    if normalizer is not None:
        backend.normalizer = normalizer
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=700, special_tokens=["<e>"], initial_alphabet=alphabet, show_progress=False
    )
    # NFC makes a letter and a mark of U+0958, and patterns then join the mark and what follows.
    backend.train_from_iterator([*make_documents(61), *texts(), "\u0958,\u0958." * 100], trainer)
    if token is not None:
        backend.add_special_tokens([token])
    backend.save(str(path))
    return HuggingFaceTokenizer(path, "<e>")


def texts() -> list[str]:
    draw = random.Random(4)
    parts = [
        "ab",
        "Don't",
        "I'LL",
        " ",
        "  ",
        "\n",
        "\r\n",
        "\t",
        "12345",
        "<e>",
        "x\u0301",
        "\u0958",
        "\u4e2d\u6587",
        "'s",
        "-/",
    ]
    parts += [*ENDS, "\ua7c1", "\u0e01\u0e33", "\u1100\u1161"]
    return ["".join(draw.choices(parts, k=60)) for _ in range(8)]


@pytest.mark.parametrize("normalizer", [None, normalizers.NFC()], ids=["plain", "NFC"])
@pytest.mark.parametrize("name", KNOWN)
def test_ids_stay_the_same_wherever_a_text_may_be_cut(tmp_path: Path, name: str, normalizer: Any) -> None:
    tokenizer = made(tmp_path / "tokenizer.json", KNOWN[name], normalizer=normalizer)
    for text in texts():
        assert_cuts_keep_ids(tokenizer, text)


@pytest.mark.parametrize("name", UNKNOWN)
def test_a_tokenizer_that_is_not_known_gets_texts_whole(tmp_path: Path, name: str) -> None:
    assert made(tmp_path / "tokenizer.json", UNKNOWN[name]).places_to_cut() is None


def test_tokens_and_normalization_that_reach_across_a_words_end_forbid_cuts(tmp_path: Path) -> None:
    path, stage = tmp_path / "tokenizer.json", KNOWN["Llama 3"]
    for token in (AddedToken("a b"), AddedToken("z,"), AddedToken("<x>", lstrip=True), AddedToken("<x>", rstrip=True)):
        assert made(path, stage, token).places_to_cut() is None
    assert made(path, stage, normalizer=normalizers.NFKC()).places_to_cut() is None
    assert made(path, stage, AddedToken("<|end|>")).places_to_cut() is not None
    content = json.loads(path.read_text())
    content["model"]["dropout"] = 0.1
    path.write_text(json.dumps(content))
    assert HuggingFaceTokenizer(path, "<e>").places_to_cut() is None
