"""The index of a coming epoch is built beside training, with the same bytes, and nothing is built without need."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from megamult.data.epochs import to_json
from megamult.runtime.partial import partial_folder
from tests.data.conftest import distinct_ids, of, window

Write = Callable[..., str]


def test_no_list_of_documents_stays_in_memory(write_indexed: Write, make: Callable) -> None:
    dataset = make(write_indexed("a", distinct_ids(0, 1)))
    window(dataset[0])
    assert len(dataset._sources[0]._epochs[0].indices) == 0


def built(folder: Path) -> dict[str, bytes]:
    return {str(f.relative_to(folder)): f.read_bytes() for f in sorted(folder.rglob("*")) if f.is_file()}


def test_the_next_epoch_is_built_before_it_is_needed_with_the_same_bytes(
    write_indexed: Write, make: Callable, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    a, b = write_indexed("a", distinct_ids(0, 1)), write_indexed("b", distinct_ids(5000, 2))
    expected = make(a, b, cache_dir=tmp_path / "expected")
    per_epoch = expected.samples_per_epoch[0]
    expected.prepare(0, 4 * per_epoch)
    samples = of(expected, range(4 * per_epoch))

    dataset = make(a, b)
    dataset.prepare(0, 4, end=4 * per_epoch)
    process = dataset._ahead._process
    assert process is not None and process.wait(60) == 0
    # Both sources' second epochs; no third one is needed yet.
    assert sorted(p.name for p in tmp_path.glob("cache/*/*")) == ["epoch_0", "epoch_0", "epoch_1", "epoch_1"]
    assert built(tmp_path / "cache") == built(tmp_path / "expected")

    def build(*_: object) -> None:
        raise AssertionError("built at its turn")

    with monkeypatch.context() as patch:
        patch.setattr("megatron.core.datasets.gpt_dataset._build_document_index", build)
        for first in range(0, 4 * per_epoch, 4):
            dataset.prepare(first, first + 4, end=4 * per_epoch)
        assert of(dataset, range(4 * per_epoch - 4, 4 * per_epoch)) == samples[-4:]
    dataset.close()


def test_nothing_is_built_ahead_that_the_run_does_not_reach(write_indexed: Write, make: Callable) -> None:
    dataset = make(write_indexed("a", distinct_ids(0, 1)))
    (per_epoch,) = dataset.samples_per_epoch
    dataset.prepare(0, 4, end=per_epoch)
    assert dataset._ahead._process is None
    dataset.prepare(per_epoch - 1, per_epoch + 1, end=per_epoch + 1)
    assert dataset._ahead._process is None


def test_a_failure_to_build_ahead_is_said_and_the_epoch_is_built_at_its_turn(
    write_indexed: Write, make: Callable, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    dataset = make(write_indexed("a", distinct_ids(0, 1)))
    (per_epoch,) = dataset.samples_per_epoch
    wrong = replace(dataset._sources[0].epochs, prefix="nowhere")  # it fails while it builds
    monkeypatch.setattr("megamult.data.ahead.to_json", lambda _, epoch: to_json(wrong, epoch))
    dataset.prepare(0, 4, end=3 * per_epoch)
    process = dataset._ahead._process
    assert process is not None and process.wait(60) == 1
    dataset.prepare(per_epoch, per_epoch + 1, end=3 * per_epoch)
    said = capsys.readouterr().err
    assert said.count("\n") == 1
    assert said.startswith("warning: indices of coming epochs could not be built ahead (AssertionError: One or")
    assert window(dataset[per_epoch])
    dataset.close()


def test_an_epoch_that_the_builder_has_not_come_to_is_not_waited_for_and_one_that_it_is_at_is(
    write_indexed: Write, make: Callable, monkeypatch: pytest.MonkeyPatch
) -> None:
    dataset = make(write_indexed("a", distinct_ids(0, 1)))
    (per_epoch,) = dataset.samples_per_epoch
    dataset.prepare(0, 4, end=3 * per_epoch)
    process, slept = dataset._ahead._process, []
    assert process is not None
    os.kill(process.pid, signal.SIGSTOP)  # busy for ever, and at nothing
    dataset.prepare(per_epoch, per_epoch + 1, end=3 * per_epoch)
    path = dataset._sources[0].epochs.path(2)
    dataset._ahead._given.add(path)
    with partial_folder(path) as folder:

        def finish(_: float) -> None:
            slept.append(1)
            folder.rename(path)

        monkeypatch.setattr("megamult.data.ahead.time.sleep", finish)
        dataset._ahead.wait_for(dataset._sources[0].epochs, 2)
    assert slept == [1]
    dataset.close()
    assert process.poll() is not None


def test_the_builder_ends_with_its_run(write_indexed: Write, make: Callable, monkeypatch: pytest.MonkeyPatch) -> None:
    dataset = make(write_indexed("a", distinct_ids(0, 1)))
    dataset.prepare(0, 4, end=10 * dataset.samples_per_epoch[0])
    process = dataset._ahead._process
    assert process is not None and process.stdin is not None
    process.stdin.close()  # as the kernel does where the run is killed
    assert process.wait(60) in (0, 1)
