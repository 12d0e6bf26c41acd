"""examples/reproduce: the report's figures from runs whose losses are known, and runs that were interrupted."""

from __future__ import annotations

import ctypes
import importlib
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest

from examples.running.attempts import attempts, record_attempt
from examples.running.curves import read_curves

FOLDER = Path(__file__).resolve().parents[1] / "examples" / "reproduce"


@pytest.fixture
def report(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(FOLDER)
    return importlib.import_module("report")


@pytest.fixture
def train(report: ModuleType) -> ModuleType:
    return importlib.import_module("train")


def _write_run(directory: Path, valid: list[float]) -> None:
    """Ten steps for every valid loss; the training loss is above it by 1."""
    directory.mkdir(parents=True)
    records = []
    for part, loss in enumerate(valid):
        records += [{"step": 10 * part + step, "loss": loss + 1} for step in range(1, 11)]
        records.append({"step": 10 * part + 10, "valid_loss": loss})
    (directory / "metrics.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))


def _cells(table: str, row: str) -> list[str]:
    (line,) = (line for line in table.splitlines() if line.startswith(f"| {row} |"))
    return [cell.strip() for cell in line.strip("|").split("|")][1:]


def test_the_report_has_the_last_valid_losses_their_means_and_sample_deviations(
    report: ModuleType, tmp_path: Path
) -> None:
    pytest.importorskip("matplotlib", reason="the extra `reproduce` brings it")
    # Deviations of 1, 2, 3 and of 4, 6, 8 tenths with n - 1: 0.1 and 0.2.
    for seed, none, layer in ((1, 5.4, 5.1), (2, 5.6, 5.2), (3, 5.8, 5.3)):
        for implementation, last in (("none", none), ("layer", layer)):
            directory = report.run_dir(tmp_path, implementation, seed)
            _write_run(directory, [7.0, last])
            record_attempt(directory, 100.0, 75)
            record_attempt(directory, 50.5, 0)
    text = report.write(tmp_path, (1, 2, 3), "the command")
    assert _cells(text, "without multipliers") == ["5.4000", "5.6000", "5.8000", "5.6000 ± 0.2000", "0.4000"]
    assert _cells(text, "with multipliers") == ["5.1000", "5.2000", "5.3000", "5.2000 ± 0.1000", "0.2000"]
    assert _cells(text, "difference") == ["-0.3000", "-0.4000", "-0.5000", "-0.4000", ""]
    assert "20 steps" in text and "`the command`" in text
    assert "15 min 3 s for 6 runs in 12 starts" in text, "six times 150.5 s"
    assert (tmp_path / "report.md").read_text() == text
    assert (tmp_path / report.PLOT).read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(
    ("without", "with_multipliers", "said"),
    [
        ((5.0, 5.1, 5.2), (4.0, 4.3, 4.1), "lower by 0.9667 nats per token, beyond the spread of the seeds (0.3000"),
        ((4.0, 4.3, 4.1), (5.0, 5.1, 5.2), "higher by 0.9667 nats per token, beyond the spread of the seeds (0.3000"),
        ((5.0, 5.3, 5.1), (4.9, 5.2, 5.0), "-0.1000 nats per token, within the spread of the seeds (0.3000)"),
        ((5.0, 5.0, 5.0), (4.9, 4.5, 5.2), "-0.1333 nats per token, within the spread of the seeds (0.7000)"),
        ((5.0,), (1.0,), "One seed says nothing"),
    ],
    ids=["better", "worse", "lower for every seed, and within", "within the spread of one", "one seed"],
)
def test_a_difference_counts_only_beyond_the_wider_spread_of_the_seeds(
    report: ModuleType, without: tuple[float, ...], with_multipliers: tuple[float, ...], said: str
) -> None:
    verdict = report.verdict(without, with_multipliers)
    assert said in verdict
    assert ("do not tell the two apart" in verdict) == ("within" in said)
    lower = sum(a < b for a, b in zip(with_multipliers, without, strict=True))
    assert len(without) == 1 or f"lower for {lower} of {len(without)} seeds" in verdict


@pytest.mark.parametrize(
    ("lines", "said"),
    [
        ('{"step": 10, "valid_loss": 5.0}\n{"step": 11, "loss": 6.0}\n', "not complete"),
        ('{"step": 10, "loss": 6.0}\n', "not complete"),
        ('{"step": 10, "loss": null}\n{"step": 10, "valid_loss": null}\n', "diverged"),
    ],
    ids=["steps after the last evaluation", "no evaluation", "not finite"],
)
def test_a_run_without_a_result_has_no_report(tmp_path: Path, lines: str, said: str) -> None:
    (tmp_path / "metrics.jsonl").write_text(lines)
    with pytest.raises(ValueError, match=said):
        read_curves(tmp_path)


def test_complete_runs_are_not_repeated_and_a_failed_one_is_started_again(
    train: ModuleType, report: ModuleType, tmp_path: Path
) -> None:
    healed = tmp_path / "healed"
    calls = tmp_path / "calls"

    def command(run_dir: Path, implementation: str, seed: int) -> list[str]:
        fails = f"test {implementation}_{seed} != layer_2 || test -e {healed}"
        return ["bash", "-c", f"echo {implementation}_{seed} >>{calls}; echo a word; {fails} || exit 3"]

    with pytest.raises(train.Failed, match=r"layer, seed 2 ended with exit code 3[^$]*a word"):
        train.train(tmp_path, command, (1, 2, 3))
    assert calls.read_text().split() == ["none_1", "layer_1", "none_2", "layer_2"]
    healed.touch()
    calls.unlink()
    train.train(tmp_path, command, (1, 2, 3))
    assert calls.read_text().split() == ["layer_2", "none_3", "layer_3"]
    train.train(tmp_path, command, (1, 2, 3))
    assert len(calls.read_text().split()) == 3
    codes = [attempt.exit_code for attempt in attempts(report.run_dir(tmp_path, "layer", 2))]
    assert codes == [3, 0]


@pytest.fixture
def first_process() -> Iterator[None]:
    """This process inherits orphans, as the first one of a container does."""
    subreaper, prctl = 36, ctypes.CDLL(None).prctl
    assert prctl(subreaper, 1, 0, 0, 0) == 0
    yield
    prctl(subreaper, 0, 0, 0, 0)


def test_a_signal_ends_the_run_in_progress_after_it_has_saved(
    train: ModuleType, first_process: None, tmp_path: Path
) -> None:
    began, saved = tmp_path / "began", tmp_path / "saved"
    # The script ends at the signal, its child half a second later, as ranks do that write a checkpoint.
    child = f"trap 'sleep 0.5; touch {saved}; exit' TERM; touch {began}; while :; do sleep 0.1; done"
    words = ["bash", "-c", f"bash -c {json.dumps(child)} & wait"]
    asked = []

    def interrupt() -> None:
        while not began.exists():
            time.sleep(0.05)
        asked.append(time.monotonic())
        os.kill(os.getpid(), signal.SIGTERM)

    threading.Thread(target=interrupt).start()
    with pytest.raises(train.Interrupted):
        train.started(words, tmp_path / "log")
    assert saved.exists()
    # It waits for the child and no longer, though nobody but this process buries it.
    assert time.monotonic() - asked[0] < 30
    assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL


def test_runs_of_other_settings_in_the_same_folder_are_refused(train: ModuleType, tmp_path: Path) -> None:
    train.claim(tmp_path, {"steps": 300, "further": []})
    train.claim(tmp_path, {"steps": 300, "further": []})
    with pytest.raises(ValueError, match="give another --output"):
        train.claim(tmp_path, {"steps": 300, "further": ["--optimizer.lr", "1e-3"]})


def test_every_run_is_given_keys_that_pretrain_knows() -> None:
    script = (
        "import sys; sys.path.insert(0, 'examples/reproduce'); import train; from pathlib import Path;"
        "from megamult.train.command_line import parse;"
        "pairs = train.keys(Path('r'), 'none', 3, 300).items();"
        "words = [f'--{key}={value}' for key, value in pairs];"
        "config, _ = parse(['--config', 'examples/configs/quickstart.yaml', *words]);"
        "print(config.train.steps, config.train.seed, config.optimizer.decay_steps, config.multipliers.implementation)"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, cwd=FOLDER.parents[1])
    assert done.stdout.split() == ["300", "3", "150", "none"], done.stderr
