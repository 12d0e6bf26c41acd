"""The messages at the end of a run."""

from __future__ import annotations

from pathlib import Path

from megamult.config import Config
from megamult.data.config import DataConfig
from megamult.data.indexed import read_index, unigram_entropy
from megamult.monitor.statistics import spread_table
from megamult.train.loop import Trainer

_ENTROPY_TOKENS = 1 << 28
"""Largest size, in tokens, of a corpus whose unigram entropy is printed. Counting the tokens takes a second or two."""


def conclude(config: Config, vocab_size: int, trainer: Trainer, reason: str | None, run_dir: Path, code: int) -> None:
    """Print how the run has ended.

    Args:
        config, vocab_size: the run's configuration and vocabulary size.
        trainer: the trainer after its last step.
        reason: reason why the run stopped before its last step, or None if the run is complete.
        run_dir: directory of the run.
        code: exit code of the run.
    """
    if reason is not None:
        print(
            f"{reason}: stopped after step {trainer.step_count} of {config.train.steps}, exit code {code}; go on with "
            f"--checkpoint.load latest --train.run_dir {run_dir}",
            flush=True,
        )
        return
    if trainer.last_multipliers:
        print(spread_table(trainer.last_multipliers))
    _compare_with_unigrams(config, vocab_size, trainer.figures.get("valid_loss"))
    if code == 0 and trainer.last_checkpoint is not None:
        print(f"checkpoint: {trainer.last_checkpoint}", flush=True)


def _compare_with_unigrams(config: Config, vocab_size: int, valid_loss: float | None) -> None:
    """Print the last validation loss. If the training data is one corpus that is not too large, print its unigram
    entropy too: the loss of a model that knows only how often each token occurs."""
    if valid_loss is None:
        return
    print(f"valid loss {valid_loss:.4f} nats per token")
    sources = DataConfig.sources(config.data.train)
    if len(sources) == 1 and read_index(sources[0][0]).tokens <= _ENTROPY_TOKENS:
        entropy = unigram_entropy(sources[0][0], vocab_size)
        side = "below" if valid_loss < entropy else "above"
        print(
            f"unigram entropy of the training tokens {entropy:.4f} nats per token: "
            f"the model's loss is {abs(entropy - valid_loss):.4f} {side} it"
        )
