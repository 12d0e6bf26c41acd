"""A run that an older version began goes on as it would have gone on there, in its own sharding and in another.

`old_run/README.md` says which version, and how its checkpoint and its losses were made. It went on bit by bit until
Newton-Schulz was computed otherwise (November 2026); since then it differs by rounding.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import yaml

from megamult.checkpoint.info import INFO
from megamult.checkpoint.storage import digest, read_sums
from tests.processes import run_distributed

OLD = Path(__file__).parent / "old_run"
CHECKPOINT = OLD / "step_4"
RECORDED = json.loads((OLD / "losses.json").read_text(encoding="utf-8"))
KEYS = ("step", "loss", "lr", "grad_norm", "multiplier_grad_norm")
OTHER = ["--parallel.tensor=1", "--parallel.zero_stage=3", "--train.micro_batch_size=4"]
SHARDINGS: dict[str, tuple[int, list[str]]] = {"own": (4, []), "other": (2, OTHER)}
"""Processes and settings, by the names that losses.json gives to what the old version did from the checkpoint."""
RELATIVE = 1e-5
"""As in test_resume.py: sums in another order differ by some 1e-7, and few steps amplify that little."""


def go_on(arguments: list[str]) -> None:
    """Run launch/pretrain.py's program on this rank, from the checkpoint to the last step."""
    from megamult.train import pretrain

    pretrain.main(arguments)


@pytest.fixture(scope="module", params=SHARDINGS)
def resumed(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, list[Any]]:
    """Name of a sharding, and what the run recorded of each step after the checkpoint's."""
    processes, settings = SHARDINGS[request.param]
    folder = tmp_path_factory.mktemp(request.param)
    stored = json.loads((CHECKPOINT / INFO).read_text(encoding="utf-8"))["config"]
    (folder / "config.yaml").write_text(yaml.safe_dump(stored), encoding="utf-8")
    arguments = [
        f"--config={folder / 'config.yaml'}",
        f"--checkpoint.load={CHECKPOINT}",
        f"--train.run_dir={folder / 'run'}",
        f"--data.train={OLD / 'data/corpus_train'}",
        f"--data.tokenizer={OLD / 'data/corpus.model'}",
        "--optimizer.muon.ns_form=standard",  # no measurement decides about rounding
        *settings,
    ]
    run_distributed(processes, go_on, arguments)
    lines = (folder / "run/metrics.jsonl").read_text(encoding="utf-8").splitlines()
    return request.param, [{key: record[key] for key in KEYS} for record in map(json.loads, lines)]


def test_an_old_run_goes_on_to_rounding(resumed: tuple[str, list[Any]]) -> None:
    """The reference is the run that did not stop, so a sharding that goes wrong in both versions is seen too."""
    _, records = resumed
    whole = RECORDED["whole"][4:]
    for key in KEYS:
        expected = [record[key] for record in whole]
        assert [record[key] for record in records] == pytest.approx(expected, rel=RELATIVE, abs=0.0), key


def test_the_old_checkpoint_is_as_the_old_version_wrote_it() -> None:
    """A wrong line ending or a file that git does not keep would show as another version's fault."""
    assert {name: digest(CHECKPOINT / name) for name in read_sums(CHECKPOINT)} == read_sums(CHECKPOINT)
    assert RECORDED["whole"][3]["step"] == 4 and len(RECORDED["whole"]) == 8
