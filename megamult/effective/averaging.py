"""Average of checkpoints of one model, written as a checkpoint from which a run can continue training.

Effective weights are averaged, because the model computes with the products diag(r) W diag(c). If the checkpoints'
multipliers differ, the average of these products is not the product of the averages of r, W and c. All multipliers of
the result are 1, except a tied embedding's scalar that all checkpoints have in common.
"""

from __future__ import annotations

import copy
import dataclasses
import itertools
import math
import sys
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import torch
from torch import Tensor
from tqdm import tqdm

from megamult.checkpoint import directory
from megamult.checkpoint.info import FORMAT, INFO, CheckpointInfo, versions
from megamult.checkpoint.saved import SavedCheckpoint
from megamult.checkpoint.streamed import Streamed, write_streamed
from megamult.data.tokenizer_files import SENTENCEPIECE, TOKENIZER_FOLDER
from megamult.effective.reading import EffectiveModel, EffectiveWeight
from megamult.huggingface.files import check_output
from megamult.settings import fixed_values


@dataclass
class Averaged:
    """Result of averaging."""

    steps: list[int]
    """Step of each checkpoint, ascending."""
    shares: list[float]
    """Share of each checkpoint in the average. Their sum is 1."""
    parameters: int
    """Number of parameters, without multipliers."""
    multipliers: int
    """Number of multipliers."""
    resume: str
    """Arguments with which a run continues from the result."""
    notes: list[str] = field(default_factory=list)
    """Texts for the user about possibly unexpected properties of the result."""


def average(
    paths: Sequence[Path], output: Path, *, last: int | None = None, kind: str = "uniform", decay: float | None = None
) -> Averaged:
    """Write the average of checkpoints as a checkpoint without optimizer state.

    Step, samples, state of the data, configuration and tokenizer are those of the newest checkpoint. That is the one
    with the highest step, or the last of them in `paths` if several have that step. Memory holds one file of the
    result, and some float64 copies of one block of rows.

    Args:
        paths: checkpoints in any order or, if `last` is given, the directory of one run.
        output: directory of the result. It appears only when it is complete.
        last: number of checkpoints of the run to average, counted back from the newest. Damaged ones are not counted,
            and a line on standard error names them.
        kind: "uniform" for equal shares, or "ema" for shares that shrink by the factor `decay` from each checkpoint
            to the one before it.
        decay: factor for "ema", between 0 and 1; None means 0.9.

    Raises:
        ValueError: an argument is wrong, the output exists and is not empty, there are fewer than two checkpoints, one
            is damaged, or they are not checkpoints of the same model.
    """
    check_output(output)
    _check_kind(kind, decay)
    checkpoints = _named(paths) if last is None else _last(paths, last)
    models = [EffectiveModel(saved) for saved in sorted(checkpoints, key=lambda saved: saved.info.step)]
    newest = models[-1]
    steps = [model.saved.info.step for model in models]
    if kind == "ema":
        _check_order(models)
    _check_same_model(models)
    if last is None:  # otherwise, `_last` has verified the checkpoints
        for model in tqdm(models, desc="verifying", unit="checkpoint", disable=None):
            model.saved.verify()
    shares = _shares(len(models), kind, decay)
    factor = _common_factor(models)
    shared = factor is not None
    tied = newest.sizes.tie_embeddings and (shared or not any(model.head_differs() for model in models))
    weights = [
        Streamed(parts[0].weight.logical, shape, partial(_mean, parts, shares))
        for parts in zip(*(model.weights(tied, embedding_factor=shared) for model in models), strict=True)
        if (shape := parts[0].weight.stored_shape) is not None
    ]
    multipliers: dict[str, tuple[int, ...]] = {}
    for each in newest.weights(tied):
        multipliers |= each.weight.multipliers(newest.placement)
    source = newest.saved
    files = source.files(SENTENCEPIECE) | source.files(TOKENIZER_FOLDER)
    values = {} if factor is None else {newest.embedding_scalar: factor}
    write_streamed(output, weights, multipliers, _info(source.info, tied), files, "averaging", values)
    result = Averaged(
        steps,
        shares,
        sum(math.prod(weight.shape) for weight in weights),
        sum(math.prod(shape) for shape in multipliers.values()),
        f"--checkpoint.load {output}",
    )
    if newest.sizes.tie_embeddings and not tied:
        result.notes.append(
            "the embedding is tied to the head, and only the embedding has multipliers"
            f"{_scalars(models)}: in the average, the two are separate matrices (model.tie_embeddings false)"
        )
        result.resume += " --model.tie_embeddings false"
    return result


def _common_factor(models: Sequence[EffectiveModel]) -> float | None:
    """Return the scalar that the tied embeddings of all models have; None if they have other multipliers or differ.

    With one scalar s, the average of the matrices W is the head's, and s times it the embedding's: the tie remains.
    """
    first, *others = (model.embedding_factor() for model in models)
    common = first is not None and math.isfinite(first) and all(factor == first for factor in others)
    return first if common else None


def _scalars(models: Sequence[EffectiveModel]) -> str:
    """Return the part of a message that gives the scalars of tied embeddings, if they have nothing but scalars."""
    factors = [model.embedding_factor() for model in models]
    known = [f"{factor:g}" for factor in factors if factor is not None]
    return f", scalars that differ ({', '.join(known)})" if len(known) == len(factors) else ""


def _check_kind(kind: str, decay: float | None) -> None:
    if kind not in ("uniform", "ema"):
        raise ValueError(f"kind is {kind!r}: use uniform or ema")
    if decay is not None and kind != "ema":
        raise ValueError(
            f"decay is {decay}, and --weights uniform has no decay: use --weights ema, or leave out the decay"
        )
    if decay is not None and not 0 < decay < 1:
        raise ValueError(f"decay is {decay}: give a number between 0 and 1, such as 0.9")


def _shares(count: int, kind: str, decay: float | None) -> list[float]:
    """Return the share of each of `count` checkpoints, the oldest first."""
    factor = 1.0 if kind == "uniform" else 0.9 if decay is None else decay
    powers = [factor ** (count - 1 - i) for i in range(count)]
    return [power / math.fsum(powers) for power in powers]


def _named(paths: Sequence[Path]) -> list[SavedCheckpoint]:
    """Open the checkpoints at `paths`. Each path must name one checkpoint.

    Raises:
        ValueError: a path has no checkpoint, is a run directory or a directory of checkpoints, or is given twice; or
            there are fewer than two paths.
    """
    for path in paths:
        found = [] if (path / INFO).exists() else directory.of_run(path)
        if found:
            raise ValueError(
                f"{path} is not a checkpoint but a directory with checkpoints ({len(found)}): give only this "
                "directory, with --last N, or name single checkpoints"
            )
    checkpoints = [SavedCheckpoint(path) for path in paths]
    again = [path for path, times in Counter(path.resolve() for path in paths).items() if times > 1]
    if again:
        raise ValueError(f"{again[0]} is given more than once: name every checkpoint once")
    if len(paths) < 2:
        raise ValueError(
            f"an average needs two checkpoints or more, and {len(paths)} is given ({', '.join(map(str, paths))}): name "
            "more, or give a run directory and --last N"
        )
    return checkpoints


def _last(paths: Sequence[Path], count: int) -> list[SavedCheckpoint]:
    """Open and verify the last `count` undamaged checkpoints of a run.

    Raises:
        ValueError: `count` is less than 2, `paths` is not one run directory, or the run has too few
            undamaged checkpoints.
    """
    if count < 2:
        raise ValueError(f"--last is {count}: an average needs two checkpoints or more")
    if len(paths) != 1 or (paths[0] / INFO).exists():
        raise ValueError(
            f"--last {count} needs one run directory, and these paths are given: {', '.join(map(str, paths))}; give "
            "one run directory with --last, or checkpoints without it"
        )
    (run,) = paths
    found: list[SavedCheckpoint] = []
    with tqdm(total=count, desc="verifying", unit="checkpoint", disable=None) as bar:
        for path in directory.of_run(run):
            try:
                saved = SavedCheckpoint(path)
                saved.verify()
            except ValueError as error:
                print(f"warning: {error}; taking the one before it", file=sys.stderr)
                continue
            found.append(saved)
            bar.update()
            if len(found) == count:
                return found
    raise ValueError(
        f"{run} has {len(found)} complete checkpoints, fewer than --last {count}: lower --last, or give the directory "
        "of a run that has enough in checkpoints/"
    )


def _check_order(models: Sequence[EffectiveModel]) -> None:
    """Check that every checkpoint of an EMA has a step of its own.

    Raises:
        ValueError: two have the same step.
    """
    for one, other in itertools.pairwise(models):
        if one.saved.info.step == other.saved.info.step:
            raise ValueError(
                f"{one.saved.path} and {other.saved.path} both are of step {one.saved.info.step}, and an EMA needs to "
                "know which is older: use --weights uniform, or name only one of them"
            )


def _check_same_model(models: Sequence[EffectiveModel]) -> None:
    """Check that all models compute the same function of their weights and have the same tokenizer.

    Raises:
        ValueError: a setting differs. The message lists all settings in which a checkpoint differs from the newest.
    """
    newest = models[-1]
    mine, found = _kept(newest), []
    for model in models[:-1]:
        its = _kept(model)
        both = [(key, its[key], mine[key]) for key in mine]
        # The SHA-256 is None, which means unknown, in old imports. It is then not compared.
        differing = [f"{key} is {a!r}, not {b!r}" for key, a, b in both if a != b and None not in (a, b)]
        if differing:
            found.append(f"in {model.saved.path}, {', '.join(differing)}")
    if found:
        raise ValueError(
            f"the checkpoints are not of the same model as {newest.saved.path}: {'; '.join(found)}: leave out those "
            "that differ"
        )


def _kept(model: EffectiveModel) -> dict[str, object]:
    """Return {name for messages: value} of the settings in which averaged models must agree: those of the function that
    a model computes with its weights, the vocabulary size, and the tokenizer."""
    info = model.saved.info
    return {
        **fixed_values("model", model.sizes, "function"),
        "model.vocab_size": info.vocab_size,
        "the SHA-256 of the tokenizer": ", ".join(sorted(info.tokenizers.values())) or None,
    }


def _mean(parts: Sequence[EffectiveWeight], shares: Sequence[float], start: int, stop: int) -> Tensor:
    """Return rows [start, stop) of the average of a weight, in fp32.

    Products and sum are in float64, so that the result is rounded only once, whatever the number of checkpoints.

    Raises:
        ValueError: a value is not finite.
    """
    total = torch.zeros((stop - start, *parts[0].weight.shape[1:]), dtype=torch.float64)
    for part, share in zip(parts, shares, strict=True):
        values = part.read(start, stop, torch.float64)
        if not values.isfinite().all():
            raise ValueError(
                f"{part.saved.path} has values of {part.weight.logical} that are not finite: leave it out, or take an "
                "earlier checkpoint"
            )
        total.add_(values, alpha=share)
    return total.float()


def _info(newest: CheckpointInfo, tied: bool) -> CheckpointInfo:
    """Return the content of the result's checkpoint.json.

    The losses of the newest checkpoint are left out, because they are not the result's.
    """
    config = copy.deepcopy(newest.config)
    config["model"]["tie_embeddings"] = tied
    return dataclasses.replace(
        newest,
        config=config,
        optimizer=None,
        layout={},
        figures={name: value for name, value in newest.figures.items() if name == "tokens"},
        versions=versions(),
        format=FORMAT,
    )
