"""launch/export_hf.py and launch/import_hf.py from the outside: one line for a user's mistake, exit code 2, no file."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from megamult.checkpoint.saved import SavedCheckpoint
from megamult.models.llama.config import ModelConfig
from megamult.models.llama.hf_config import to_hugging_face
from megamult.models.llama.hf_names import weights
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
    assert done.stdout.endswith(f"to continue from it: --checkpoint.load {tmp_path / 'checkpoint'}\n")
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
