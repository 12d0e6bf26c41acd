"""Configurations of earlier versions: which optimizer they count for, and where they may come from."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from megamult.optim.config import MuonConfig, OptimizerConfig
from megamult.train.command_line import parse


@pytest.mark.parametrize(
    ("words", "momentum"),
    [
        (["--config", "{old}", "--config={muon}"], 0.9),
        (["--config={muon}", "--config", "{nameless}"], 0.9),
        (["--config", "{old}", "--optimizer", "{{name: muon}}"], 0.9),
        (["--optimizer.name", "muon", "--config", "{old}"], None),
        (["--config", "{muon}", "--config", "{old}"], None),
        (["--config", "{nameless}"], None),
        (["--config", "{nameless}", "--optimizer.name=muon", "--optimizer.name=adamw"], None),
    ],
)
def test_an_old_file_counts_for_the_optimizer_that_is_named_last_and_without_a_name_for_adamw(
    words: list[str], momentum: float | None, tmp_path: Path
) -> None:
    optimizers = {"old": "{name: adamw, momentum: 0.9}", "nameless": "{momentum: 0.9}", "muon": "{name: muon}"}
    files = {name: tmp_path / f"{name}.yaml" for name in optimizers}
    for name, optimizer in optimizers.items():
        files[name].write_text(f"optimizer: {optimizer}\n", encoding="utf-8")
    config, _ = parse([word.format(**files) for word in words])
    muon = None if momentum is None else MuonConfig(momentum)
    assert config.optimizer == OptimizerConfig(name="adamw" if muon is None else "muon", muon=muon)


def test_an_old_configuration_may_come_through_a_pipe() -> None:
    reader, writer = os.pipe()
    with open(writer, "w", encoding="utf-8") as pipe:
        pipe.write("optimizer: {name: muon, momentum: 0.9}\n")
    try:
        config, _ = parse(["--config", f"/dev/fd/{reader}"])
    finally:
        os.close(reader)
    assert config.optimizer == OptimizerConfig(name="muon", muon=MuonConfig(0.9))
