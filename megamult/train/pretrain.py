"""A run from its command line to its last checkpoint: parse, check, build, resume, train, summarize."""

from __future__ import annotations

import contextlib
import dataclasses
import sys
import time
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from megamult.config import Config
from megamult.data.config import DataConfig
from megamult.distributed import environment, launcher
from megamult.runtime import exit_codes
from megamult.runtime.console import say_error
from megamult.runtime.patience import ON_FILES
from megamult.settings import run_settings
from megamult.train.command_line import (
    HEAD_START_SECONDS,
    agreed,
    fail,
    fail_alone,
    parse,
)
from megamult.train.deepspeed_config import deepspeed_config

if TYPE_CHECKING:
    from megamult.distributed.rendezvous import Meeting
    from megamult.runtime.lock import RunLock
    from megamult.runtime.logs import RankLog
    from megamult.runtime.progress import Progress
    from megamult.runtime.signals import StopRequests

_BEGAN = time.monotonic()


def main(arguments: Sequence[str] | None = None) -> None:
    """Pretrain as the command line says."""
    environment.set_defaults()
    try:
        config, resolved = parse(arguments)
        config.check_world(environment.world_size())
        deepspeed_config(config, environment.world_size() // config.parallel.tensor)
    except (ValueError, OSError) as error:
        fail_alone(str(error))
    run(config, resolved)


def run(config: Config, resolved: str) -> None:
    """Train `config`; `resolved` is what config.yaml will say. Imports what is heavy only once the keys are right, and
    all processes watch one another."""
    meeting = _meet(config)
    from megamult.runtime.lock import RunLock
    from megamult.runtime.logs import RankLog
    from megamult.runtime.progress import Progress
    from megamult.runtime.watchdog import Watchdog

    minutes = config.train.max_minutes
    with contextlib.ExitStack() as stack:
        log = stack.enter_context(RankLog())
        lock = stack.enter_context(RunLock(log.ended))
        progress = Progress()
        if environment.world_size() > 1:
            watchdog = Watchdog(meeting, 60 * config.parallel.timeout_minutes, log)
            progress = stack.enter_context(watchdog).progress
        progress.at(0, "importing", ON_FILES)
        # Megatron says at import, on every rank, which optional packages it does without.
        warnings.filterwarnings("ignore", category=UserWarning, module=r"megatron\.")
        from megamult.distributed import extensions, mesh, process_groups
        from megamult.runtime.signals import StopRequests

        progress.at(0, "joining the process groups", extensions.LIMIT)
        try:
            mpu = mesh.initialize(
                config.parallel.tensor,
                # The watchdog comes first; alone, a group's own timeout would also end who waits for work on files.
                timeout_minutes=config.parallel.timeout_minutes + ON_FILES / 60,
                across_nodes=True,  # asked already
                meeting=meeting,
            )
        except TimeoutError as error:
            say_error(f"rank {environment.rank()} on {environment.host()}: {error}")
            sys.exit(exit_codes.UNAVAILABLE)
        progress.at(0, "joining the group for work on files")
        process_groups.files()
        stop = stack.enter_context(StopRequests(None if minutes is None else _BEGAN + 60 * minutes, log.ended))
        from megamult.train import run_dir as run_dirs

        run_dir = agreed(lambda: stack.enter_context(run_dirs.chosen(config.train.run_dir)))
        code = _train(config, resolved, run_dir, mpu, progress, log, lock, stop)
        mesh.destroy()
    if code:
        sys.exit(code)


def _train(
    config: Config,
    resolved: str,
    run_dir: Path,
    mpu: Any,
    progress: Progress,
    log: RankLog,
    lock: RunLock,
    stop: StopRequests,
) -> int:
    """The run, from its data to its last checkpoint; the exit code."""
    import torch

    from megamult.checkpoint import resume
    from megamult.distributed import mesh
    from megamult.train import corpora
    from megamult.train import run_dir as run_dirs
    from megamult.train.changes import changes
    from megamult.train.checkpoints import RunCheckpoints
    from megamult.train.engine import build, check_deepspeed, parameter_count
    from megamult.train.loop import CheckpointFailed, Diverged, Trainer

    main_rank = environment.rank() == 0
    agreed(lambda: check_deepspeed(config, mpu))
    tokenizer, vocab_size = agreed(lambda: corpora.vocabulary(config))
    load = config.checkpoint.load
    checkpoint = None
    # Before the newest checkpoint is looked for: an earlier part of the run may be writing it.
    progress.at(0, "waiting for the run directory", ON_FILES)
    agreed(lambda: run_dirs.wait_for(lock, run_dir))
    if load:
        progress.at(0, "looking for a checkpoint", ON_FILES)
        checkpoint = agreed(
            lambda: resume.find(
                load, run_dir, lambda info: resume.check_fits(info, config, vocab_size, tokenizer.sha256)
            )
        )
    ours = None if checkpoint is None else run_dirs.own(checkpoint.path, run_dir)
    agreed(lambda: run_dirs.claim(run_dir, load == "latest" or ours is not None))
    progress.at(0, "checking the data", ON_FILES)
    train, valid = corpora.open_datasets(
        config, tokenizer, run_dir, lambda pieces: progress.at(0, f"checking the data, piece {pieces}", ON_FILES)
    )
    files = agreed(lambda: _files(resolved, tokenizer, checkpoint))
    first_step = 0 if checkpoint is None else checkpoint.info.step
    agreed(lambda: run_dirs.begin(run_dir, resolved, ours, first_step, lock))
    agreed(lambda: run_dirs.check_shared(run_dir))
    agreed(lambda: log.open(run_dir / "logs"))
    progress.at(0, "building the model")
    engine = build(config, vocab_size, mpu, draw=checkpoint is None, note=lambda doing: progress.at(0, doing))
    if main_rank:
        print(
            f"{parameter_count(engine.model):,} parameters, {torch.distributed.get_world_size()} processes "
            f"(tensor parallel {config.parallel.tensor}, data parallel {mesh.data_group().size()}), ZeRO "
            f"{config.parallel.zero_stage}, {config.train.dtype}; writing {run_dir}",
            flush=True,
        )
    trainer = Trainer(config, engine, train, valid, vocab_size, progress)
    if checkpoint is not None:
        progress.at(0, "reading the checkpoint", ON_FILES)
        new = agreed(
            lambda: resume.restore(
                checkpoint, engine.partition, engine.optimizer, reset_optimizer=config.checkpoint.reset_optimizer
            )
        )
        notes = trainer.resume(checkpoint.info)
        if main_rank:
            fresh = f"; {len(new)} multipliers are new and start at 1" if new else ""
            step, samples = trainer.step_count, trainer.samples
            print(f"going on from {checkpoint.path}: step {step}, {samples} sequences{fresh}", flush=True)
            # An imported model's configuration is no run's: all but its sizes are defaults.
            changed = changes(checkpoint.info.config, config) if checkpoint.info.data is not None else None
            if changed is not None:
                print(changed, flush=True)
            if checkpoint.info.tokenizer_sha256 is None:
                notes.append("the checkpoint does not say which tokenizer is its own: data.tokenizer is taken on trust")
            for note in notes:
                print(f"note: {note}", flush=True)
    elif load and main_rank:
        print(f"no checkpoint in {run_dir / 'checkpoints'} yet: starting anew", flush=True)
    checkpoints = RunCheckpoints(run_dir, config, vocab_size, tokenizer.sha256, files)
    error, reason, code = None, None, 0
    try:
        reason = trainer.run(run_dir, checkpoints, stop)
        code = exit_codes.RESUME if reason else 0
    except CheckpointFailed as failed:
        error, reason, code = str(failed), failed.reason, exit_codes.NO_CHECKPOINT
    except Diverged as diverged:
        error, code = f"{diverged}; {run_dirs.after_divergence(run_dir, diverged.last_good_step)}", exit_codes.DIVERGED
    train.close()
    if main_rank:
        if code != exit_codes.DIVERGED:
            _conclude(config, vocab_size, trainer, reason, run_dir, code)
        if error is not None:
            say_error(error)
    progress.at(trainer.step_count, "the end")
    torch.distributed.barrier()
    return code


def _meet(config: Config) -> Meeting:
    """All processes come together, or this one ends. What they import is little: a host that is down is named soon."""
    from megamult.distributed import device, open_files, rendezvous

    open_files.raise_limit()
    try:
        gloo = device.backend() == "gloo"
        open_files.check_limit(environment.rank(), environment.world_size(), config.parallel.tensor, gloo)
    except ValueError as error:
        fail_alone(str(error))
    try:
        meeting = rendezvous.meet(config.parallel.rendezvous_seconds, run_settings(dataclasses.asdict(config)))
        if not config.parallel.tensor_across_nodes:
            meeting.check_nodes(config.parallel.tensor)
        return meeting
    except ValueError as error:
        fail(str(error))
    except rendezvous.Refused as error:
        # The first of a launcher's ranks that is refused speaks for its node.
        if environment.rank() <= max(1, launcher.siblings()[0]):
            say_error(str(error))
        else:
            time.sleep(HEAD_START_SECONDS)
        sys.exit(exit_codes.USER_ERROR if error.configuration else exit_codes.UNAVAILABLE)
    except rendezvous.NobodyThere as error:
        # Who is missing, rank 0 says; that rank 0 is, one rank of each node.
        if environment.rank() == 0 or (error.rank_0_is_missing and environment.local_rank() == 0):
            say_error(str(error))
        sys.exit(exit_codes.UNAVAILABLE)


def _conclude(config: Config, vocab_size: int, trainer: Any, reason: str | None, run_dir: Path, code: int) -> None:
    """Say how the run has ended."""
    from megamult.monitor.statistics import spread_table

    if reason is not None:
        print(
            f"{reason}: stopped after step {trainer.step_count} of {config.train.steps}, exit code {code}; go on with "
            f"--checkpoint.load latest --train.run_dir {run_dir}",
            flush=True,
        )
        return
    if trainer.last_multipliers:
        print(spread_table(trainer.last_multipliers))
    _summarize(config, vocab_size, trainer.figures.get("valid_loss"))
    if code == 0 and trainer.last_checkpoint is not None:
        print(f"checkpoint: {trainer.last_checkpoint}", flush=True)


def _files(resolved: str, tokenizer: Any, checkpoint: Any) -> dict[str, bytes]:
    """What goes into every checkpoint beside the tensors; an imported tokenizer's own files stay with their model."""
    from megamult.huggingface.files import TOKENIZER_FOLDER

    if environment.rank() != 0:
        return {}
    files = {"config.yaml": resolved.encode(), "tokenizer.model": Path(tokenizer.model_path).read_bytes()}
    if checkpoint is not None and checkpoint.info.tokenizer_sha256 == tokenizer.sha256:
        files = checkpoint.files(TOKENIZER_FOLDER) | files
    return files


_ENTROPY_TOKENS = 1 << 28
"""Corpora up to this many tokens get their unigram entropy printed: a second or two of counting."""


def _summarize(config: Config, vocab_size: int, valid_loss: float | None) -> None:
    from megamult.data.indexed import read_index, unigram_entropy

    if valid_loss is None:
        return
    print(f"valid loss {valid_loss:.4f} nats per token")
    sources = DataConfig.sources(config.data.train)
    if len(sources) == 1 and read_index(sources[0][0]).tokens <= _ENTROPY_TOKENS:
        entropy = unigram_entropy(sources[0][0], vocab_size)
        print(
            f"unigram entropy of the training tokens {entropy:.4f} nats per token: "
            f"the model is {entropy - valid_loss:.4f} below"
        )
