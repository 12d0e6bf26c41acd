"""Falcon-H1 models import with their forward multipliers, merged or as initial multipliers, and export again."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from megamult.checkpoint.saved import SavedCheckpoint
from megamult.huggingface.exporting import export
from megamult.huggingface.forward_multipliers import assign
from megamult.huggingface.importing import import_
from megamult.models.falcon_h1.hf_config import from_hugging_face
from megamult.parameters.roles import resolve
from tests.huggingface import workers
from tests.huggingface.falcon_h1_workers import MODELS, NEW, PROMPT, SAVED, VOCAB, build, of_imports, tokens
from tests.processes import run_distributed

IMPORTS = {
    "no norm, untied": {"merge none": ("none", "merge"), "initial all": ("all", "initial")},
    "norm after gate, tied, two groups": {
        "merge all": ("all", "merge"),
        "initial all": ("all", "initial"),
        "initial scalar": ("scalar", "initial"),
    },
    "norm before gate, biases": {"merge all": ("all", "merge"), "initial symmetry_free": ("symmetry_free", "initial")},
}
"""(placement, where the forward multipliers go) of each import, by model."""
CASES = [(name, kind) for name, kinds in IMPORTS.items() for kind in kinds]
TOLERANCE = 1e-5
"""Difference of logits in fp32, whose standard deviation is near 1: sums of 100 terms in another order, in two layers
and a head."""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("falcon_h1")


@pytest.fixture(scope="module")
def theirs(folder: Path) -> dict[str, dict[str, Any]]:
    """Logits of transformers' own model, and its greedy tokens, by the model's name."""
    found = {}
    for name in MODELS:
        model = build(name)
        model.save_pretrained(folder / "original" / name)
        with torch.no_grad():
            greedy = model.generate(
                tokens()[:, :PROMPT], max_new_tokens=NEW, do_sample=False, eos_token_id=None, pad_token_id=0
            )
            found[name] = {"logits": model(tokens()).logits[0], "greedy": greedy[0, PROMPT:].tolist()}
    return found


@pytest.fixture(scope="module")
def ours(folder: Path, theirs: dict[str, dict[str, Any]]) -> dict[int, dict[str, dict[str, Any]]]:
    """Logits and greedy tokens of the imported models, by tensor-parallel size and "MODEL, IMPORT"."""
    for name, kind in CASES:
        import_(folder / "original" / name, folder / "imported" / f"{name}, {kind}", *IMPORTS[name][kind])  # type: ignore[arg-type]
    return {tensor: run_distributed(tensor, of_imports, folder / "imported", tensor)[0] for tensor in (1, 2)}


@pytest.mark.parametrize("tensor", [1, 2])
@pytest.mark.parametrize(("name", "kind"), CASES)
def test_an_import_computes_the_function_of_the_original(
    name: str, kind: str, tensor: int, theirs: dict[str, Any], ours: dict[int, dict[str, Any]]
) -> None:
    found, expected = ours[tensor][f"{name}, {kind}"], theirs[name]
    assert 0.2 < expected["logits"].std() < 2  # what the tolerance is made for
    torch.testing.assert_close(found["logits"], expected["logits"], rtol=0, atol=TOLERANCE)
    if kind.startswith("initial") and tensor == 1:
        assert found["greedy"] == expected["greedy"] and len(set(expected["greedy"])) > 1


@pytest.fixture(scope="module")
def trained(folder: Path) -> dict[str, dict[str, Any]]:
    """Logits of the training model at tensor parallel 2, by its name in SAVED."""
    return run_distributed(2, workers.save_all, folder / "trained", b"", SAVED)[0]


@torch.no_grad()
@pytest.mark.parametrize("name", SAVED)
def test_an_export_computes_what_a_model_with_multipliers_of_each_row_does(
    name: str, folder: Path, trained: dict[str, dict[str, Any]], tmp_path: Path
) -> None:
    export(folder / "trained" / name, tmp_path / "hf")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "hf", dtype="auto").eval()
    expected = trained[name]["logits"]
    assert 0.2 < expected.std() < 2  # what the tolerance is made for
    torch.testing.assert_close(model(workers.tokens()).logits[0], expected, rtol=0, atol=TOLERANCE)
    assert model.config.tie_word_embeddings == (name == "scalar, tied")


@pytest.mark.parametrize(("name", "kind"), CASES)
def test_an_export_of_an_import_computes_the_same_with_factors_of_1(
    name: str, kind: str, folder: Path, theirs: dict[str, Any], ours: dict[int, dict[str, Any]], tmp_path: Path
) -> None:
    export(folder / "imported" / f"{name}, {kind}", tmp_path / "hf")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "hf", dtype="auto").eval()
    with torch.no_grad():
        torch.testing.assert_close(model(tokens()).logits[0], theirs[name]["logits"], rtol=0, atol=TOLERANCE)
    config = json.loads((tmp_path / "hf" / "config.json").read_text())
    tied = MODELS[name].get("tie_word_embeddings", False)
    # A tied head does not have the embedding's multipliers: of these, config.json can hold one scalar.
    scalar = tied and kind == "initial scalar"
    assert config["embedding_multiplier"] == pytest.approx(5.1 if scalar else 1.0)
    card = (tmp_path / "hf" / "README.md").read_text()
    assert ("`embedding_multiplier`" in card) is scalar
    assert ("merged into the weights here" in card) is not kind.endswith("none")
    assert "- falcon_h1\n" in card and "\n# A FalconH1ForCausalLM trained" in card
    for row in ("mixer heads | 4", "channels of a mixer head | 12", "mixer state size | 10", "hidden size | 64"):
        assert f"| {row} |" in card
    assert config["tie_word_embeddings"] == (tied and kind not in ("initial all", "initial symmetry_free"))
    rest = {key: value for key, value in config.items() if key.endswith(("multiplier", "multipliers"))}
    del rest["embedding_multiplier"]
    assert {float(each) for value in rest.values() for each in (value if isinstance(value, list) else [value])} == {1.0}


def test_an_export_says_that_bf16_rounds_what_the_run_reads_in_fp32(
    folder: Path, ours: dict[int, dict[str, Any]], tmp_path: Path
) -> None:
    for dtype, rounded in (("bfloat16", True), ("float32", False)):
        done = export(folder / "imported" / "no norm, untied, merge none", tmp_path / dtype, dtype=dtype)
        said = "the run reads dt_bias, A_log, D in fp32, and bfloat16 rounds them"
        assert [note.startswith(said) for note in done.notes] == [False, True][: 1 + rounded]  # the first: no tokenizer


def test_initial_multipliers_are_the_factors_and_weights_are_those_of_the_file(
    folder: Path, ours: dict[int, dict[str, Any]]
) -> None:
    saved = SavedCheckpoint(folder / "imported" / "no norm, untied, initial all")
    layer = "model.decoder.layers.1.self_attention"
    for name, value in (
        ("mixer.in_proj.dt.row_multiplier", 1.4),
        ("mixer.in_proj.dt.col_multiplier", 1.25),
        ("mixer.out_proj.row_multiplier", 0.7),
        ("attention.linear_qkv.k.row_multiplier", 0.39),
        ("attention.linear_qkv.q.col_multiplier", 1.3),
    ):
        assert torch.all(saved.read(f"{layer}.{name}") == torch.tensor(value)), name
    original = build("no norm, untied").model.layers[1].mamba.in_proj.weight.detach()
    assert torch.equal(saved.read(f"{layer}.mixer.in_proj.dt.weight"), original[-4:])
    assert saved.read("model.embedding.word_embeddings.row_multiplier").shape == (VOCAB,)


def test_initial_multipliers_that_no_multiplier_would_get_are_refused() -> None:
    with pytest.raises(ValueError, match=r"forward_multipliers is initial, .*: the placement none gives it no mult"):
        assign({("k", "row"): 2.0}, "initial", {}, False)
    with pytest.raises(ValueError, match=r"forward_multipliers is initial, .*: it has no constant factors; use merge"):
        assign({}, "initial", resolve("all"), False)


UNSCALED = {"key_multiplier": 1.0, "attention_out_multiplier": 1.0, "mlp_multipliers": [1.0, 1.0]}
"""No factor of an output with a bias; those of inputs, of the mixer, the embedding and the head remain."""


@pytest.mark.parametrize(
    ("change", "read"),
    [
        (UNSCALED | {"attention_bias": True, "mlp_bias": True}, {"attention_bias": "all", "mlp_bias": True}),
        (UNSCALED | {"attention_bias": True, "mlp_multipliers": [2.0, 3.0]}, {"attention_bias": "all"}),
        ({"mlp_multipliers": [1.0, 1.0], "mlp_bias": True}, {"mlp_bias": True}),
        ({"time_step_limit": [0, {"__float__": "Infinity"}], "mamba_d_head": None}, {"ssm_head_dim": 12}),
        ({"mamba_d_ssm": None, "mamba_d_head": "auto"}, {"ssm_head_dim": 32}),
    ],
)
def test_what_the_model_can_compute_is_read(change: dict[str, Any], read: dict[str, Any]) -> None:
    config = build("no norm, untied").config.to_dict() | {"architectures": None} | change
    sizes = from_hugging_face(config)
    assert {key: getattr(sizes, key) for key in read} == read


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"mamba_proj_bias": True, "projectors_bias": True}, r"mamba_proj_bias is True.*; projectors_bias is True"),
        ({"key_multiplier": 0, "ssm_multipliers": [1, 1]}, r"key_multiplier is 0: .*ssm_multipliers is \[1, 1\]"),
        ({"time_step_limit": [0.001, 0.1]}, r"time_step_limit is \[0.001, 0.1\]: step sizes are not limited here"),
        ({"mamba_d_head": 10}, r"mamba_n_heads is 4 with mamba_d_head 10, mamba_d_ssm 48"),
        ({"time_step_limit": 5}, "time_step_limit is 5: step sizes are not limited here"),
        ({"time_step_limit": [0.0]}, r"time_step_limit is \[0.0\]: step sizes are not limited here"),
        ({"mamba_d_ssm": 48.0, "mamba_d_head": "auto"}, "mamba_d_ssm is 48.0: it must be a positive whole number"),
        ({"mamba_d_head": 12.0}, "mamba_d_head is 12.0: it must be a positive whole number"),
        ({"mamba_d_ssm": None, "mamba_expand": "x"}, "mamba_expand is 'x': it must be a positive number"),
        ({"attention_bias": True}, "attention_bias is true, and the forward multipliers of .* k, attention_out are"),
        (UNSCALED | {"attention_bias": True, "attention_out_multiplier": 2.0}, "of k, attention_out are not all 1"),
        (UNSCALED | {"mlp_bias": True, "mlp_multipliers": [1.0, 2.0]}, "mlp_bias is true, .* of gate, down are not"),
    ],
)
def test_what_the_model_cannot_compute_is_refused(change: dict[str, Any], said: str) -> None:
    config = build("no norm, untied").config.to_dict() | {"architectures": None} | change
    with pytest.raises(ValueError, match=said):
        from_hugging_face(config)
