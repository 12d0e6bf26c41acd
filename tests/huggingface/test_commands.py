"""launch/export_hf.py and launch/import_hf.py from the outside: one line for a user's mistake, exit code 2, no file."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from megamult.checkpoint.saved import SavedCheckpoint
from megamult.data.tokenizer_kinds import open_tokenizer
from megamult.huggingface.importing import import_
from megamult.models.llama.config import ModelConfig
from megamult.models.llama.hf_config import to_hugging_face
from megamult.models.llama.hf_names import weights
from megamult.train.command_line import parse
from tests.data.conftest import make_documents
from tests.data.test_tokenizer_kinds import byte_level
from tests.train.command import data_arguments, run, start

MODEL = ModelConfig(num_layers=1, hidden_size=8, num_attention_heads=2, ffn_hidden_size=12, vocab_size=20)


@pytest.fixture
def source(tmp_path: Path) -> Path:
    folder = tmp_path / "input"
    folder.mkdir()
    tensors = {weight.hugging_face: torch.randn(weight.shape) for weight in weights(MODEL, 20)}
    save_file(tensors, folder / "model.safetensors")
    config = to_hugging_face(MODEL, 20, tied=False, dtype="float32", token_ids={})
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def test_import_then_export(source: Path, tmp_path: Path) -> None:
    done = run("import_hf.py", "--input", source, "--output", tmp_path / "checkpoint", "--placement", "symmetry_free")
    assert (done.returncode, done.stderr) == (0, "")
    assert "note: the input has no tokenizer" in done.stdout
    configuration = tmp_path / "checkpoint" / "config.yaml"
    assert done.stdout.endswith(f"launch/pretrain.py --config {configuration} --data.train PREFIX_train\n")
    done = run(
        "export_hf.py", "--checkpoint", tmp_path / "checkpoint", "--output", tmp_path / "hf", "--dtype", "bfloat16"
    )
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.endswith("888 parameters in 12 tensors, bfloat16\n")
    original, exported = load_file(source / "model.safetensors"), load_file(tmp_path / "hf" / "model.safetensors")
    assert original.keys() == exported.keys()
    assert all(torch.equal(exported[name], original[name].bfloat16()) for name in original)


def test_a_mistake_is_one_line(source: Path, tmp_path: Path) -> None:
    before = sorted(tmp_path.rglob("*"))
    for script, arguments, message in (
        ("import_hf.py", ["--input", tmp_path / "no", "--output", tmp_path / "x"], "no/config.json cannot be read"),
        ("export_hf.py", ["--checkpoint", source, "--output", tmp_path / "x"], "is no complete checkpoint"),
    ):
        done = run(script, *arguments)
        assert (done.returncode, done.stdout, done.stderr.count("\n")) == (2, "", 1), done.stderr
        assert done.stderr.startswith("error: ") and message in done.stderr
    assert sorted(tmp_path.rglob("*")) == before


def _check_merged(saved: SavedCheckpoint, exported: Path) -> None:
    """Check that the export of a run that was clipped has the clipped multipliers merged."""
    tensors = load_file(exported / "model.safetensors")
    for role in "qk":
        module = f"model.decoder.layers.0.self_attention.linear_qkv.{role}"
        weight, row, col = (saved.read(f"{module}.{leaf}") for leaf in ("weight", "row_multiplier", "col_multiplier"))
        assert row.min() < 0.9, "clipped"
        found = tensors[f"model.layers.0.self_attn.{role}_proj.weight"]
        # A product of three, rounded to fp32 twice at most.
        torch.testing.assert_close(found, row.unsqueeze(1) * weight * col, rtol=3e-7, atol=0)


def test_an_imported_model_trains_on_and_leaves_with_its_own_tokenizer_files(corpus: Path, tmp_path: Path) -> None:
    """Pretrain, export, import, go on at another layout and length, export: the files that came with it are in it."""
    common = ["--config", "examples/configs/tiny.yaml", *data_arguments(corpus), "--train.steps", "2"]
    common += ["--optimizer.warmup_steps", "1"]
    clip = ["--multipliers.qk_clip", "0.05"]
    first = start([*common, *clip, "--model.seq_length", "32", "--train.run_dir", str(tmp_path / "one")])
    assert first.code == 0, first.text
    records = [json.loads(line) for line in (tmp_path / "one" / "metrics.jsonl").read_text().splitlines()]
    assert [record["qk_clip_heads"] > 0 for record in records if "loss" in record] == [True, True]
    one = tmp_path / "one" / "checkpoints" / "step_2"
    assert run("export_hf.py", "--checkpoint", one, "--output", tmp_path / "hf").returncode == 0
    _check_merged(SavedCheckpoint(one), tmp_path / "hf")
    config = json.loads((tmp_path / "hf" / "tokenizer_config.json").read_text()) | {"chat_template": "{{ 'mine' }}"}
    (tmp_path / "hf" / "tokenizer_config.json").write_text(json.dumps(config))
    imported = tmp_path / "two" / "checkpoints" / "step_0"
    assert run("import_hf.py", "--input", tmp_path / "hf", "--output", imported).returncode == 0
    changed = ["--model.seq_length", "16", "--train.seed", "5", "--train.run_dir", str(tmp_path / "two")]
    changed += ["--monitor.every", "1"]
    again = start([*common, *changed, "--checkpoint.load", "latest"])
    assert again.code == 0, again.text
    assert f"going on from {imported}: step 0, 0 sequences" in again.stdout
    monitored = (tmp_path / "two" / "metrics.jsonl").read_text()
    assert "equilibrium_rms/q" in monitored and "predicted_rms" not in monitored, "its weights were not drawn"
    two = tmp_path / "two" / "checkpoints" / "step_2"
    assert (SavedCheckpoint(one).info.drawn, SavedCheckpoint(two).info.drawn) == (True, False), "so say later starts"
    assert run("export_hf.py", "--checkpoint", two, "--output", tmp_path / "hf2").returncode == 0
    assert json.loads((tmp_path / "hf2" / "tokenizer_config.json").read_text()) == config
    before, after = (load_file(tmp_path / name / "model.safetensors") for name in ("hf", "hf2"))
    moved = [float((after[name] - before[name]).norm() / before[name].norm()) for name in before]
    # Two steps at 4e-3 move weights of 0.02; fresh ones, of another seed, would be off by sqrt(2) of their norm.
    assert 0 < max(moved) < 1, "it went on from the imported weights"


def test_a_tied_import_is_trained_folded_without_the_multipliers_of_the_embedding(corpus: Path, tmp_path: Path) -> None:
    """As the refusal of `folded` with the import's own placement advises: the others are all 1, and may be dropped."""
    sizes = ModelConfig(num_layers=1, hidden_size=16, num_attention_heads=2, ffn_hidden_size=24, seq_length=16)
    vocab_size = open_tokenizer(f"{corpus}.model").vocab_size
    tensors = {each.hugging_face: 0.05 * torch.randn(each.shape) for each in weights(sizes, vocab_size)}
    del tensors["lm_head.weight"]
    (tmp_path / "hub").mkdir()
    save_file(tensors, tmp_path / "hub" / "model.safetensors")
    described = to_hugging_face(sizes, vocab_size, tied=True, dtype="float32", token_ids={})
    (tmp_path / "hub" / "config.json").write_text(json.dumps(described))
    import_(tmp_path / "hub", tmp_path / "imported")
    common = ["--config", str(tmp_path / "imported" / "config.yaml"), *data_arguments(corpus), "--train.steps", "1"]
    folded = ["--multipliers.implementation", "folded", "--train.global_batch_size", "8"]
    with pytest.raises(ValueError, match="would reach the head too") as refused:
        parse([*common, *folded])
    placement = str(refused.value).partition("multipliers.placement {")[2].partition("}")[0]
    trained = start(
        [*common, *folded, "--multipliers.placement", f"{{{placement}}}", "--train.run_dir", str(tmp_path / "run")]
    )
    assert trained.code == 0, trained.text
    assert "note: multipliers that the checkpoint has and this run does not are dropped; they are all 1: embedding" in (
        trained.stdout
    )
    saved = SavedCheckpoint(tmp_path / "run" / "checkpoints" / "step_1")
    assert "model.decoder.layers.0.mlp.linear_fc2.row_multiplier" in saved.shapes
    assert not any("embedding" in name and name.endswith("multiplier") for name in saved.shapes)


def test_a_model_with_a_byte_level_tokenizer_goes_through_five_commands_and_no_file_is_edited(tmp_path: Path) -> None:
    """import_hf, prepare_data with the model's own tokenizer.json, pretrain, export_hf, generate."""
    hub = byte_level(tmp_path / "hub")
    files = {path.name: path.read_bytes() for path in hub.iterdir()}
    sizes = ModelConfig(num_layers=1, hidden_size=32, num_attention_heads=2, ffn_hidden_size=64, seq_length=32)
    tensors = {weight.hugging_face: 0.05 * torch.randn(weight.shape) for weight in weights(sizes, 512)}
    save_file(tensors, hub / "model.safetensors")
    described = to_hugging_face(sizes, 512, tied=False, dtype="float32", token_ids={"eos_token_id": 0})
    (hub / "config.json").write_text(json.dumps(described))
    (tmp_path / "d.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in make_documents(80)))

    start_at, corpus = tmp_path / "imported", tmp_path / "corpus"
    assert run("import_hf.py", "--input", hub, "--output", start_at).returncode == 0
    prepared = run("prepare_data.py", "--input", tmp_path / "d.jsonl", "--output", corpus, "--tokenizer", hub)
    assert (prepared.returncode, prepared.stderr) == (0, ""), prepared.stderr
    common = ["--config", str(start_at / "config.yaml"), "--data.train", f"{corpus}_train"]
    common += ["--train.run_dir", str(tmp_path / "run"), "--train.global_batch_size", "8"]
    trained = start([*common, "--train.steps", "5"])
    assert trained.code == 0, trained.text
    assert f"going on from {start_at}: step 0, 0 sequences" in trained.stdout
    # The same file starts the run again where it was, once it has a checkpoint of its own.
    again = [*common, "--train.steps", "7", "--checkpoint.load", "latest"]
    assert f"going on from {tmp_path / 'run' / 'checkpoints' / 'step_5'}" in start(again).stdout
    last = tmp_path / "run" / "checkpoints" / "step_7"
    assert run("export_hf.py", "--checkpoint", last, "--output", tmp_path / "out").returncode == 0
    assert {name: (tmp_path / "out" / name).read_bytes() for name in files} == files, "as they came"
    assert json.loads((tmp_path / "out" / "config.json").read_text())["eos_token_id"] == 0
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "out")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    ids = tokenizer("document number", return_tensors="pt").input_ids
    assert ids[0].tolist() == open_tokenizer(f"{corpus}_tokenizer").encode("document number")
    text = tokenizer.decode(model.generate(ids, max_new_tokens=4, do_sample=False)[0])
    assert text.startswith("document number")
