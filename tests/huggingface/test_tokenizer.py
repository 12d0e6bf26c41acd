"""`AutoTokenizer` on the converted files gives the ids that the run was trained on, for any text, and the text back."""

from __future__ import annotations

import io
import json
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import sentencepiece
from transformers import AutoTokenizer

from megamult.data.sentencepiece_tokenizer import SentencePieceTokenizer
from megamult.huggingface import tokenizer as hf_tokenizer
from megamult.huggingface.tokenizer import convert, special_ids
from tests.huggingface.corpus import VOCAB, make_tokenizer, texts

MAX_LENGTH = 128


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tokenizer(tmp_path_factory.mktemp("tokenizer") / "tiny.model")


@pytest.fixture(scope="module")
def ours(model: Path) -> SentencePieceTokenizer:
    return SentencePieceTokenizer(model)


@pytest.fixture(scope="module")
def theirs(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """As a user loads it: from a folder with a Llama config.json and, for other programs, the sentencepiece model."""
    folder = tmp_path_factory.mktemp("export")
    for name, content in convert(model, MAX_LENGTH).items():
        (folder / name).write_bytes(content)
    (folder / "tokenizer.model").write_bytes(model.read_bytes())
    (folder / "config.json").write_text('{"model_type": "llama", "architectures": ["LlamaForCausalLM"]}')
    return AutoTokenizer.from_pretrained(folder)


def random_texts() -> Iterator[str]:
    draw = random.Random(1)
    hard = [" ", "  ", "\n", "\t", "\r\n", "\u2581", "\u2585", "<s>", "</s>", "<unk>", "<0x0A>", "<0x", ">", "\x00"]
    hard += [
        "é",
        "e\u0301",
        "中",
        "字",
        "🤗",
        "👩‍👧",
        "\ufeff",
        "\u3000",
        "\u00a0",
        "مر",
        "\U0010ffff",
        "a",
        "b",
        "ab",
        "aba",
        "=",
    ]
    valid = [c for c in range(0x110000) if not 0xD800 <= c < 0xE000]
    known = "".join(texts())
    for i in range(3000):
        parts = draw.choices(hard, k=draw.randint(0, 25))
        if i % 3 == 1:
            parts += [chr(c) for c in draw.choices(valid, k=5)]
        if i % 3 == 2:
            start = draw.randrange(len(known))
            parts.insert(draw.randint(0, len(parts)), known[start : start + 60])
        draw.shuffle(parts)
        yield "".join(parts)
    for n in range(70):  # every way to cut a run
        yield from ("a" * n, "=" * n, " " * n, "ab" * n, "aba" * n, "b" + "ab" * n + "a")


def test_ids_are_the_same_and_decoding_gives_the_text_back(ours: SentencePieceTokenizer, theirs: Any) -> None:
    samples = ["", *texts(), *random_texts()]
    for text, ids in zip(samples, theirs(samples)["input_ids"], strict=True):
        assert ids == ours.encode(text), repr(text)
        assert theirs.decode(ids) == text, repr(text)
        assert theirs.decode(ids, skip_special_tokens=True) == text, repr(text)


def test_no_token_is_put_around_a_text_whatever_is_asked(ours: SentencePieceTokenizer, theirs: Any) -> None:
    for text in ("", "ab", "</s>"):
        expected = ours.encode(text)
        assert theirs(text)["input_ids"] == theirs.encode(text, add_special_tokens=False) == expected
    assert set(theirs("ab")) == {"input_ids", "attention_mask"}  # what LlamaForCausalLM takes


def test_programs_that_look_for_these_fields_find_them(model: Path) -> None:
    config = json.loads(convert(model, MAX_LENGTH)["tokenizer_config.json"])
    # transformers 5 goes by tokenizer.json; converters to other formats, and transformers 4, by these.
    assert (config["add_bos_token"], config["add_eos_token"]) == (False, False)
    assert config["model_input_names"] == ["input_ids", "attention_mask"]


def test_special_tokens_have_their_ids(ours: SentencePieceTokenizer, theirs: Any) -> None:
    assert (theirs.unk_token_id, theirs.bos_token_id, theirs.eos_token_id) == (0, 1, ours.eod)
    assert theirs.convert_tokens_to_ids(["<unk>", "<s>", "</s>", "<0x00>"]) == [0, 1, 2, 3]
    assert len(theirs) == theirs.vocab_size == VOCAB
    assert theirs.model_max_length == MAX_LENGTH
    assert theirs.decode([1, *ours.encode("ab"), 2], skip_special_tokens=True) == "ab"


def test_bytes_that_are_no_text_are_marked_as_such(ours: SentencePieceTokenizer, theirs: Any) -> None:
    (start,) = theirs.convert_tokens_to_ids(["<0xE4>"])
    (a,) = ours.encode("a")
    assert theirs.decode([a, start, a]) == ours.decode([a, start, a]) == "a\ufffda"


def test_special_ids_leave_out_what_a_model_does_not_have(tmp_path: Path) -> None:
    (tmp_path / "m.model").write_bytes(trained(bos_id=-1, eos_id=1, byte_fallback=True))
    assert special_ids(tmp_path / "m.model") == {"eos_token_id": 1}


def trained(**settings: Any) -> bytes:
    """A sentencepiece model of someone else's settings."""
    writer = io.BytesIO()
    defaults = {
        "model_type": "bpe",
        "byte_fallback": True,
        "normalization_rule_name": "identity",
        "remove_extra_whitespaces": False,
        "add_dummy_prefix": False,
    }
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(texts()), model_writer=writer, vocab_size=350, minloglevel=2, **(defaults | settings)
    )
    return writer.getvalue()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"model_type": "unigram"}, "model_type is UNIGRAM, not BPE"),
        ({"byte_fallback": False}, "byte_fallback is False, not True, and its number of byte pieces is 0, not 256"),
        ({"add_dummy_prefix": True}, "add_dummy_prefix is True, not False"),
        ({"remove_extra_whitespaces": True}, "remove_extra_whitespaces is True"),
        ({"normalization_rule_name": "nmt_nfkc"}, r"size of the normalization rules is \d+, not 0"),
        ({"user_defined_symbols": ["<x>"]}, "number of unused and user-defined pieces is 1"),
        ({"treat_whitespace_as_suffix": True}, "treat_whitespace_as_suffix is True"),
    ],
)
def test_a_model_that_cannot_be_converted_is_refused(tmp_path: Path, settings: dict[str, Any], message: str) -> None:
    (tmp_path / "m.model").write_bytes(trained(**settings))
    with pytest.raises(
        ValueError, match=rf"m\.model cannot be converted, because its .*{message}.*: put the files of this tokenizer"
    ):
        convert(tmp_path / "m.model", MAX_LENGTH)


def test_our_settings_pass(tmp_path: Path) -> None:
    (tmp_path / "m.model").write_bytes(trained())
    assert set(convert(tmp_path / "m.model", MAX_LENGTH)) == {"tokenizer.json", "tokenizer_config.json"}


def test_a_conversion_with_other_ids_is_refused(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    merges = hf_tokenizer._merges
    monkeypatch.setattr(hf_tokenizer, "_merges", lambda *arguments: merges(*arguments)[1:])
    with pytest.raises(ValueError, match=r"gives .* the ids \[.*\], and its conversion gives \["):
        convert(model, MAX_LENGTH)
