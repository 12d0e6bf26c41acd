"""Every published family: its import and export compute what transformers computes, and training goes on as theirs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from megamult.huggingface.exporting import export
from megamult.huggingface.importing import import_
from tests.huggingface.families import FAMILIES, IMPLEMENTATIONS, text, train_imported, train_theirs
from tests.processes import run_distributed

TOLERANCE = 1e-5
"""Largest difference of logits of at most 6 and of losses near 7: in fp32, sums of 100 terms in another order, in two
layers and a head."""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("families")


@pytest.fixture(scope="module")
def theirs(folder: Path) -> dict[str, dict[str, Any]]:
    """Logits of transformers' own model and the losses of its training, by family."""
    found = {}
    for name, published in FAMILIES.items():
        model = published.build()
        model.save_pretrained(folder / name / "original")
        with torch.no_grad():
            logits = model(text()[:1, :-1]).logits[0]
        found[name] = {"logits": logits, "losses": train_theirs(model)}
    return found


@pytest.fixture(scope="module")
def imported(folder: Path, theirs: dict[str, dict[str, Any]]) -> Path:
    for name in FAMILIES:
        import_(folder / name / "original", folder / name / "checkpoint")
    return folder


@pytest.fixture(scope="module")
def trained(imported: Path) -> dict[int, dict[str, dict[str, Any]]]:
    """Results of :func:`train_imported` by tensor-parallel size. With two ranks, sequence parallelism is on too."""
    return {size: run_distributed(size, train_imported, imported, size, size == 2)[0] for size in (1, 2)}


@torch.no_grad()
@pytest.mark.parametrize("name", FAMILIES)
def test_an_export_of_an_import_is_the_original(
    name: str, imported: Path, theirs: dict[str, dict[str, Any]], tmp_path: Path
) -> None:
    export(imported / name / "checkpoint", tmp_path / "hf")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "hf", dtype="auto")
    family = FAMILIES[name].exported or FAMILIES[name].family
    assert type(model).__name__ == f"{family}ForCausalLM"
    expected = theirs[name]["logits"]
    assert expected.std() > 0.3 and expected.abs().max() < 6  # what the tolerance is made for
    # The same weights in the same or an equal class.
    assert torch.equal(model(text()[:1, :-1]).logits[0], expected)
    if family == FAMILIES[name].family:
        paths = imported / name / "original", tmp_path / "hf"
        before, after = (AutoConfig.from_pretrained(path).to_dict() | {"_name_or_path": ""} for path in paths)
        assert {key: after[key] for key in before} == before


@pytest.mark.parametrize("tensor", [1, 2])
@pytest.mark.parametrize("name", FAMILIES)
def test_training_from_an_import_is_that_of_transformers(
    name: str, tensor: int, theirs: dict[str, dict[str, Any]], trained: dict[int, dict[str, dict[str, Any]]]
) -> None:
    for implementation in IMPLEMENTATIONS:
        ours = trained[tensor][f"{name} {implementation}"]
        torch.testing.assert_close(ours["logits"], theirs[name]["logits"], rtol=0, atol=TOLERANCE)
        # Multipliers change the training from the second loss on.
        same = 3 if implementation == "none" else 1
        assert ours["losses"][:same] == pytest.approx(theirs[name]["losses"][:same], abs=TOLERANCE)
        assert ours["losses"] == pytest.approx(
            trained[1][f"{name} layer" if same == 1 else f"{name} none"]["losses"], abs=TOLERANCE
        )
    assert trained[tensor][f"{name} layer"]["losses"][-1] < theirs[name]["losses"][0] - 0.1
    apart = [trained[tensor][f"{name} {each}"]["losses"][-1] for each in ("layer", "none")]
    assert abs(apart[0] - apart[1]) > 10 * TOLERANCE
