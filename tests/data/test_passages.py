"""Passages of long documents: the same token ids as the whole, and memory that does not grow with the text."""

from __future__ import annotations

import json
import random
import subprocess
import sys
from pathlib import Path

import pytest

from megamult.data import passages
from megamult.data.documents import Document
from megamult.data.encoding import encode_in_order, encode_passage
from megamult.data.sentencepiece_tokenizer import SentencePieceTokenizer
from megamult.data.tokenizer import Tokenizer
from tests.data.conftest import make_documents
from tests.processes import REPOSITORY, starts_processes


def mixed_texts() -> list[str]:
    draw = random.Random(3)
    parts = [
        *make_documents(9, seed=5),
        "  ",
        "\n\n",
        "\u2581",
        "\u2585",
        "\u4e2d\u6587",
        "\U0001f468\u200d",
        "0123",
        "zz",
    ]
    return ["".join(draw.choices(parts, k=draw.randint(1, 30))) for _ in range(60)]


def test_passages_have_the_ids_of_the_whole(model: Path, tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(passages, "PASSAGE_CHARS", 7)
    texts = mixed_texts()
    documents = [Document(f"line {number}", text, 0) for number, text in enumerate(texts)]
    cut = list(passages.cut(documents, tokenizer))
    assert len(cut) > 1000
    found: list[list[int]] = [[]]
    for each in encode_in_order(documents, model, None, workers=1):
        assert each.changed is None
        found[-1] += each.ids.tolist()
        found += [[]] if each.last else []
    assert found == [*([*tokenizer.encode(text), tokenizer.eod] for text in texts), []]
    assert "".join(passage.text for passage in cut) == "".join(texts)
    for passage in cut:
        text = texts[int(passage.place.removeprefix("line "))]
        assert text[passage.start :].startswith(passage.text)
        assert passage.last == (passage.start + len(passage.text) == len(text))


def test_a_cut_within_a_token_would_change_the_ids(tokenizer: Tokenizer) -> None:
    assert_cuts_keep_ids(tokenizer, mixed_texts()[0])


def assert_cuts_keep_ids(tokenizer: Tokenizer, text: str) -> None:
    """Cut a text everywhere: where the ids change, it may not be cut, and there are both kinds of places."""
    can_cut = tokenizer.places_to_cut()
    assert can_cut is not None
    whole = tokenizer.encode(text)
    places = range(1, len(text))
    changed = {at for at in places if tokenizer.encode(text[:at]) + tokenizer.encode(text[at:]) != whole}
    allowed = {at for at in places if can_cut(text, at)}
    assert changed and allowed and not changed & allowed


@pytest.mark.parametrize(
    "change", [{"model_type": "unigram"}, {"add_dummy_prefix": True}, {"normalization_rule_name": "nfkc"}]
)
def test_documents_are_not_cut_where_ids_could_depend_on_more_than_tokens(
    change: dict[str, object], documents: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import sentencepiece

    options = {
        "model_type": "bpe",
        "add_dummy_prefix": False,
        "normalization_rule_name": "identity",
        "remove_extra_whitespaces": False,
    }
    prefix = str(tmp_path / "m")
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(documents), model_prefix=prefix, vocab_size=120, minloglevel=2, **options | change
    )
    tokenizer = SentencePieceTokenizer(f"{prefix}.model")
    assert tokenizer.places_to_cut() is None
    monkeypatch.setattr(passages, "PASSAGE_CHARS", 7)
    assert [passage.text for passage in passages.cut([Document("", documents[0], 0)], tokenizer)] == [documents[0]]


def test_a_text_without_a_place_to_cut_is_one_passage(tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(passages, "PASSAGE_CHARS", 7)
    monkeypatch.setattr(type(tokenizer), "places_to_cut", lambda self: lambda text, at: False)
    assert [passage.text for passage in passages.cut([Document("", "a" * 50, 0)], tokenizer)] == ["a" * 50]


def test_a_change_of_the_text_is_placed_in_the_document(tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tokenizer, "decode", lambda ids: "tent")
    encoded = encode_passage(passages.Passage("a, line 3", 100, "text", last=True), tokenizer)
    assert encoded.changed == "a, line 3, from character 102 on, 'xt' is decoded as 'nt'"


def test_memory_is_a_few_times_the_longest_document(tmp_path: Path, model: Path) -> None:
    starts_processes()
    program = (
        "import sys; from megamult.data.corpus import prepare_corpus\n"
        "prepare_corpus([sys.argv[1]], sys.argv[2], tokenizer=sys.argv[3], valid_fraction=0)\n"
        # ru_maxrss would contain the peak of the process that started this one.
        "print(next(line.split()[1] for line in open('/proc/self/status') if line.startswith('VmHWM')))"
    )
    text = "\n".join(make_documents(2000))
    peaks, sizes = [], [len(text), 8 * len(text)]
    for times in (1, 8):
        path = tmp_path / f"{times}.jsonl"
        path.write_text(json.dumps({"text": text * times}), encoding="utf-8")
        command = [sys.executable, "-c", program, str(path), str(tmp_path / "out"), str(model)]
        found = subprocess.run(command, capture_output=True, text=True, check=True, cwd=REPOSITORY)
        peaks.append(1024 * int(found.stdout))
    # Measured: 6 times, of which 2 are a passage within sentencepiece. Without passages it takes 54 times the text.
    assert peaks[1] - peaks[0] < 15 * (sizes[1] - sizes[0])
