"""Resume from a checkpoint: find it, check that it fits the run, and load its state into model and optimizer.

The run that wrote the checkpoint may have had any sharding. What must agree (:func:`check_fits`) is the function that
the model computes, the tokenizer, the order of the data, and the optimizer's name unless its state is reset. The run
must have all multipliers that the checkpoint has, except those that are all 1, which change nothing.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch

from megamult.checkpoint import directory, rng
from megamult.checkpoint.chunks import Chunk
from megamult.checkpoint.info import INFO, CheckpointInfo
from megamult.checkpoint.saved import SavedCheckpoint
from megamult.checkpoint.state import held
from megamult.config import SECTIONS, Config, ModelConfig
from megamult.data.skip import Skip, changes_of_the_past
from megamult.data.tokenizer_files import TOKENIZER_FOLDER, tokenizer_identities
from megamult.distributed import process_groups
from megamult.distributed.agreement import on_every_rank
from megamult.distributed.mesh import Mesh
from megamult.multipliers.config import MultipliersConfig
from megamult.multipliers.specs import LEAVES
from megamult.optim.fixed_norm import NORM
from megamult.optim.two_phase import TwoPhaseOptimizer
from megamult.parameters.spec import Role, Side
from megamult.settings import Why, fixed_keys, fixed_values
from megamult.zero.partition import Partition


def find(
    mesh: Mesh,
    load: str,
    run_dir: Path,
    fits: Callable[[SavedCheckpoint], None],
    key: str = "checkpoint.load",
    values_fit: Callable[[SavedCheckpoint], None] = lambda checkpoint: None,
) -> SavedCheckpoint | None:
    """Find and verify the checkpoint that `checkpoint.load` asks for. Collective: each rank verifies some of the files.

    Args:
        mesh: mesh of the processes.
        load: the directory of a checkpoint; the directory of a run or of several checkpoints, which means the newest of
            them; or `latest`, which means the newest checkpoint of `run_dir`.
        run_dir: directory of this run.
        fits: function that raises ValueError if the run cannot resume from a checkpoint. It is called before the large
            files are verified, so it must not read tensors: a damaged checkpoint is passed over, and is no error.
        key: name of the setting that has the value `load`, for messages.
        values_fit: the same for what the tensors decide, called after all files are verified.

    Returns:
        The checkpoint, or None if `load` is `latest` and `run_dir` has no checkpoint yet.

    Raises:
        ValueError: there is no checkpoint, the checkpoint does not fit the run, or all checkpoints are damaged.
    """
    first = mesh.rank == 0
    candidates = _listed(mesh, load, run_dir, key)
    if not candidates:
        if load == "latest":
            return None
        raise ValueError(
            f"{key} is {load!r}: no checkpoint is there; name a directory that holds {INFO}, or one with "
            "step_N directories"
        )
    share = (mesh.rank, mesh.size)
    problem = None
    for path in candidates:
        checkpoint, problem = on_every_rank(mesh, partial(_opened, path))
        if checkpoint is not None:
            _agree_to(mesh, partial(fits, checkpoint))
            _, problem = on_every_rank(mesh, partial(checkpoint.verify, share))
            if problem is None:
                _agree_to(mesh, partial(values_fit, checkpoint))
                return checkpoint
        if first and path != candidates[-1]:
            print(f"warning: {problem}; trying the one before it", file=sys.stderr, flush=True)
    if len(candidates) == 1:
        raise ValueError(f"{problem}; load another checkpoint")
    raise ValueError(
        f"none of the {len(candidates)} checkpoints in {candidates[0].parent} is usable: load another checkpoint. "
        f"The problem of the oldest (warnings name those of the others): {problem}"
    )


def _agree_to(mesh: Mesh, check: Callable[[], None]) -> None:
    """Run a check on every rank, and raise ValueError on all ranks if it fails on one of them. Collective."""
    _, message = on_every_rank(mesh, check)
    if message is not None:
        raise ValueError(message)


def _opened(path: Path) -> SavedCheckpoint:
    """Open a checkpoint. If it does not record the SHA-256 of its tokenizer, compute it from the tokenizer's files.

    Imported checkpoints lack this SHA-256 if an older version of megamult imported them.
    """
    checkpoint = SavedCheckpoint(path)
    if checkpoint.info.tokenizer_sha256 is None:
        files = checkpoint.files(TOKENIZER_FOLDER)
        checkpoint.info.tokenizers = tokenizer_identities({Path(name).name: content for name, content in files.items()})
    return checkpoint


def _listed(mesh: Mesh, load: str, run_dir: Path, key: str) -> list[Path]:
    """List the checkpoints that :func:`find` tries, best first. Collective.

    Rank 0 undoes interrupted renames, lists the checkpoints, and sends the list to all ranks.
    """
    found: list[Any] = [[], None]
    if mesh.rank == 0:
        try:
            directory.undo_interrupted_replacements(run_dir / "checkpoints")
            found = [_candidates(load, run_dir), None]
        except OSError as error:
            found = [
                [],
                f"{key} is {load[:200]!r}, which cannot be read ({error.strerror}): check its permissions",
            ]
    mesh.broadcast_objects(found)
    candidates, problem = found
    if problem is not None:
        raise ValueError(problem)
    return candidates


def _candidates(load: str, run_dir: Path) -> list[Path]:
    """List the checkpoints to try for the value `load` of `checkpoint.load`, best first."""
    if load == "latest":
        return directory.candidates(run_dir / "checkpoints")
    path = Path(load)
    if (path / INFO).exists():
        return [path]
    return directory.of_run(path)


def lost_multipliers(info: CheckpointInfo, config: Config) -> dict[Role, list[Side]]:
    """Return the sides, by role, on which the checkpoint has multipliers and a run with this configuration has none."""
    roles = config.model.roles
    here = config.multipliers.sides(roles)
    its = MultipliersConfig(**info.config["multipliers"]).sides(roles)
    lost = {role: sorted(sides - here.get(role, frozenset())) for role, sides in its.items()}
    return {role: sides for role, sides in lost.items() if sides}


def check_fits(
    info: CheckpointInfo,
    config: Config,
    vocab_size: int,
    tokenizer_sha256: str | None,
    all_ones: Callable[[Role, Side], bool] = lambda role, side: False,
) -> None:
    """Check that a run with this configuration can resume from the checkpoint.

    Args:
        info: what the checkpoint says of itself.
        config: configuration of the run.
        vocab_size: exact number of tokens.
        tokenizer_sha256: SHA-256 of the run's tokenizer, or None if it has none.
        all_ones: function that returns whether all multipliers of a role on a side are 1 in the checkpoint. It is
            called only for those that the run does not have, and only if there is no other difference.

    Raises:
        ValueError: the run cannot. The message lists every difference, or says why the saved configuration cannot be
            read.
    """
    try:
        sections, multipliers = _fixed_sections(info.config, config), MultipliersConfig(**info.config["multipliers"])
    except (TypeError, KeyError) as error:
        lacks = f"lacks the section {error}"
        what = lacks if isinstance(error, KeyError) else f"has keys or values that this version does not know ({error})"
        raise ValueError(
            f"the checkpoint's configuration {what}: use the version that wrote it "
            f"({info.versions.get('megamult', 'unknown')}), or load another checkpoint"
        ) from None

    def pairs_of(why: Why) -> list[tuple[str, Any, Any]]:
        both = [
            (fixed_values(name, getattr(config, name), why), fixed_values(name, its, why))
            for name, its in sections.items()
        ]
        return [(key, mine[key], its[key]) for mine, its in both for key in mine]

    pairs = pairs_of("function")
    pairs.append(("model.vocab_size", vocab_size, info.vocab_size))
    if info.samples:
        pairs += pairs_of("samples")
    found = [f"{key} is {mine!r} and the checkpoint's is {its!r}" for key, mine, its in pairs if mine != its]
    if info.data is not None:
        saved = Skip.of(info.data.get("skip", ()))
        found += changes_of_the_past(Skip.of(config.data.skip), saved, info.samples)
    known = info.tokenizers
    if known and tokenizer_sha256 is not None and tokenizer_sha256 not in known.values():
        theirs = " or ".join(f"{digest!r} ({files})" for files, digest in known.items())
        found.append(f"the SHA-256 of data.tokenizer is {tokenizer_sha256!r} and the checkpoint's is {theirs}")
    saved_sides = multipliers.sides(config.model.roles)
    for roles in config.multipliers.sharing(config.model.fused) if info.optimizer is not None else ():
        its = [role for role in roles if "col" in saved_sides.get(role, ())]
        apart = len(its) > 1 and not multipliers.shared_columns
        if its and (apart or len(its) < len(roles)):
            what = "has trained them apart" if apart else f"has only those of {', '.join(its)}"
            found.append(
                f"multipliers.shared_columns is True, so that {', '.join(roles)} would have the same column "
                f"multipliers, and the checkpoint {what}"
            )
    name = None if info.optimizer is None else info.optimizer["name"]
    if name not in (None, config.optimizer.name) and not config.checkpoint.reset_optimizer:
        found.append(
            f"optimizer.name is {config.optimizer.name!r} and the checkpoint's is {name!r} "
            "(with checkpoint.reset_optimizer true, a run starts with fresh optimizer state)"
        )
    differs = bool(found)
    for role, sides in lost_multipliers(info, config).items():
        # Tensors are read only if nothing else stands in the way: they may not be those of the configuration.
        trained = [side for side in sides if differs or not all_ones(role, side)]
        if trained:
            found.append(
                f"multipliers.placement gives {role} no {' and '.join(trained)} multipliers, which the checkpoint has"
            )
    if found:
        raise ValueError(
            f"the checkpoint does not fit this run: {'; '.join(found)}: set them back, or load another checkpoint"
        )


def _fixed_sections(configuration: Mapping[str, Any], config: Config) -> dict[str, Any]:
    """Return the sections of a saved configuration that contain settings which a resumed run must not change.

    The section `model` is read whole. This version must know all its keys, because an unknown one may change the
    function that the model computes. From each other section, only the settings that must not change are read. All
    other keys, and keys that the saved configuration lacks, get their defaults.

    Args:
        configuration: the saved configuration.
        config: configuration of the run that would resume.

    Raises:
        KeyError, TypeError: a section is missing, or `model` has a key that this version does not know.
        ValueError: the checkpoint's model has another architecture than the run's.
    """
    mine, its = config.model.architecture, configuration["model"].get("architecture", ModelConfig.architecture)
    if mine != its:
        raise ValueError(
            f"the checkpoint does not fit this run: model.architecture is {mine!r} and the checkpoint's is {its!r}: "
            "set it back, or load another checkpoint"
        )
    sections: dict[str, Any] = {"model": type(config.model)(**configuration["model"])}
    for name, section in SECTIONS.items():
        keys = fixed_keys(section)
        if keys and name not in sections:
            sections[name] = section(**{key: value for key, value in configuration[name].items() if key in keys})
    return sections


def new_multipliers(checkpoint: SavedCheckpoint, partition: Partition, optimizer: TwoPhaseOptimizer) -> list[str]:
    """Return the names of the model's multipliers that the checkpoint does not have, the same on all ranks. They start
    at 1, so they change nothing at first. Collective over all ranks."""
    mine = {chunk.name for chunk in held(partition, optimizer) if _is_new(chunk, checkpoint)}
    names = {name for found in partition.mesh.gather_objects(mine) for name in found}  # type: ignore[attr-defined]
    return sorted(name for name in names if name.startswith("model."))


def _is_new(chunk: Chunk, checkpoint: SavedCheckpoint) -> bool:
    """Return whether a chunk belongs to multipliers, or their optimizer state, that the checkpoint does not have."""
    return chunk.name not in checkpoint.shapes and chunk.name.rpartition(".")[2] in LEAVES.values()


def restore(
    checkpoint: SavedCheckpoint, partition: Partition, optimizer: TwoPhaseOptimizer, *, reset_optimizer: bool = False
) -> None:
    """Load a checkpoint's state into a fresh run. Collective over all ranks.

    Args:
        checkpoint: a checkpoint that fits the run, see :func:`check_fits`.
        partition, optimizer: partition and optimizer of the run, before its first step.
        reset_optimizer: whether to leave out the saved state of the optimizer.

    Multipliers that the checkpoint does not have (:func:`new_multipliers`) start at 1.

    Raises:
        ValueError: the checkpoint lacks a tensor or has it with another shape, or a weight is NaN after loading.
    """
    info = checkpoint.info
    fresh = reset_optimizer or info.optimizer is None
    chunks = held(partition, optimizer)
    new = {chunk.name for chunk in chunks if _is_new(chunk, checkpoint)}
    if optimizer.fixed is not None:
        optimizer.fixed.norms.fill_(torch.nan)  # norms that the checkpoint lacks are measured after loading
        new |= {c.name for c in chunks if c.name not in checkpoint.shapes and c.name.startswith(f"optimizer.{NORM}.")}
    for chunk in chunks:
        if chunk.name in new and chunk.name.startswith("model."):
            chunk.load().fill_(1.0)  # not multipliers.initial, which would change the loaded model's function
    wanted = [c for c in chunks if c.name not in new and not (fresh and c.name.startswith("optimizer."))]
    checkpoint.load(wanted, process_groups.files())
    counts = {"updates": 0, "skipped_steps": 0} if fresh else info.optimizer
    assert counts is not None
    optimizer.restored(partition, counts["updates"], counts["skipped_steps"])
    _check_defined(partition)
    mesh = partition.mesh
    if info.layout.get("processes") == mesh.size:
        prefix, states = rng.prefix(mesh.rank), rng.states()
        saved = {key: state for key, state in states.items() if prefix + key in checkpoint.shapes}
        checkpoint.load([Chunk.whole(prefix + key, state) for key, state in saved.items()])
        rng.restore(states)


def _check_defined(partition: Partition) -> None:
    """Check that no weight of this rank is NaN.

    The matrices of a model that is built to be loaded start as NaN, so those that the checkpoint does not cover stay
    NaN. Other weights are NaN if they were when the checkpoint was saved.

    Raises:
        ValueError: a weight is NaN.
    """
    if not partition.slices:
        return
    # All results are in one tensor, so that the host waits for the device only once.
    undefined = torch.stack([piece.source.isnan().any() for piece in partition.slices]).tolist()
    names = [piece.name for piece, found in zip(partition.slices, undefined, strict=True) if found]
    if names:
        raise ValueError(
            f"{len(names)} parameters are NaN after the checkpoint was loaded, the first is {names[0]}: the checkpoint "
            "does not cover them, or they had diverged when it was saved; load an earlier checkpoint"
        )
