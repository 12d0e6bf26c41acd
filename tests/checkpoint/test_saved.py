"""A checkpoint directory: what is written is read whatever the rectangles, damage is named, nothing is executed."""

from __future__ import annotations

import json
import pickle
import re
import subprocess
from pathlib import Path
from unittest import mock

import pytest
import torch
from safetensors.torch import load_file, save
from torch import Tensor

from megamult.checkpoint import directory, saved, storage
from megamult.checkpoint.chunks import Chunk
from megamult.checkpoint.index import INDEX
from megamult.checkpoint.info import INFO, CheckpointInfo
from megamult.checkpoint.saved import SavedCheckpoint

INFORMATION = CheckpointInfo(step=1, samples=16, config={"model": {}}, vocab_size=10)


def rectangle(name: str, tensor: Tensor, rows: slice, cols: slice) -> Chunk:
    """A view of a matrix."""
    view = tensor[rows, cols]
    return Chunk(name, tuple(tensor.shape), (rows.start, cols.start), tuple(view.shape), lambda: view, tensor.dtype)


def tiles(name: str, tensor: Tensor) -> list[Chunk]:
    """As flat intervals leave them: the rest of a row, whole rows, the beginning of a row."""
    where = [
        (slice(0, 2), slice(0, 7)),
        (slice(2, 3), slice(0, 3)),
        (slice(2, 3), slice(3, 7)),
        (slice(3, 5), slice(0, 7)),
    ]
    return [rectangle(name, tensor, rows, cols) for rows, cols in where]


@pytest.fixture
def matrix() -> Tensor:
    return torch.randn(5, 7, generator=torch.Generator().manual_seed(0))


@pytest.fixture
def whole(tmp_path: Path, matrix: Tensor) -> Path:
    path = tmp_path / "step_1"
    state = torch.arange(16, dtype=torch.uint8)
    saved.write(path, [*tiles("model.w", matrix), Chunk.whole("rng.x", state)], INFORMATION, {"a/note.txt": b"hello"})
    return path


def test_what_was_written_is_read_into_other_rectangles(whole: Path, matrix: Tensor) -> None:
    checkpoint = SavedCheckpoint(whole)
    checkpoint.verify()
    assert checkpoint.info == INFORMATION
    assert checkpoint.shapes == {"model.w": (5, 7), "rng.x": (16,)}
    assert torch.equal(checkpoint.read("model.w"), matrix)
    assert torch.equal(checkpoint.read("rng.x"), torch.arange(16, dtype=torch.uint8))
    target = torch.zeros(5, 7)
    checkpoint.load(
        [
            rectangle("model.w", target, slice(1, 4), slice(2, 5)),
            rectangle("model.w", target, slice(4, 5), slice(0, 1)),
        ]
    )
    expected = torch.zeros(5, 7)
    expected[1:4, 2:5], expected[4, 0] = matrix[1:4, 2:5], matrix[4, 0]
    assert torch.equal(target, expected)
    half = torch.zeros(5, 7, dtype=torch.bfloat16)
    checkpoint.load([Chunk.whole("model.w", half)])
    assert torch.equal(half, matrix.bfloat16())


def test_sha256sum_checks_it(whole: Path) -> None:
    done = subprocess.run(["sha256sum", "--check", "--strict", storage.SUMS], cwd=whole, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    listed = {line.rpartition(": ")[0] for line in done.stdout.splitlines()}
    files = {str(path.relative_to(whole)) for path in whole.rglob("*") if path.is_file()}
    assert listed == files - {storage.SUMS}


def test_whoever_may_read_one_file_may_read_all(whole: Path) -> None:
    assert len({path.stat().st_mode for path in whole.rglob("*") if path.is_file()}) == 1


def test_files_hold_at_most_what_is_asked_for(tmp_path: Path, matrix: Tensor) -> None:
    most = 0

    def watched(chunk: Chunk) -> Chunk:
        def load() -> Tensor:
            nonlocal most
            most = max(most, len(list((tmp_path / "step_1.tmp").glob("shard_*"))))
            return chunk.load()

        return Chunk(chunk.name, chunk.shape, chunk.offsets, chunk.sizes, load)

    chunks = [watched(chunk) for chunk in tiles("model.w", matrix)]
    saved.write(tmp_path / "step_1", chunks, INFORMATION, {}, file_bytes=4 * 14)
    files = sorted((tmp_path / "step_1").glob("shard_*"))
    assert len(files) == 3, "56, 12 + 16 and 56 bytes"
    assert most == 2, "the last chunk is asked for when the files before it are written"
    assert torch.equal(SavedCheckpoint(tmp_path / "step_1").read("model.w"), matrix)


@pytest.mark.parametrize("left_out", range(4))
def test_a_tensor_that_is_not_complete_is_not_written(tmp_path: Path, matrix: Tensor, left_out: int) -> None:
    chunks = tiles("model.w", matrix)
    del chunks[left_out]
    with pytest.raises(ValueError, match=r"model\.w has 35 elements, and the chunks of all ranks have \d+ together"):
        saved.write(tmp_path / "step_1", chunks, INFORMATION, {})
    assert not (tmp_path / "step_1").exists()


def test_rectangles_that_overlap_are_not_written(tmp_path: Path, matrix: Tensor) -> None:
    chunks = tiles("model.w", matrix)
    chunks[3] = rectangle("model.w", matrix, slice(1, 3), slice(0, 7))  # as many elements, some twice
    with pytest.raises(ValueError, match="overlapping"):
        saved.write(tmp_path / "step_1", chunks, INFORMATION, {})


def test_a_tensor_of_another_shape_or_none_is_named(whole: Path) -> None:
    checkpoint = SavedCheckpoint(whole)
    with pytest.raises(
        ValueError,
        match=r"this run has model\.w with the shape \(7, 5\), and the checkpoint has it with the shape \(5, 7\)",
    ):
        checkpoint.load([Chunk.whole("model.w", torch.zeros(7, 5))])
    with pytest.raises(ValueError, match=r"this run has model\.v with the shape \(2,\), and the checkpoint lacks it"):
        checkpoint.load([Chunk.whole("model.v", torch.zeros(2))])


def test_every_flipped_byte_and_every_truncation_is_seen(whole: Path) -> None:
    for path in sorted(whole.rglob("*")):
        if path.is_dir():
            continue
        content = path.read_bytes()
        for at in range(0, len(content), max(1, len(content) // 40)):
            flipped = bytearray(content)
            flipped[at] ^= 1
            for damaged in (bytes(flipped), content[:at]):
                path.write_bytes(damaged)
                with pytest.raises(ValueError, match=re.escape(str(whole))):
                    SavedCheckpoint(whole).verify()
        path.unlink()
        with pytest.raises(ValueError, match=re.escape(str(whole))):
            SavedCheckpoint(whole).verify()
        path.write_bytes(content)
        SavedCheckpoint(whole).verify()


def test_shares_of_several_processes_cover_all_files(whole: Path) -> None:
    for path in (p for p in whole.rglob("*") if p.is_file() and p.name != storage.SUMS):
        content = path.read_bytes()
        path.write_bytes(content + b" ")
        seen = 0
        for rank in range(3):
            try:
                SavedCheckpoint(whole).verify((rank, 3))
            except ValueError:
                seen += 1
        assert seen == 1 or path.name in (INFO, INDEX)  # which every process reads
        path.write_bytes(content)


def replace_file(checkpoint: Path, name: str, content: bytes) -> None:
    """And its checksum: whoever made the file could compute it."""
    (checkpoint / name).write_bytes(content)
    sums = storage.read_sums(checkpoint) | {name: storage.digest(checkpoint / name)}
    (checkpoint / storage.SUMS).write_text("".join(f"{value}  {key}\n" for key, value in sums.items()))


class Bomb:
    """Unpickling it creates a file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[object, tuple[str]]:
        return (exec, (f"open({str(self.path)!r}, 'w').close()",))


@pytest.mark.parametrize("victim", ["shard_00000_0000.safetensors", INDEX, INFO, ".metadata", "a/note.txt"])
def test_a_foreign_checkpoint_executes_nothing(whole: Path, tmp_path: Path, victim: str) -> None:
    exploded = tmp_path / "exploded"
    pickle.loads(pickle.dumps(Bomb(exploded)))
    assert exploded.exists(), "the bomb must be one"
    exploded.unlink()
    replace_file(whole, victim, pickle.dumps(Bomb(exploded)))
    try:
        checkpoint = SavedCheckpoint(whole)
        checkpoint.verify()
        checkpoint.read("model.w")
    except Exception as error:
        assert victim not in (".metadata", "a/note.txt"), error
    assert not exploded.exists()


@pytest.mark.parametrize("file", ["../outside.safetensors", "/etc/passwd"])
def test_an_index_cannot_name_files_elsewhere(whole: Path, file: str) -> None:
    index = json.loads((whole / INDEX).read_text())
    index["tensors"]["model.w"]["chunks"][0]["file"] = file
    replace_file(whole, INDEX, json.dumps(index).encode())
    with pytest.raises(ValueError, match="outside of the directory"):
        SavedCheckpoint(whole)


@pytest.mark.parametrize("change", ["lost", "moved", "larger"])
def test_an_index_that_does_not_cover_a_tensor_is_refused(whole: Path, change: str) -> None:
    index = json.loads((whole / INDEX).read_text())
    chunks = index["tensors"]["model.w"]["chunks"]
    if change == "lost":
        del chunks[1]
    else:
        chunks[1]["offsets" if change == "moved" else "sizes"][1] += 4
    replace_file(whole, INDEX, json.dumps(index).encode())
    with pytest.raises(ValueError, match=r"model\.w .*chunk"):
        SavedCheckpoint(whole)


def test_a_file_whose_tensor_is_not_what_the_index_says_is_refused(whole: Path, matrix: Tensor) -> None:
    name = "shard_00000_0000.safetensors"
    tensors = load_file(whole / name)
    tensors["model.w@2,0"] = tensors["model.w@2,0"][:, :1].contiguous()  # would be broadcast
    replace_file(whole, name, save(tensors))
    with pytest.raises(ValueError, match=r"model\.w@2,0 of shape \(1, 1\), and index\.json says \(1, 3\)"):
        SavedCheckpoint(whole).read("model.w")


def test_a_newer_format_is_refused_with_the_version_that_wrote_it(whole: Path) -> None:
    info = json.loads((whole / INFO).read_text())
    replace_file(whole, INFO, json.dumps(info | {"format": 2, "versions": {"megamult": "9.9"}}).encode())
    with pytest.raises(ValueError, match=r"its format is 2 and this version of megamult reads 1: install .*9\.9"):
        SavedCheckpoint(whole)


def make(parent: Path, *steps: int) -> None:
    for step in steps:
        directory.of_step(parent, step).mkdir(parents=True)


def test_candidates_begin_where_latest_points_and_go_back(tmp_path: Path) -> None:
    assert directory.candidates(tmp_path / "none") == []
    make(tmp_path, 2, 10, 9)
    (tmp_path / "step_11.tmp").mkdir()
    named = [path.name for path in directory.candidates(tmp_path)]
    assert named == ["step_10", "step_9", "step_2"], "without latest all count, by number"
    directory.point(tmp_path, directory.of_step(tmp_path, 9))
    assert [path.name for path in directory.candidates(tmp_path)] == ["step_9", "step_2"]
    assert (tmp_path / "latest").read_text() == "step_9\n"
    (tmp_path / "latest").write_bytes(b"\xff\xfe nonsense")
    assert [path.name for path in directory.candidates(tmp_path)] == named


@pytest.mark.parametrize(
    ("keep", "keep_every", "left"),
    [
        (0, 0, [1, 2, 3, 4, 5, 6, 7]),
        (1, 0, [6, 7]),
        (2, 0, [5, 6, 7]),
        (2, 2, [2, 4, 5, 6, 7]),
        (1, 7, [6, 7]),
        (9, 0, [1, 2, 3, 4, 5, 6, 7]),
    ],
)
def test_the_newest_and_every_kth_are_kept(tmp_path: Path, keep: int, keep_every: int, left: list[int]) -> None:
    make(tmp_path, 0, 1, 2, 3, 4, 5, 6, 7)  # 0 is an import
    directory.retain(tmp_path, 6, keep, keep_every)  # 7 is of a run that was taken back
    assert directory.steps(tmp_path) == [0, *left]


def test_replacing_and_cleaning(tmp_path: Path) -> None:
    make(tmp_path, 1)
    (tmp_path / "step_1" / "old").touch()
    made = directory.temporary(tmp_path / "step_1")
    made.mkdir()
    (made / "new").touch()
    directory.replace(made, tmp_path / "step_1")
    assert [path.name for path in (tmp_path / "step_1").iterdir()] == ["new"]
    (tmp_path / "step_5.tmp").mkdir()
    (tmp_path / "latest.tmp").touch()
    assert directory.clean(tmp_path) == ["latest.tmp", "step_5.tmp"]
    assert [path.name for path in tmp_path.iterdir()] == ["step_1"]


def test_a_crash_while_a_checkpoint_is_replaced_leaves_the_old_one(tmp_path: Path) -> None:
    make(tmp_path, 1)
    made = directory.temporary(tmp_path / "step_1")
    made.mkdir()

    class Crash(Exception):
        pass

    rename = Path.rename

    def crash_at_the_second(self: Path, target: Path) -> Path:
        if self == made:
            raise Crash
        return rename(self, target)

    with mock.patch.object(Path, "rename", crash_at_the_second), pytest.raises(Crash):
        directory.replace(made, tmp_path / "step_1")
    assert not (tmp_path / "step_1").exists()
    directory.clean(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["step_1"]


@pytest.mark.parametrize("config", ["null", "[]", '{"optimizer": 3}', '{"optimizer": null}'])
def test_a_configuration_that_is_no_mapping_is_damage_and_no_crash(config: str) -> None:
    with pytest.raises(ValueError, match="configuration is not a mapping of sections"):
        CheckpointInfo.from_json(f'{{"format": 1, "step": 1, "samples": 0, "vocab_size": 2, "config": {config}}}')
