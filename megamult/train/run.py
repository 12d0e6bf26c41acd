"""Training of a run, after its process groups have been made: check, build, resume, train, report."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from megamult.checkpoint import resume
from megamult.checkpoint.saved import SavedCheckpoint
from megamult.config import Config
from megamult.data.dataset import BlendedDataset
from megamult.data.tokenizer import Tokenizer
from megamult.data.tokenizer_files import SENTENCEPIECE, TOKENIZER_FOLDER
from megamult.distributed import environment
from megamult.distributed.mesh import Mesh
from megamult.effective.reading import EffectiveModel
from megamult.monitor import weights_and_biases
from megamult.monitor.decay import decay_warnings
from megamult.monitor.weights_and_biases import WeightsAndBiases
from megamult.parameters.spec import Role, Side
from megamult.runtime import exit_codes
from megamult.runtime.console import say_error
from megamult.runtime.lock import RunLock
from megamult.runtime.logs import RankLog
from megamult.runtime.patience import ON_FILES
from megamult.runtime.progress import Progress
from megamult.runtime.signals import StopRequests
from megamult.settings import run_settings
from megamult.train import corpora
from megamult.train import run_dir as run_dirs
from megamult.train.changes import changes
from megamult.train.checkpoints import RunCheckpoints
from megamult.train.command_line import agreed
from megamult.train.deepspeed_config import without_monitors
from megamult.train.deepspeed_engine import DeepSpeedEngine, build, check_deepspeed
from megamult.train.loop import CheckpointFailed, Diverged, Trainer
from megamult.train.model import export_warnings
from megamult.train.monitoring import RunMonitor
from megamult.train.schedule import Schedule
from megamult.train.startup import summary
from megamult.train.summary import conclude


@dataclass(frozen=True)
class Run:
    """Run that has started: its configuration and processes, and the objects for its progress, logs, lock and stop."""

    config: Config
    resolved: str
    """Text of the configuration for config.yaml."""
    run_dir: Path
    mesh: Mesh
    progress: Progress
    log: RankLog
    lock: RunLock
    stop: StopRequests
    dry: bool = False
    """Whether the run only checks and says what it would do, and leaves nothing behind."""


def train(run: Run) -> int:
    """Train the model of a run. Collective over all ranks. If one rank finds a user's mistake, all ranks exit.

    Returns:
        The exit code.
    """
    config, progress = run.config, run.progress
    agreed(run.mesh, lambda: check_deepspeed(config, run.mesh))
    agreed(run.mesh, lambda: weights_and_biases.check(config.monitor.wandb))
    tokenizer, vocab_size = agreed(run.mesh, lambda: corpora.vocabulary(config))
    if not run.dry:
        # Wait before looking for the newest checkpoint, because an earlier start of the run may still be writing it.
        progress.at(0, "waiting for the run directory", ON_FILES)
        agreed(run.mesh, lambda: run_dirs.wait_for(run.lock, run.run_dir))
    checkpoint = _find_checkpoint(run, vocab_size, tokenizer)
    if checkpoint is not None and checkpoint.info.step >= config.train.steps:
        _say_finished(config, checkpoint)
        run.mesh.barrier()
        return 0
    ours = None if checkpoint is None else run_dirs.own(checkpoint.path, run.run_dir)
    agreed(run.mesh, lambda: run_dirs.claim(run.run_dir, config.checkpoint.load == "latest" or ours is not None))
    progress.at(0, "checking the data", ON_FILES)
    samples, valid = corpora.open_datasets(
        config,
        tokenizer,
        run.run_dir,
        run.mesh,
        lambda pieces: progress.at(0, f"checking the data, piece {pieces}", ON_FILES),
    )
    tokenizers = _tokenizers(tokenizer, checkpoint)
    files = agreed(run.mesh, lambda: _files(run.resolved, tokenizer, checkpoint))
    first_step = 0 if checkpoint is None else checkpoint.info.step
    if run.dry:
        agreed(run.mesh, lambda: run_dirs.check_writable(run.run_dir))
    else:
        agreed(run.mesh, lambda: run_dirs.begin(run.run_dir, run.resolved, ours, first_step, run.lock))
        agreed(run.mesh, lambda: run_dirs.check_shared(run.run_dir))
        agreed(run.mesh, lambda: run.log.open(run.run_dir / "logs"))
    further = agreed(run.mesh, lambda: _further_output(run))
    progress.at(0, "building the model")
    note: Callable[[str], None] = partial(progress.at, 0)
    draw = checkpoint is None and not run.dry
    built = without_monitors(config) if run.dry else config  # DeepSpeed's monitors make folders when it starts
    saved = None if checkpoint is None else checkpoint.info.optimizer
    choices = (saved or {}).get("choices", {})
    engine = agreed(
        run.mesh,
        lambda: build(built, vocab_size, run.mesh, draw=draw, eod=tokenizer.eod, note=note, choices=choices),
    )
    # Earlier versions wrote imported checkpoints without `drawn`; these have no state of the data.
    drawn = checkpoint is None or (checkpoint.info.drawn and checkpoint.info.data is not None)
    monitor = RunMonitor(config, engine.model, engine.partition, engine.optimizer, vocab_size, drawn=drawn)
    outputs = {} if further is None else {"monitor.wandb": further.write}
    trainer = Trainer(config, engine, samples, valid, vocab_size, progress, monitor, outputs)
    notes = [] if checkpoint is None else agreed(run.mesh, partial(trainer.resume, checkpoint.info))
    _say_what(run, trainer, vocab_size, engine, samples)
    if checkpoint is not None:
        new = resume.new_multipliers(checkpoint, engine.partition, engine.optimizer)
        if not run.dry:
            progress.at(0, "reading the checkpoint", ON_FILES)
            reset = config.checkpoint.reset_optimizer
            agreed(run.mesh, lambda: engine.restore(checkpoint, reset_optimizer=reset))
        if environment.rank() == 0:
            _say_continuation(config, trainer, checkpoint, new, notes)
    if run.dry:
        samples.close()
        if environment.rank() == 0:
            print("dry run: all checks passed, nothing was written")
        run.mesh.barrier()
        return 0
    if checkpoint is None and config.checkpoint.load and environment.rank() == 0:
        print(f"no checkpoint in {run.run_dir / 'checkpoints'} yet: starting anew", flush=True)
    checkpoints = RunCheckpoints(run.run_dir, config, vocab_size, run.mesh, tokenizers, files, drawn, tokenizer.eod)
    code, reason, error = _train(run, trainer, checkpoints)
    samples.close()
    if environment.rank() == 0:
        if code != exit_codes.DIVERGED:
            conclude(config, vocab_size, trainer, reason, run.run_dir, code)
        if error is not None:
            say_error(error)
    # Rank 0 may still send figures, while the others wait for it.
    grace = 0.0 if config.monitor.wandb.project is None else weights_and_biases.SEND_SECONDS
    progress.at(trainer.step_count, "the end", grace)
    if further is not None and (unsent := further.close(code)) is not None:
        print(f"warning: {unsent}", flush=True)
    run.mesh.barrier()
    return code


def _find_checkpoint(run: Run, vocab_size: int, tokenizer: Tokenizer) -> SavedCheckpoint | None:
    """Return the checkpoint that the run resumes from, or None if the run starts anew."""
    config = run.config
    run.progress.at(0, "looking for a checkpoint", ON_FILES)

    def fits(checkpoint: SavedCheckpoint, all_ones: Callable[[Role, Side], bool] = lambda role, side: True) -> None:
        resume.check_fits(checkpoint.info, config, vocab_size, tokenizer.sha256, all_ones)

    def values_fit(checkpoint: SavedCheckpoint) -> None:
        fits(checkpoint, lambda role, side: EffectiveModel(checkpoint).all_ones(role, side))

    for key in ("load", "start"):
        place = getattr(config.checkpoint, key)
        if place is not None:
            found = agreed(
                run.mesh,
                partial(resume.find, run.mesh, place, run.run_dir, fits, f"checkpoint.{key}", values_fit),
            )
            if found is not None:
                return found
    return None


def _same_tokenizer(tokenizer: Tokenizer, checkpoint: SavedCheckpoint | None) -> bool:
    """Return whether a run's checkpoints keep the tokenizer files of the checkpoint that the run continues.

    They do if the run has the same tokenizer, perhaps in another format, or none of its own.
    """
    return checkpoint is not None and tokenizer.sha256 in (None, *checkpoint.info.tokenizers.values())


def _tokenizers(tokenizer: Tokenizer, checkpoint: SavedCheckpoint | None) -> dict[str, str]:
    """Return {name: SHA-256} of the files that define the run's tokenizer, as its checkpoints record them."""
    own = {} if tokenizer.sha256 is None else {tokenizer.defined_by: tokenizer.sha256}
    if checkpoint is None or not _same_tokenizer(tokenizer, checkpoint):
        return own
    return own | checkpoint.info.tokenizers


def _files(resolved: str, tokenizer: Tokenizer, checkpoint: SavedCheckpoint | None) -> dict[str, bytes]:
    """Return the files that every checkpoint stores beside its tensors: contents by name, on rank 0 only.

    If the run continues a checkpoint with the same tokenizer, all tokenizer files of that checkpoint are among them.
    """
    if environment.rank() != 0:
        return {}
    files = {"config.yaml": resolved.encode(), **tokenizer.files()}
    if checkpoint is not None and _same_tokenizer(tokenizer, checkpoint):
        files = checkpoint.files(TOKENIZER_FOLDER) | checkpoint.files(SENTENCEPIECE) | files
    return files


def _further_output(run: Run) -> WeightsAndBiases | None:
    """Return the run at Weights & Biases, on rank 0 if the configuration names a project, and print where it is."""
    settings = run.config.monitor.wandb
    if environment.rank() != 0 or settings.project is None or run.dry:
        return None
    made = WeightsAndBiases(settings, run.run_dir, run_settings(dataclasses.asdict(run.config)))
    print(f"Weights & Biases: {made.place}", flush=True)
    return made


def _say_finished(config: Config, checkpoint: SavedCheckpoint) -> None:
    """Print that the run has taken all of its steps."""
    if environment.rank() == 0:
        print(
            f"nothing is left to do: {checkpoint.path} is of step {checkpoint.info.step}, and train.steps is "
            f"{config.train.steps}; to train on, raise train.steps",
            flush=True,
        )


def _say_what(run: Run, trainer: Trainer, vocab_size: int, engine: DeepSpeedEngine, samples: BlendedDataset) -> None:
    """Print what is trained, and warnings about it. Collective over all ranks."""
    said = summary(run.config, vocab_size, engine, samples, run.run_dir, (trainer.step_count, trainer.samples))
    if environment.rank() == 0:
        print(said, flush=True)
        factors = list(itertools.islice(Schedule(run.config).lr_factors(), run.config.train.steps))
        roles, broken = run.config.model.roles, run.config.model.broken_symmetries
        warnings = decay_warnings(run.config.optimizer, run.config.multipliers, factors, roles, broken)
        for warning in [*warnings, *export_warnings(run.config)]:
            print(f"warning: {warning}", flush=True)


def _say_continuation(
    config: Config, trainer: Trainer, checkpoint: SavedCheckpoint, new: list[str], about_data: list[str]
) -> None:
    """Print from where the run goes on, how the configuration has changed since the checkpoint, and notes about it.

    Args:
        new: names of the multipliers that the checkpoint does not have.
        about_data: notes about the data.
    """
    notes = [*about_data]
    lost = resume.lost_multipliers(checkpoint.info, config)
    if lost:
        listed = ", ".join(f"{role} ({', '.join(sides)})" for role, sides in lost.items())
        notes.append(f"multipliers that the checkpoint has and this run does not are dropped; they are all 1: {listed}")
    fresh = f"; {len(new)} multipliers are new and start at 1" if new else ""
    step, samples = trainer.step_count, trainer.samples
    print(f"going on from {checkpoint.path}: step {step}, {samples} sequences{fresh}", flush=True)
    # An imported checkpoint does not come from a run: its configuration has sizes, and defaults for all other keys.
    changed = changes(checkpoint.info.config, config) if checkpoint.info.data is not None else None
    if changed is not None:
        print(changed, flush=True)
    if not checkpoint.info.tokenizers:
        notes.append(
            "the checkpoint does not say which tokenizer it was trained with: make sure that data.tokenizer is the same"
        )
    elif config.data.tokenizer is None:
        notes.append(
            "data.tokenizer is not set: make sure that the corpora were encoded with the checkpoint's tokenizer"
        )
    for note in notes:
        print(f"note: {note}", flush=True)


def _train(run: Run, trainer: Trainer, checkpoints: RunCheckpoints) -> tuple[int, str | None, str | None]:
    """Train until the run ends.

    Returns:
        (exit code, reason why the run stopped before its last step or None, error message or None).
    """
    try:
        reason = trainer.run(run.run_dir, checkpoints, run.stop)
    except CheckpointFailed as failed:
        return exit_codes.NO_CHECKPOINT, failed.reason, str(failed)
    except Diverged as diverged:
        advice = run_dirs.after_divergence(run.run_dir, diverged.last_good_step)
        return exit_codes.DIVERGED, None, f"{diverged}; {advice}"
    return (exit_codes.RESUME if reason else 0), reason, None
