"""An average is the mean of effective weights, in a checkpoint that trains on and is exported as any other."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from megamult.checkpoint import storage, streamed
from megamult.checkpoint.chunks import Chunk
from megamult.checkpoint.info import CheckpointInfo
from megamult.checkpoint.saved import SavedCheckpoint, write
from megamult.effective.averaging import average
from megamult.huggingface.exporting import export
from megamult.models.architectures import architecture_of
from megamult.models.llama.hf_names import weights
from megamult.parameters.roles import resolve
from tests.huggingface.corpus import VOCAB
from tests.huggingface.falcon_h1_workers import SavedFalcon
from tests.huggingface.workers import SavedModel, value_of
from tests.train.command import data_arguments, run, snapshot, start

Tensors = dict[str, Tensor]
ALL = SavedModel(1, "all")
TOKENIZER = {"tokenizer.model": b"no sentencepiece", "hf_tokenizer/chat_template.jinja": b"{{ x }}"}
ONE_ROUNDING = 2**-24 * 1.0001
"""Relative: fp32's half ulp. Products and sum are in float64, whose own rounding is in the last digit here."""
EMBEDDING, HEAD = "embedding.word_embeddings.weight", "output_layer.weight"
UP = "decoder.layers.1.mlp.linear_fc1.up.weight"


def save(
    path: Path,
    step: int,
    case: SavedModel = ALL,
    *,
    sizes: Mapping[str, Any] | None = None,
    files: Mapping[str, bytes] = TOKENIZER,
    values: Mapping[str, Tensor] = {},
    **info: Any,
) -> Tensors:
    """A checkpoint of a step, with optimizer state and values of its own, and what it holds of the model.

    Args:
        path: its directory.
        step: the step, which decides the values too.
        case: implementation and placement of its multipliers, and whether the head is tied.
        sizes: keys of the section `model` that differ from those of the case.
        files: contents of its other files.
        values: tensors of the model that have other values, by name.
        info: fields of checkpoint.json that differ from a run's.
    """
    config = case.config
    config.model = replace(config.model, **sizes or {})
    placement = {} if case.implementation == "none" else resolve(case.placement, config.model.roles)
    tensors: Tensors = {}
    for weight in architecture_of(config.model).weights(config.model, VOCAB):
        if not (weight.role == "head" and case.tied):
            for name, shape in {weight.logical: weight.shape, **weight.multipliers(placement)}.items():
                tensors[name] = value_of(f"{step} {name}", shape)
    tensors |= values
    chunks = [Chunk.whole(f"model.{name}", tensor) for name, tensor in tensors.items()]
    chunks += [Chunk.whole("optimizer.exp_avg.x", torch.ones(3)), Chunk.whole("rng.0.torch", torch.ones(3))]
    facts: dict[str, Any] = {
        "step": step,
        "samples": 16 * step,
        "config": json.loads(json.dumps(dataclasses.asdict(config))),
        "vocab_size": VOCAB,
        "tokenizer_sha256": "a" * 64,
        "optimizer": {"name": "adamw", "updates": step, "skipped_steps": 0},
        "data": {"the state at step": step},
        "layout": {"processes": 1},
        "figures": {"tokens": 4096.0 * step, "loss": 2.5, "bad_steps": 1.0},
    }
    write(path, chunks, CheckpointInfo(**facts | info), files)
    return tensors


def effective(tensors: Tensors, name: str) -> Tensor:
    """s diag(r) W diag(c) in float64."""
    module = name.removesuffix("weight")
    values = tensors[name].double()
    for side, shape in (("row", (-1, 1)), ("col", (1, -1)), ("scalar", (1, 1))):
        if f"{module}{side}_multiplier" in tensors:
            values = values * tensors[f"{module}{side}_multiplier"].double().reshape(shape)
    return values


def mean(values: Sequence[Tensor], shares: Sequence[float]) -> Tensor:
    return torch.stack([share * value for share, value in zip(shares, values, strict=True)]).sum(dim=0)


def assert_average(output: Path, saved: Sequence[Tensors], shares: Sequence[float]) -> None:
    """That every weight is the average of the effective weights, and every multiplier of the last one is 1."""
    found = SavedCheckpoint(output)
    found.verify()
    assert found.shapes == {f"model.{name}": tuple(tensor.shape) for name, tensor in saved[-1].items()}
    for name in saved[-1]:
        values = found.read(f"model.{name}")
        if name.endswith("_multiplier"):
            assert (values == 1).all()
            continue
        assert values.dtype == torch.float32
        expected = mean([effective(each, name) for each in saved], shares)
        torch.testing.assert_close(values.double(), expected, rtol=ONE_ROUNDING, atol=1e-15)


SYMMETRY_FREE, SCALAR = SavedModel(1, "symmetry_free"), SavedModel(1, "scalar", implementation="folded")
MAPPING = SavedModel(1, {"q": "row", "k": ["row", "scalar"], "v": "col", "down": "scalar", "embedding": "col"})
NONE = SavedModel(1, "all", implementation="none")


@pytest.mark.parametrize(
    "cases",
    [
        (ALL, ALL),
        (ALL, ALL, ALL),
        (SYMMETRY_FREE, MAPPING, SCALAR),
        (ALL, MAPPING),
        (ALL, NONE),
        (NONE, ALL),
        (SavedFalcon(1, "all"), SavedFalcon(1, "symmetry_free")),
    ],
    ids=["two", "three", "three placements", "fewer at last", "none at last", "none at first", "Falcon-H1"],
)
def test_effective_weights_are_averaged(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, cases: Sequence[SavedModel]
) -> None:
    monkeypatch.setattr(streamed, "BLOCK_BYTES", 7 * 96 * 4)  # 7 rows: no matrix is a multiple of it
    paths = [tmp_path / f"step_{step}" for step in range(1, len(cases) + 1)]
    saved = [save(path, step, case) for step, (path, case) in enumerate(zip(paths, cases, strict=True), 1)]
    done = average(paths, tmp_path / "average")
    assert_average(tmp_path / "average", saved, [1 / len(cases)] * len(cases))
    assert (done.steps, done.notes) == (list(range(1, len(cases) + 1)), [])
    assert done.parameters == sum(saved[-1][name].numel() for name in saved[-1] if not name.endswith("_multiplier"))
    assert done.multipliers == sum(saved[-1][name].numel() for name in saved[-1] if name.endswith("_multiplier"))


def test_averages_of_r_w_and_c_would_be_another_model(tmp_path: Path) -> None:
    """The tests above can fail: these checkpoints tell the two averages apart."""
    saved = [save(tmp_path / f"step_{step}", step) for step in (1, 2)]
    apart = effective({name: mean([each[name].double() for each in saved], [0.5, 0.5]) for name in saved[0]}, UP)
    together = mean([effective(each, UP) for each in saved], [0.5, 0.5])
    assert (apart - together).norm() > 0.1 * together.norm()


@pytest.mark.parametrize(("decay", "shares"), [(0.5, [1 / 7, 2 / 7, 4 / 7]), (None, [0.81, 0.9, 1.0])])
def test_an_ema_weighs_by_the_order_of_steps(tmp_path: Path, decay: float | None, shares: list[float]) -> None:
    saved = [save(tmp_path / f"step_{step}", step) for step in (3, 20, 100)]
    paths = [tmp_path / f"step_{step}" for step in (100, 3, 20)]
    done = average(paths, tmp_path / "average", kind="ema", decay=decay)
    shares = [share / sum(shares) for share in shares]
    assert done.steps == [3, 20, 100] and done.shares == pytest.approx(shares, rel=1e-15)
    assert_average(tmp_path / "average", saved, shares)


def test_the_checkpoint_is_the_newest_one_s_without_its_optimizer(tmp_path: Path) -> None:
    save(tmp_path / "old", 3)
    save(tmp_path / "new", 20, MAPPING)
    average([tmp_path / "new", tmp_path / "old"], tmp_path / "average")
    found, newest = SavedCheckpoint(tmp_path / "average"), SavedCheckpoint(tmp_path / "new")
    # Its losses are not the average's, and no random numbers are its own.
    without = {"optimizer": None, "layout": {}, "figures": {"tokens": 4096.0 * 20}}
    assert found.info == replace(newest.info, **without)
    assert {name: (found.path / name).read_bytes() for name in TOKENIZER} == TOKENIZER


@pytest.mark.parametrize("placed", [True, False], ids=["with multipliers", "without"])
def test_the_head_of_a_tied_embedding_is_averaged_without_its_multipliers(tmp_path: Path, placed: bool) -> None:
    case = SavedModel(1, "all" if placed else {"q": "row", "down": "col"}, tied=True)
    saved = [save(tmp_path / f"step_{step}", step, case) for step in (1, 2)]
    done = average([tmp_path / "step_1", tmp_path / "step_2"], tmp_path / "average")
    if placed:
        for each in saved:
            each[HEAD] = each[EMBEDDING]
    assert_average(tmp_path / "average", saved, [0.5, 0.5])
    assert SavedCheckpoint(tmp_path / "average").info.config["model"]["tie_embeddings"] is not placed
    assert any("model.tie_embeddings false" in note for note in done.notes) == placed
    assert (done.resume or "").endswith("--model.tie_embeddings false") == placed


@pytest.mark.parametrize("other", [1.5, 1.25], ids=["one scalar", "two scalars"])
@pytest.mark.parametrize("kind", [SavedModel, SavedFalcon])
def test_a_tied_embedding_keeps_its_tie_and_the_scalar_that_all_have(
    tmp_path: Path, kind: type[SavedModel], other: float
) -> None:
    case, scalar = kind(1, "scalar", tied=True), EMBEDDING.replace("weight", "scalar_multiplier")
    saved = [
        save(tmp_path / f"step_{step}", step, case, files={}, values={scalar: torch.tensor([s])})
        for step, s in ((1, 1.5), (2, other))
    ]
    done = average([tmp_path / "step_1", tmp_path / "step_2"], tmp_path / "average")
    found, tied = SavedCheckpoint(tmp_path / "average"), other == 1.5
    assert found.info.config["model"]["tie_embeddings"] is tied
    assert float(found.read(f"model.{scalar}")) == (1.5 if tied else 1)
    assert [note for note in done.notes if "scalars that differ (1.5, 1.25)" in note] == done.notes
    assert len(done.notes) == (not tied) and done.resume.endswith("tie_embeddings false") is not tied
    head = mean([each[EMBEDDING].double() for each in saved], [0.5, 0.5])
    embedding = mean([effective(each, EMBEDDING) for each in saved], [0.5, 0.5])
    values = {EMBEDDING: head} if tied else {EMBEDDING: embedding, HEAD: head}
    for name, expected in values.items():
        torch.testing.assert_close(found.read(f"model.{name}").double(), expected, rtol=ONE_ROUNDING, atol=1e-15)
    if kind is SavedFalcon:
        export(tmp_path / "average", tmp_path / "hf")
        config = json.loads((tmp_path / "hf/config.json").read_text())
        assert (config["tie_word_embeddings"], config["embedding_multiplier"]) == (tied, 1.5 if tied else 1)


def test_an_export_of_the_average_is_the_average(tmp_path: Path) -> None:
    saved = [save(tmp_path / f"step_{step}", step, case, files={}) for step, case in ((1, ALL), (2, MAPPING))]
    average([tmp_path / "step_1", tmp_path / "step_2"], tmp_path / "average")
    export(tmp_path / "average", tmp_path / "hf")
    found = load_file(tmp_path / "hf" / "model.safetensors")
    listed = list(weights(ALL.config.model, VOCAB))
    assert found.keys() == {weight.hugging_face for weight in listed}
    for weight in listed:
        expected = mean([effective(each, weight.logical) for each in saved], [0.5, 0.5])
        torch.testing.assert_close(found[weight.hugging_face].double(), expected, rtol=ONE_ROUNDING, atol=1e-15)


def test_memory_holds_blocks_of_the_checkpoints(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    limit, largest, read = 7 * 96 * 4, 0, SavedCheckpoint.read

    def watched(self: SavedCheckpoint, *rows: Any) -> Tensor:
        nonlocal largest
        tensor = read(self, *rows)
        largest = max(largest, tensor.nbytes)
        return tensor

    save(tmp_path / "one", 1)
    save(tmp_path / "two", 2)
    monkeypatch.setattr(streamed, "BLOCK_BYTES", limit)
    monkeypatch.setattr(SavedCheckpoint, "read", watched)
    average([tmp_path / "one", tmp_path / "two"], tmp_path / "average")
    assert limit // 2 < largest <= limit


@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), KeyboardInterrupt(), SystemExit(143)])
def test_an_interrupted_average_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: BaseException
) -> None:
    def interrupted(*arguments: Any, **options: Any) -> None:
        assert (tmp_path / "average.tmp").is_dir() and not (tmp_path / "average").exists()
        raise error

    save(tmp_path / "one", 1)
    save(tmp_path / "two", 2)
    before = snapshot(tmp_path)
    monkeypatch.setattr(storage, "save_file", interrupted)
    with pytest.raises(type(error), match="No space left" if isinstance(error, OSError) else None):
        average([tmp_path / "one", tmp_path / "two"], tmp_path / "average")
    assert snapshot(tmp_path) == before


def test_the_last_whole_checkpoints_of_a_run_are_found(tmp_path: Path) -> None:
    saved = {step: save(tmp_path / f"run/checkpoints/step_{step}", step) for step in (8, 9, 10, 11, 12)}
    damage(tmp_path / "run/checkpoints/step_10")
    (tmp_path / "run/checkpoints/latest").write_text("step_11\n")  # taken back from step 12
    done = run("average.py", tmp_path / "run", "--last", 2, "--output", tmp_path / "average", "--weights", "ema")
    assert done.returncode == 0 and done.stderr.count("\n") == 1, done.stderr
    assert done.stderr.startswith("warning: ") and done.stderr.endswith("damaged; taking the one before it\n")
    parameters = sum(saved[9][name].numel() for name in saved[9] if name.endswith(".weight"))
    multipliers = sum(saved[9][name].numel() for name in saved[9] if name.endswith("_multiplier"))
    assert done.stdout == (
        f"{tmp_path / 'average'}: {parameters} parameters and {multipliers} multipliers, 0.4737 of step 9, "
        f"0.5263 of step 11\nto continue from it: --checkpoint.load {tmp_path / 'average'}\n"
    )
    assert_average(tmp_path / "average", [saved[9], saved[11]], [0.9 / 1.9, 1 / 1.9])


def damage(checkpoint: Path) -> None:
    """Flip a bit of its tensors."""
    (shard,) = checkpoint.glob("shard_*")
    content = bytearray(shard.read_bytes())
    content[-5] ^= 1
    shard.write_bytes(content)


def undefined(checkpoint: Path) -> None:
    """Write it anew with a weight that is not finite."""
    saved = SavedCheckpoint(checkpoint)
    tensors = {name: saved.read(name) for name in saved.shapes}
    tensors[f"model.{UP}"][3, 5] = float("inf")
    write(checkpoint, [Chunk.whole(name, tensor) for name, tensor in tensors.items()], saved.info, {})


def nothing(checkpoint: Path) -> None:
    """Leave it as it is."""


TWO = ["run/checkpoints/step_1", "run/checkpoints/step_2"]
MISTAKES: dict[str, tuple[list[str], Callable[[Path], None], list[str]]] = {
    "one": (TWO[:1], nothing, ["needs two checkpoints or more, and 1 is given (", "give a run directory and --last N"]),
    "twice": ([*TWO, TWO[0]], nothing, ["step_1 is given more than once: name every checkpoint once"]),
    "none there": ([*TWO, "nowhere"], nothing, ["there is no checkpoint ", "nowhere: give a directory that holds"]),
    "no checkpoint": ([*TWO, "empty"], nothing, ["empty is no complete checkpoint"]),
    "a run": (
        ["run"],
        nothing,
        ["run is not a checkpoint but a directory with checkpoints (2): give only this directory, with"],
    ),
    "last 1": (["run", "--last", "1"], nothing, ["--last is 1: an average needs two checkpoints or more"]),
    "last of two": (
        [*TWO, "--last", "2"],
        nothing,
        ["--last 2 needs one run directory, and "],
    ),
    "last of one": (
        [TWO[0], "--last", "2"],
        nothing,
        ["--last 2 needs one run directory, and "],
    ),
    "last 3": (["run", "--last", "3"], nothing, ["run has 2 complete checkpoints, fewer than --last 3: lower --last"]),
    "last of nothing": (["empty", "--last", "2"], nothing, ["empty has 0 complete checkpoints, fewer than --last 2"]),
    "decay": ([*TWO, "--weights", "ema", "--decay", "1"], nothing, ["decay is 1.0: give a number between 0 and 1"]),
    "uniform decay": (
        [*TWO, "--decay", "0.5"],
        nothing,
        ["decay is 0.5, and --weights uniform has no decay: use"],
    ),
    "same step": ([*TWO, "other_2", "--weights", "ema"], nothing, ["are of step 2, and an EMA needs to know which is"]),
    "damaged": (TWO, damage, ["has another checksum than when it was written", "the checkpoint is damaged"]),
    "not finite": (TWO, undefined, [f"step_1 has values of {UP} that are not finite: leave it out"]),
    "another model": (
        [*TWO, "other_0"],
        nothing,
        [
            "the checkpoints are not of the same model as ",
            "other_0, model.num_layers is 1, not 2, model.norm_eps is 1e-06, not 0.001, the SHA-256 of the tokenizer "
            f"is '{'b' * 64}', not '{'a' * 64}': leave out those that differ",
        ],
    ),
    "output": ([*TWO, "--output", "empty/.."], nothing, ["exists and is not empty: choose another output"]),
}


@pytest.mark.parametrize("name", MISTAKES)
def test_a_mistake_is_one_line_and_leaves_nothing(tmp_path: Path, name: str) -> None:
    arguments, spoil, messages = MISTAKES[name]
    for step in (1, 2):
        save(tmp_path / f"run/checkpoints/step_{step}", step)
    save(tmp_path / "other_2", 2)
    save(tmp_path / "other_0", 0, sizes={"num_layers": 1, "norm_eps": 1e-6}, tokenizer_sha256="b" * 64)
    (tmp_path / "empty").mkdir()
    spoil(tmp_path / TWO[0])
    before = snapshot(tmp_path)
    words = [str(tmp_path / word) if (tmp_path / word.split("/")[0]).exists() else word for word in arguments]
    output = [] if "--output" in arguments else ["--output", tmp_path / "average"]
    done = run("average.py", *words, *output)
    assert (done.returncode, done.stdout, done.stderr.count("\n")) == (2, "", 1), done.stderr
    assert done.stderr.startswith("error: ") and all(message in done.stderr for message in messages), done.stderr
    assert snapshot(tmp_path) == before


def test_a_run_of_falcon_h1_goes_on_from_the_average(corpus: Path, tmp_path: Path) -> None:
    common = ["--config", "examples/configs/falcon_h1_tiny.yaml", *data_arguments(corpus), "--model.seq_length", "32"]
    common += ["--model.num_layers", "1", "--optimizer.min_lr", "0", "--optimizer.decay_steps", "0"]
    common += ["--optimizer.warmup_steps", "1", "--multipliers.lr", "0.1"]
    first = [*common, "--train.steps", "4", "--checkpoint.save_every", "2", "--train.run_dir", str(tmp_path / "one")]
    began = start(first)
    assert began.code == 0, began.text
    # One layer: 13 matrices beside embedding and head; 3 norms, and 3 biases and 3 vectors of the mixer; x, B and C are
    # convolved.
    assert " in 15 matrices and 9 vectors and 3 tensors of 3 or more dimensions, and " in began.stdout
    made = tmp_path / "two/checkpoints/step_4"
    done = run("average.py", tmp_path / "one", "--last", 2, "--output", made)
    assert (done.returncode, done.stderr) == (0, ""), done.stderr
    found = SavedCheckpoint(made)
    saved = []
    for step in (2, 4):
        one = SavedCheckpoint(tmp_path / f"one/checkpoints/step_{step}")
        saved.append({name.removeprefix("model."): one.read(name) for name in found.shapes})
    assert any(name.endswith(".mixer.A_log") for name in found.shapes)
    assert_average(made, saved, [0.5, 0.5])
    # At this rate a step is less than half an ulp of any weight and of 1, and what the run holds are the averages.
    still = ["--optimizer.lr", "1e-12", "--multipliers.lr", "1e-12", "--train.steps", "5"]
    again = start([*common, *still, "--train.run_dir", str(tmp_path / "two"), "--checkpoint.load", "latest"])
    assert again.code == 0, again.text
    assert f"going on from {made}: step 4, 64 sequences" in again.stdout
    after = SavedCheckpoint(tmp_path / "two/checkpoints/step_5")
    assert after.info.optimizer is not None and (after.info.optimizer["updates"], after.info.samples) == (1, 80)
    for name in found.shapes:
        torch.testing.assert_close(after.read(name), found.read(name), rtol=1e-7, atol=1e-11)
