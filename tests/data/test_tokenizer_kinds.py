"""Tokenizers in Hugging Face's format give the ids of `transformers`; every kind is known by its content."""

from __future__ import annotations

import json
import random
import re
from pathlib import Path
from typing import Any

import pytest
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from megamult.config import Config
from megamult.data.corpus import prepare_corpus
from megamult.data.described import describe
from megamult.data.hugging_face_tokenizer import HuggingFaceTokenizer, special_ids
from megamult.data.sentencepiece_tokenizer import SentencePieceTokenizer
from megamult.data.token_ids import TokenIds
from megamult.data.tokenizer_files import tokenizer_identities
from megamult.data.tokenizer_kinds import open_tokenizer
from megamult.huggingface.tokenizer import convert
from megamult.train.corpora import vocabulary
from tests.data.conftest import make_documents
from tests.data.test_tokenizer import NASTY

EOS, OTHER = "<|endoftext|>", "<|im_end|>"


def byte_level(directory: Path, **more: Any) -> Path:
    """A byte-level BPE of 500 tokens with its files, as GPT-2's, Llama 3's or Qwen's."""
    made = Tokenizer(models.BPE())
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=500, special_tokens=[EOS], initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False
    )
    made.train_from_iterator(make_documents(61), trainer)
    made.add_special_tokens([AddedToken(OTHER, special=True)])
    if more.get("normalized"):
        made.normalizer = normalizers.NFC()
    if more.get("truncated"):
        made.enable_truncation(4)
        made.enable_padding(length=8)
    directory.mkdir()
    made.save(str(directory / "tokenizer.json"))
    eos = {"__type": "AddedToken", "content": EOS, "lstrip": False, "normalized": False, "rstrip": False}
    config = {
        "eos_token": eos | {"single_word": False},
        "bos_token": OTHER,
        "tokenizer_class": "PreTrainedTokenizerFast",
    }
    (directory / "tokenizer_config.json").write_text(json.dumps(config))
    (directory / "chat_template.jinja").write_text("{{ messages }}")
    return directory


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return byte_level(tmp_path_factory.mktemp("hf") / "byte level")


def hard_strings(count: int) -> list[str]:
    draw = random.Random(1)
    valid = [c for c in range(0x110000) if not 0xD800 <= c < 0xE000]
    common = [" ", "  ", "\n", "\t", "\r\n", "1234", "'ll", "don't", EOS, OTHER, "<|", "\u2581", "e\u0301", "\x00"]
    made = [*NASTY]
    while len(made) < count:
        pieces = draw.choices(common, k=6) + [chr(c) for c in draw.choices(valid, k=6)]
        made.append("".join(draw.sample(pieces, len(pieces))))
    return made


@pytest.mark.parametrize("more", [{}, {"truncated": True}, {"normalized": True}], ids=["plain", "truncated", "NFC"])
def test_ids_are_those_of_transformers_without_special_tokens_at_the_ends(tmp_path: Path, more: dict[str, Any]) -> None:
    ours = HuggingFaceTokenizer(byte_level(tmp_path / "t", **more))
    theirs = PreTrainedTokenizerFast(tokenizer_file=str(tmp_path / "t" / "tokenizer.json"))
    texts = hard_strings(1000)
    expected = theirs(texts, add_special_tokens=False, truncation=False, padding=False)["input_ids"]
    for text, ids in zip(texts, expected, strict=True):
        assert ours.encode(text) == ids, text
        assert more.get("normalized") or ours.decode(ids) == text
    assert 0 in ours.encode(f"a{EOS}b") and ours.vocab_size == 501 and ours.eod == 0
    assert not hasattr(ours, "pad")
    with pytest.raises(ValueError, match="is not valid Unicode: remove lone surrogates"):
        ours.encode("half \ud83d")


def test_a_directory_or_its_file_is_opened_by_its_content(folder: Path, model: Path, tmp_path: Path) -> None:
    whole, file = open_tokenizer(folder), open_tokenizer(folder / "tokenizer.json")
    assert isinstance(whole, HuggingFaceTokenizer) and isinstance(file, HuggingFaceTokenizer)
    assert whole.sha256 == file.sha256 and whole.unique_identifiers == file.unique_identifiers
    content = {path.name: path.read_bytes() for path in folder.iterdir()}
    assert whole.files() == file.files() == {f"hf_tokenizer/{name}": each for name, each in content.items()}
    assert tokenizer_identities(content) == {whole.defined_by: whole.sha256} and len(content) == 3
    (tmp_path / "named.anyhow").write_bytes(model.read_bytes())
    assert isinstance(open_tokenizer(tmp_path / "named.anyhow"), SentencePieceTokenizer)
    both = byte_level(tmp_path / "both")
    (both / "tokenizer.model").write_bytes(model.read_bytes())
    assert isinstance(open_tokenizer(both), HuggingFaceTokenizer), "as for transformers"
    (both / "tokenizer.json").unlink()
    opened = open_tokenizer(both)
    assert opened.files() == {"tokenizer.model": model.read_bytes()} and opened.eod == 2


def test_an_export_of_ours_gives_the_ids_of_the_model_it_was_made_from(model: Path, tmp_path: Path) -> None:
    """Its tokenizer_config.json says that the text of a special token in a document is no special token."""
    for name, content in convert(model, 64).items():
        (tmp_path / name).write_bytes(content)
    theirs, ours = SentencePieceTokenizer(model), open_tokenizer(tmp_path)
    assert isinstance(ours, HuggingFaceTokenizer) and ours.eod == theirs.eod
    for text in hard_strings(200) + ["a</s>b", "<s>x", "<unk>"]:
        assert ours.encode(text) == theirs.encode(text), text


def test_index_files_of_earlier_versions_keep_their_names(model: Path) -> None:
    """Megatron hashes these values into the names, and a run that resumes must find its files."""
    tokenizer = SentencePieceTokenizer(model)
    assert tokenizer.unique_identifiers == {"class": "megamult.Tokenizer", "sha256": tokenizer.sha256}
    assert SentencePieceTokenizer(model, eod=5).unique_identifiers == tokenizer.unique_identifiers


@pytest.mark.parametrize("file", ["generation_config.json", "config.json"])
def test_the_id_of_a_models_configuration_ends_documents_if_no_token_is_named(
    folder: Path, tmp_path: Path, file: str
) -> None:
    (tmp_path / "tokenizer.json").write_bytes((folder / "tokenizer.json").read_bytes())
    (tmp_path / file).write_text(json.dumps({"eos_token_id": [7, 9]}))
    assert open_tokenizer(tmp_path).eod == 7


def test_a_directory_that_holds_something_else_is_not_replaced(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "d.txt").write_text("\n\n".join(make_documents(9)))
    kept = tmp_path / "c_tokenizer"
    kept.mkdir()
    (kept / "notes.txt").write_text("mine")
    with pytest.raises(ValueError, match=r"c_tokenizer holds notes\.txt, which are no files of a tokenizer: choose"):
        prepare_corpus([tmp_path / "d.txt"], tmp_path / "c", vocab_size=300)
    assert (kept / "notes.txt").read_text() == "mine"
    (tmp_path / "l_tokenizer").symlink_to(kept)
    with pytest.raises(ValueError, match="l_tokenizer is a symbolic link"):
        prepare_corpus([tmp_path / "d.txt"], tmp_path / "l", tokenizer=folder)


def test_the_end_of_document_token_is_the_files_or_the_given_one(folder: Path, tmp_path: Path, model: Path) -> None:
    assert [open_tokenizer(folder, eod).eod for eod in (None, OTHER, 7)] == [0, 500, 7]
    assert open_tokenizer(model, "</s>").eod == 2 and open_tokenizer(model, 9).eod == 9
    assert special_ids({path.name: path.read_bytes() for path in folder.iterdir()}) == {
        "bos_token_id": 500,
        "eos_token_id": 0,
    }
    bare = tmp_path / "tokenizer.json"
    bare.write_bytes((folder / "tokenizer.json").read_bytes())
    message = rf"does not say which token ends a document .*special tokens are '{re.escape(EOS)}', '{re.escape(OTHER)}'"
    with pytest.raises(ValueError, match=message):
        open_tokenizer(bare)
    assert open_tokenizer(bare, EOS).eod == 0
    (tmp_path / "special_tokens_map.json").write_text(json.dumps({"eos_token": OTHER}))
    assert open_tokenizer(bare).eod == 500
    for path, eod in ((folder, "<nothing>"), (folder, 501), (folder, -1), (model, "<nothing>"), (model, 400)):
        with pytest.raises(ValueError, match=rf"has no token {re.escape(repr(eod))}, which is given as eod"):
            open_tokenizer(path, eod)


def test_what_is_no_tokenizer_is_named_with_its_remedy(tmp_path: Path) -> None:
    cases: list[tuple[Path, bytes | None, str]] = [
        (tmp_path / "nothing", None, r"cannot read the tokenizer .*nothing .*or a tokenizer\.json"),
        (tmp_path / "cut.json", b'{"version": "1.0", "mod', r"cut\.json is no tokenizer\.json that the library"),
        (tmp_path / "other.json", b'{"hidden_size": 3}', r"other\.json is no tokenizer\.json that the library"),
        (tmp_path / "text", b"some text", r"is neither a sentencepiece model nor a tokenizer\.json, or is damaged"),
        (tmp_path, None, r"has neither tokenizer\.json nor tokenizer\.model: give the directory of"),
    ]
    for path, content, message in cases:
        if content is not None:
            path.write_bytes(content)
        with pytest.raises(ValueError, match=message):
            open_tokenizer(path)
    for name in ("vocab.json", "merges.txt"):
        (tmp_path / name).write_text("")
    with pytest.raises(ValueError, match=r"only vocab\.json and merges\.txt: .*write tokenizer\.json with save_pre"):
        open_tokenizer(tmp_path)


def test_a_corpus_has_the_tokenizers_files_beside_it_and_its_end_of_document(
    folder: Path, model: Path, tmp_path: Path
) -> None:
    (tmp_path / "d.txt").write_text("\n\n".join(make_documents(9)))
    made = prepare_corpus([tmp_path / "d.txt"], tmp_path / "c", tokenizer=folder, valid_fraction=0.3, workers=2)
    beside = tmp_path / "c_tokenizer"
    assert (made.tokenizer, made.changed, made.vocab_size) == (beside, 0, 501)
    assert {p.name: p.read_bytes() for p in beside.iterdir()} == {p.name: p.read_bytes() for p in folder.iterdir()}
    prefix = str(tmp_path / "c_train")
    assert describe(prefix, open_tokenizer(beside)).stamped
    with pytest.raises(ValueError, match=r"end with the token 0, and .* is 500: set data\.eod to 0"):
        describe(prefix, open_tokenizer(beside, OTHER))
    with pytest.raises(ValueError, match=r"data\.tokenizer is not set, and data source .*c_train was encoded with"):
        describe(prefix, TokenIds(501, 0))
    with pytest.raises(ValueError, match=r"was encoded with another tokenizer than"):
        describe(prefix, open_tokenizer(model))
    # The other kind replaces it, and leaves nothing that could be taken for the corpus' tokenizer.
    assert prepare_corpus([tmp_path / "d.txt"], tmp_path / "c", tokenizer=model).tokenizer == tmp_path / "c.model"
    assert not beside.exists()
    again = prepare_corpus([tmp_path / "d.txt"], tmp_path / "c", tokenizer=folder / "tokenizer.json", eod=OTHER)
    assert again.tokenizer == beside and not (tmp_path / "c.model").exists()
    assert describe(prefix, open_tokenizer(beside, 500)).stamped
    again = prepare_corpus([tmp_path / "d.txt"], tmp_path / "c", tokenizer=folder)
    assert sorted(p.name for p in tmp_path.iterdir() if p.name.startswith((".", "c"))) == [
        "c_tokenizer",
        *(f"c_{part}.{end}" for part in ("train", "valid") for end in ("bin", "idx", "stamp.json")),
    ]


def test_text_that_a_normalization_changes_is_counted(tmp_path: Path) -> None:
    (tmp_path / "d.txt").write_text("plain text\n\ncafe\u0301 there\n\nanother e\u0301\n\nfourth")
    tokenizer = byte_level(tmp_path / "t", normalized=True)
    made = prepare_corpus([tmp_path / "d.txt"], tmp_path / "c", tokenizer=tokenizer, valid_fraction=0)
    assert made.changed == 2 and made.first_change is not None
    assert made.first_change.endswith(
        "d.txt, line 3, from character 3 on, 'e\u0301 there' is decoded as '\u00e9 there'"
    )


def test_a_run_without_a_tokenizer_needs_the_vocabulary_size_and_the_end_of_document() -> None:
    config = Config()
    config.model.vocab_size, config.data.eod = 1000, 7
    tokenizer, size = vocabulary(config)
    assert (size, tokenizer.vocab_size, tokenizer.eod, tokenizer.sha256, tokenizer.files()) == (1000, 1000, 7, None, {})
    assert not hasattr(tokenizer, "pad")
    for vocab_size, eod in ((None, 7), (1000, None), (1000, EOS)):
        config.model.vocab_size, config.data.eod = vocab_size, eod
        with pytest.raises(ValueError, match=r"data\.tokenizer is not set, with model\.vocab_size .*, or, for corpora"):
            vocabulary(config)
    config.model.vocab_size, config.data.eod = 1000, 1000
    with pytest.raises(ValueError, match=r"data\.eod is 1000 and model\.vocab_size is 1000: .* an id from 0 to 999"):
        vocabulary(config)
