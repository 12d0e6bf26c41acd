"""An export computes what the training model computes, whatever held it; and is there whole or not at all."""

from __future__ import annotations

import json
import weakref
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

from megamult.checkpoint.chunks import Chunk
from megamult.checkpoint.saved import SavedCheckpoint, write
from megamult.data.sentencepiece_tokenizer import SentencePieceTokenizer
from megamult.effective.reading import EffectiveModel
from megamult.huggingface import exporting as hf_export
from megamult.huggingface.exporting import export
from megamult.huggingface.importing import import_
from megamult.huggingface.model_card import render
from megamult.models.llama.hf_names import weights
from megamult.parameters.roles import resolve
from tests.huggingface.corpus import VOCAB, make_tokenizer
from tests.huggingface.workers import CASES, GREEDY, GREEDY_CASES, PROMPT, run_all, tokens, value_of
from tests.processes import run_distributed

TOLERANCE = 1e-5
"""Of logits of up to 5. Each is the end of some 20 sums of 96 to 132 terms in fp32, which the two programs add in
different orders, and of rotary angles: relative errors of 6e-8 that grow as the root of their number, 5 * 6e-8 *
sqrt(200) = 4e-6, and a few times more for the largest of 100,000 logits. Both programs are that far (3e-6 to 6e-6)
from the same model in float64. One multiplier, one head's place or the epsilon of the norms wrong is 1e-3 or more."""


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tokenizer(tmp_path_factory.mktemp("tokenizer") / "tiny.model")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("checkpoints")


@pytest.fixture(scope="module")
def original(folder: Path) -> LlamaForCausalLM:
    """A model that transformers made, saved in `folder`/original."""
    config = LlamaConfig(
        vocab_size=VOCAB,
        hidden_size=96,
        intermediate_size=132,
        num_hidden_layers=2,
        num_attention_heads=12,
        num_key_value_heads=2,
        max_position_embeddings=512,
        rms_norm_eps=1e-3,
        rope_parameters={"rope_type": "default", "rope_theta": 500.0},
    )
    torch.manual_seed(1)
    model = LlamaForCausalLM(config).eval()
    for name, parameter in model.named_parameters():
        torch.nn.init.normal_(parameter, mean=float("norm" in name), std=0.03 if "k_proj" in name else 0.1)
    model.save_pretrained(folder / "original")
    return model


@pytest.fixture(scope="module")
def trained(folder: Path, tokenizer: Path, original: LlamaForCausalLM) -> dict[str, dict[str, Any]]:
    import_(folder / "original", folder / "imported")
    return run_distributed(2, run_all, folder, tokenizer.read_bytes(), folder / "imported")[0]


@pytest.fixture
def checkpoint(trained: dict[str, dict[str, Any]], folder: Path) -> Path:
    return folder / "all"


@torch.no_grad()
@pytest.mark.parametrize("name", CASES)
def test_logits_are_the_training_model_s(
    trained: dict[str, dict[str, Any]], folder: Path, tmp_path: Path, name: str
) -> None:
    done = export(folder / name, tmp_path / "hf")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "hf", dtype="auto")
    assert model.dtype == torch.float32 and type(model).__name__ == "LlamaForCausalLM"
    expected = trained[name]["logits"]
    assert expected.std() > 0.5 and expected.abs().max() < 6  # what the tolerance is made for
    torch.testing.assert_close(model(tokens()).logits[0], expected, rtol=0, atol=TOLERANCE)
    if name in GREEDY_CASES:
        prompt = tokens()[:, :PROMPT]
        written = model.generate(prompt, max_new_tokens=GREEDY, do_sample=False)[0, PROMPT:].tolist()
        assert len(written) == GREEDY and len(set(written)) > 3
        assert written == trained[name]["greedy"]
    parted = CASES[name].tied and "embedding" in resolve(CASES[name].placement)
    assert model.config.tie_word_embeddings == (CASES[name].tied and not parted)
    assert any("tie_word_embeddings false" in note for note in done.notes) == parted


@torch.no_grad()
def test_an_imported_model_computes_what_it_did(trained: dict[str, dict[str, Any]], original: LlamaForCausalLM) -> None:
    expected = original(tokens()).logits[0]
    assert expected.std() > 0.5 and expected.abs().max() < 6
    torch.testing.assert_close(trained["imported"]["logits"], expected, rtol=0, atol=TOLERANCE)


def test_multipliers_that_a_run_trained_are_not_all_1(checkpoint: Path) -> None:
    model = EffectiveModel(SavedCheckpoint(checkpoint))
    assert not any(model.all_ones(role, side) for role, sides in resolve("all").items() for side in sides)


def test_the_tokenizer_beside_the_model_is_the_run_s(checkpoint: Path, tokenizer: Path, tmp_path: Path) -> None:
    export(checkpoint, tmp_path / "hf")
    theirs, text = AutoTokenizer.from_pretrained(tmp_path / "hf"), "  a </s>\n\u2581 \U0001f917"
    assert theirs(text)["input_ids"] == SentencePieceTokenizer(tokenizer).encode(text)
    assert theirs.model_max_length == CASES["all"].config.model.seq_length


def test_names_and_shapes_are_those_of_the_training_model(trained: dict[str, dict[str, Any]]) -> None:
    for name, case in CASES.items():
        placement = resolve(case.placement) if case.implementation != "none" else {}
        expected = {}
        for weight in weights(case.config.model, VOCAB):
            if not (weight.role == "head" and case.tied):
                stored = {"vector": weight.shape, "scalar": (1,), "frozen": None}[weight.norm]
                expected |= {} if stored is None else {weight.logical: stored}
                expected |= weight.multipliers(placement)
        assert trained[name]["shapes"] == {f"model.{key}": shape for key, shape in expected.items()}


def test_shards_hold_every_tensor_once_and_the_index_finds_it(checkpoint: Path, tmp_path: Path) -> None:
    export(checkpoint, tmp_path / "one")
    export(checkpoint, tmp_path / "many", max_shard_size="100KB")
    whole = load_file(tmp_path / "one" / "model.safetensors")
    index = json.loads((tmp_path / "many" / "model.safetensors.index.json").read_text())
    files = sorted(path.name for path in (tmp_path / "many").glob("*.safetensors"))
    assert len(files) > 3 and files[0] == f"model-00001-of-{len(files):05d}.safetensors"
    assert set(index["weight_map"].values()) == set(files)
    assert index["metadata"]["total_size"] == sum(tensor.nbytes for tensor in whole.values())
    found: dict[str, torch.Tensor] = {}
    for file in files:
        with safe_open(tmp_path / "many" / file, framework="pt") as shard:
            assert shard.metadata() == {"format": "pt"}
        shard = load_file(tmp_path / "many" / file)
        assert len(shard) == 1 or sum(tensor.nbytes for tensor in shard.values()) <= 100_000
        assert not found.keys() & shard.keys() and {index["weight_map"][name] for name in shard} == {file}
        found |= shard
    assert found.keys() == whole.keys() and all(torch.equal(found[name], whole[name]) for name in whole)
    assert not (tmp_path / "one" / "model.safetensors.index.json").exists()


def test_one_shard_is_in_memory_at_a_time(checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    alive: list[weakref.ref[torch.Tensor]] = []
    read = SavedCheckpoint.read

    def watched_read(self: SavedCheckpoint, *rows: Any) -> torch.Tensor:
        # The tensors of one shard, of which none is larger than the vocabulary's, and those that are being merged.
        held = sum(tensor.nbytes for tensor in (reference() for reference in alive) if tensor is not None)
        assert held <= 200_000
        tensor = read(self, *rows)
        alive.append(weakref.ref(tensor))
        return tensor

    def watched_save(shard: dict[str, torch.Tensor], path: Path, metadata: dict[str, str]) -> None:
        assert all(reference() is None for reference in saved)
        saved.extend(weakref.ref(tensor) for tensor in shard.values())
        save_file(shard, path, metadata)

    saved: list[weakref.ref[torch.Tensor]] = []
    monkeypatch.setattr(SavedCheckpoint, "read", watched_read)
    monkeypatch.setattr(hf_export, "save_file", watched_save)
    export(checkpoint, tmp_path / "hf", max_shard_size="100KB")
    assert len(saved) == 21 and len(alive) > len(saved)


@pytest.mark.parametrize(("asked", "run", "expected"), [("auto", "bf16", "bfloat16"), ("float16", "fp32", "float16")])
def test_weights_are_cast_after_they_are_merged(
    checkpoint: Path, tmp_path: Path, asked: str, run: str, expected: str
) -> None:
    copy = edited(checkpoint, tmp_path / "checkpoint", dtype=run)
    assert export(copy, tmp_path / "hf", dtype=asked).dtype == expected
    found = load_file(tmp_path / "hf" / "model.safetensors")
    assert json.loads((tmp_path / "hf" / "config.json").read_text())["dtype"] == expected
    dtype = getattr(torch, expected)
    assert {tensor.dtype for tensor in found.values()} == {dtype}
    base = "model.decoder.layers.1.mlp.linear_fc1.up"
    shape = CASES["all"].config.model.ffn_hidden_size, CASES["all"].config.model.hidden_size
    weight, row, col = (
        value_of(f"{base}.{leaf}", of)
        for leaf, of in (("weight", shape), ("row_multiplier", shape[:1]), ("col_multiplier", shape[1:]))
    )
    merged = (weight.double() * row.double()[:, None] * col.double()).to(torch.float32)
    # Once cast, half an ulp away from what exact arithmetic gives, and that rarely (fp32's own rounding).
    different = found["model.layers.1.mlp.up_proj.weight"] != merged.to(dtype)
    assert different.float().mean() < 1e-3


def edited(checkpoint: Path, path: Path, dtype: str = "fp32", **tensors: torch.Tensor | None) -> Path:
    """A copy of a checkpoint, of a run in `dtype`, with other tensors (None: without it)."""
    source = SavedCheckpoint(checkpoint)
    source.info.config["train"]["dtype"] = dtype
    kept = {name: source.read(name) for name in source.shapes if name.startswith("model.")} | tensors
    chunks = [Chunk.whole(name, tensor) for name, tensor in kept.items() if tensor is not None]
    write(path, chunks, source.info, {})
    return path


HEAD, NORM = "model.output_layer.weight", "model.decoder.final_layernorm.weight"
MISTAKES = [
    ({HEAD: None}, {}, r"has no tensor under model\.output_layer\.weight, where .* asks for \(400, 96\)"),
    ({NORM: torch.ones(95)}, {}, r"has \(95,\) under model\.decoder\.final_layernorm\.weight, .* asks for \(96,\)"),
    ({"model.x.bias": torch.ones(3)}, {}, r"holds model\.x\.bias, which its configuration does not have"),
    ({NORM: torch.full((96,), 7e4)}, {"dtype": "float16"}, r"model\.norm\.weight holds 70000, and the largest"),
    ({}, {"dtype": "int8"}, r"dtype is 'int8': use auto, float32, bfloat16, float16"),
    ({}, {"max_shard_size": "5"}, r"max_shard_size is '5': give a number and KB, MB"),
]


@pytest.mark.parametrize(("tensors", "options", "message"), MISTAKES)
def test_what_cannot_be_exported_is_refused_and_leaves_nothing(
    checkpoint: Path, tmp_path: Path, tensors: dict[str, Any], options: dict[str, str], message: str
) -> None:
    copy = edited(checkpoint, tmp_path / "checkpoint", **tensors)
    with pytest.raises(ValueError, match=message):
        export(copy, tmp_path / "hf", **options)
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint"]


def test_a_damaged_checkpoint_is_not_exported(checkpoint: Path, tmp_path: Path) -> None:
    copy = edited(checkpoint, tmp_path / "checkpoint")
    (shard,) = copy.glob("shard_*")
    content = bytearray(shard.read_bytes())
    content[-5] ^= 1
    shard.write_bytes(content)
    with pytest.raises(ValueError, match="another checksum"):
        export(copy, tmp_path / "hf")
    with pytest.raises(ValueError, match="there is no checkpoint"):
        export(tmp_path / "nowhere", tmp_path / "hf")
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint"]


def test_an_output_that_is_there_is_left_alone(checkpoint: Path, tmp_path: Path) -> None:
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "mine").write_text("kept")
    (tmp_path / "file").write_text("kept")
    for name in ("full", "file"):
        with pytest.raises(ValueError, match=f"{name} exists and is"):
            export(checkpoint, tmp_path / name)
    assert (tmp_path / "full" / "mine").read_text() == (tmp_path / "file").read_text() == "kept"
    (tmp_path / "empty").mkdir()
    export(checkpoint, tmp_path / "empty")
    assert (tmp_path / "empty" / "config.json").exists()


def test_an_interrupted_export_leaves_nothing(
    checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*arguments: Any, **options: Any) -> None:
        assert [path.name for path in tmp_path.iterdir()] != ["hf"]
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(hf_export, "save_file", full)
    with pytest.raises(OSError, match="No space left"):
        export(checkpoint, tmp_path / "hf")
    assert list(tmp_path.iterdir()) == []


def test_the_card_gives_the_run_s_figures(checkpoint: Path, tmp_path: Path) -> None:
    done = export(checkpoint, tmp_path / "hf")
    card = (tmp_path / "hf" / "README.md").read_text()
    assert card.startswith("---\nlibrary_name: transformers\n")
    for row in ("| optimizer steps | 7 |", "| tokens | 57,344 |", "| loss | 2.34567 |", "| vocabulary | 400 |"):
        assert row in card
    assert "- llama\n" in card and "# A LlamaForCausalLM trained" in card and "mixer" not in card
    parameters = sum(tensor.numel() for tensor in load_file(tmp_path / "hf" / "model.safetensors").values())
    assert done.parameters == parameters and f"{parameters:,} parameters, float32, after 7 optimizer steps" in card
    assert "arxiv.org/abs/2601.04890" in card and "placement `all`" in card
    assert f"| torch | {torch.__version__} |" in card


def test_the_card_says_how_the_batch_grew(checkpoint: Path, tmp_path: Path) -> None:
    export(checkpoint, tmp_path / "hf")
    info, exported = SavedCheckpoint(checkpoint).info, json.loads((tmp_path / "hf" / "config.json").read_text())
    for ramp, said in (
        ({"start": 8, "increment": 4, "samples": 1200}, "8, growing by 4 to 32 over 1,200 sequences"),
        ({"start": None, "increment": None, "samples": None}, "32"),
        (None, "32"),  # a checkpoint of a version without ramps
    ):
        info.config["train"] = {**info.config["train"], "global_batch_size": 32, "batch_ramp": ramp}
        if ramp is None:
            del info.config["train"]["batch_ramp"]
        assert f"| sequences per step | {said} |" in render(info, exported, 1000, False)


def test_the_directory_is_complete_and_readable_by_others(checkpoint: Path, tokenizer: Path, tmp_path: Path) -> None:
    done = export(checkpoint, tmp_path / "hf")
    found = {path.name for path in (tmp_path / "hf").iterdir()}
    assert (
        found
        == set(done.files)
        == {
            "README.md",
            "config.json",
            "generation_config.json",
            "model.safetensors",
            "tokenizer.json",
            "tokenizer.model",
            "tokenizer_config.json",
        }
    )
    assert (tmp_path / "hf" / "tokenizer.model").read_bytes() == tokenizer.read_bytes()
    assert json.loads((tmp_path / "hf" / "generation_config.json").read_text()) == {
        "bos_token_id": 1,
        "eos_token_id": 2,
    }
    (tmp_path / "made").mkdir()
    (tmp_path / "written").touch()
    assert (tmp_path / "hf").stat().st_mode == (tmp_path / "made").stat().st_mode
    assert {path.stat().st_mode for path in (tmp_path / "hf").iterdir()} == {(tmp_path / "written").stat().st_mode}


def test_a_checkpoint_without_tokenizer_is_exported_without_and_says_so(checkpoint: Path, tmp_path: Path) -> None:
    done = export(edited(checkpoint, tmp_path / "checkpoint"), tmp_path / "hf")
    assert [note for note in done.notes if "no tokenizer" in note]
    assert not list((tmp_path / "hf").glob("tokenizer*"))
    assert json.loads((tmp_path / "hf" / "config.json").read_text())["eos_token_id"] is None


def test_tokenizer_files_beside_the_checkpoint_count(checkpoint: Path, tmp_path: Path) -> None:
    copy = edited(checkpoint, tmp_path / "checkpoint")
    (copy / "hf_tokenizer").mkdir()
    for name, content in {
        "vocab.json": "mine",
        "generation_config.json": '{"eos_token_id": [7, 9], "temperature": 0.5}',
        "model.safetensors": "not copied",
    }.items():
        (copy / "hf_tokenizer" / name).write_text(content)
    export(copy, tmp_path / "hf")
    assert (tmp_path / "hf" / "vocab.json").read_text() == "mine"
    assert json.loads((tmp_path / "hf" / "config.json").read_text())["eos_token_id"] == [7, 9]
    assert json.loads((tmp_path / "hf" / "generation_config.json").read_text())["temperature"] == 0.5
    assert len(load_file(tmp_path / "hf" / "model.safetensors")) == 21
