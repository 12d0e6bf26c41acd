"""Encode then decode is the identity, ids are fixed, and every mistake is a ValueError with a remedy."""

from __future__ import annotations

import io
import random
import re
from pathlib import Path

import pytest
import sentencepiece

from megamult.data.sentencepiece_tokenizer import BOS_ID, EOS_ID, UNK_ID, SentencePieceTokenizer, train_tokenizer

NASTY = [
    "",
    " ",
    "  leading and trailing  ",
    "a\n\nb\n",
    "\ttab\t\ttabs",
    "\r\n\r",
    "\x00\x01\x1f\x7f",
    "<s></s><unk><0x0A>",
    "\u2581",
    "a\u2581 \u2581\u2581b \u2581",
    "\u2585 block \u2047",
    "e\u0301 é ﬁ Å ½ \ufeff\u200b\u00a0\u3000",
    "\ufffd\uffff\U0010ffff",
    "🤗👩‍👩‍👧",
    "中文\u2028日本語",
]


@pytest.mark.parametrize("text", NASTY)
def test_decode_inverts_encode(tokenizer: SentencePieceTokenizer, text: str) -> None:
    assert tokenizer.decode(tokenizer.encode(text)) == text


def test_decode_inverts_encode_on_random_unicode(tokenizer: SentencePieceTokenizer) -> None:
    draw = random.Random(1)
    valid = [c for c in range(0x110000) if not 0xD800 <= c < 0xE000]
    for _ in range(300):
        common = draw.choices(" \n\tab\u2581\u2585", k=10)
        text = "".join(draw.sample(common + [chr(c) for c in draw.choices(valid, k=10)], 20))
        assert tokenizer.decode(tokenizer.encode(text)) == text


def test_special_ids_are_fixed_and_never_come_from_text(tokenizer: SentencePieceTokenizer) -> None:
    processor = sentencepiece.SentencePieceProcessor(model_file=tokenizer.path)
    assert (processor.unk_id(), processor.bos_id(), processor.eos_id()) == (UNK_ID, BOS_ID, EOS_ID) == (0, 1, 2)
    assert processor.pad_id() == -1
    assert tokenizer.eod == 2 and tokenizer.vocab_size == 400
    assert not {0, 1, 2} & {i for text in NASTY for i in tokenizer.encode(text)}
    # Megatron takes any `pad` it finds for padding, which it zeroes and masks.
    assert not hasattr(tokenizer, "pad")


def test_training_is_deterministic_and_the_digest_is_of_the_contents(
    documents: list[str], tokenizer: SentencePieceTokenizer, tmp_path: Path
) -> None:
    for name, size in (("again", 400), ("other", 390)):
        train_tokenizer(documents, size, tmp_path / name)
    assert (tmp_path / "again").read_bytes() == Path(tokenizer.path).read_bytes()
    again, other = SentencePieceTokenizer(tmp_path / "again"), SentencePieceTokenizer(tmp_path / "other")
    assert again.unique_identifiers == tokenizer.unique_identifiers != other.unique_identifiers
    assert sorted(p.name for p in tmp_path.iterdir()) == ["again", "other"]


@pytest.mark.parametrize("mark", ["\u2581", "\u2585", "\n", "\t", "\x00", "x" * 200_000])
def test_no_training_text_is_dropped(tmp_path: Path, mark: str) -> None:
    """sentencepiece skips sentences that are long or hold its own marks; the rest of them must count."""
    text = mark + " Quizzical Quizzical"
    train_tokenizer([text] * 3 + ["some other words"], 284, tmp_path / "m", character_coverage=1.0)
    assert len(SentencePieceTokenizer(tmp_path / "m").encode("Quizzical")) < len("Quizzical")


def test_an_impossible_vocabulary_size_names_the_possible_one(documents: list[str], tmp_path: Path) -> None:
    for asked in (100_000, 262, 259, 0, -5):
        with pytest.raises(ValueError, match=re.escape(f"vocab_size is {asked}")) as caught:
            train_tokenizer(documents, asked, tmp_path / "m")
        possible = [int(n) for n in re.findall(r"ask for (?:at least )?(\d+)", str(caught.value))]
        if asked > 259:
            train_tokenizer(documents, possible[0], tmp_path / "m")
            assert SentencePieceTokenizer(tmp_path / "m").vocab_size == possible[0]
        else:
            assert possible == [260]
    with pytest.raises(ValueError, match="no text"):
        train_tokenizer([], 300, tmp_path / "m")


def test_missing_and_damaged_files(tmp_path: Path, model: Path) -> None:
    with pytest.raises(ValueError, match=r"nowhere\.model \(No such file"):
        SentencePieceTokenizer(tmp_path / "nowhere.model")
    for content in (b"", b"\x00garbage" * 40, model.read_bytes()[:1000]):
        (tmp_path / "damaged.model").write_bytes(content)
        with pytest.raises(ValueError, match=rf"damaged\.model \({len(content)} bytes\)"):
            SentencePieceTokenizer(tmp_path / "damaged.model")


def test_a_model_without_eos_is_refused(tmp_path: Path, documents: list[str]) -> None:
    writer = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(documents), model_writer=writer, vocab_size=100, eos_id=-1, minloglevel=2
    )
    (tmp_path / "m.model").write_bytes(writer.getvalue())
    with pytest.raises(ValueError, match="no eos token"):
        SentencePieceTokenizer(tmp_path / "m.model")
