"""Checkpoints of a run: what a checkpoint contains, and when the next one is due."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from megamult.checkpoint import rng
from megamult.checkpoint.chunks import Chunk
from megamult.checkpoint.info import CheckpointInfo
from megamult.checkpoint.saver import Outcome, Saver
from megamult.config import Config
from megamult.distributed.mesh import Mesh
from megamult.train.engine import Engine


class RunCheckpoints:
    """Saver of a run's state to `checkpoints/` in the run directory. All ranks call each method together.

    Args:
        run_dir: directory of the run.
        config, vocab_size, mesh: the run's configuration, vocabulary size and processes.
        tokenizers: files that define the run's tokenizer, see :attr:`CheckpointInfo.tokenizers`.
        files: contents of the files that are stored beside the tensors (config.yaml, tokenizer.model), by name.
        drawn: whether the run began with weights that it drew at random.
        eod: id of the token that ends a document in the run's corpora.
    """

    def __init__(
        self,
        run_dir: Path,
        config: Config,
        vocab_size: int,
        mesh: Mesh,
        tokenizers: Mapping[str, str] | None = None,
        files: Mapping[str, bytes] | None = None,
        drawn: bool = True,
        eod: int | None = None,
    ) -> None:
        self._drawn, self._eod = drawn, eod
        self._config, self._vocab_size, self._tokenizers, self._mesh = config, vocab_size, dict(tokenizers or {}), mesh
        self._files = files or {}
        chosen = config.checkpoint
        self._saver = Saver(
            run_dir / "checkpoints",
            mesh,
            keep=chosen.keep,
            keep_every=chosen.keep_every,
            asynchronous=chosen.asynchronous,
        )

    def due(self, step: int) -> bool:
        """Return whether checkpoint.save_every asks for a checkpoint after this step. The last step always has one,
        whatever this method returns."""
        every = self._config.checkpoint.save_every
        return every > 0 and step % every == 0

    def save(
        self,
        engine: Engine,
        step: int,
        samples: int,
        data: dict[str, Any] | None,
        figures: dict[str, float],
    ) -> Outcome | None:
        """Begin to save a checkpoint.

        Args:
            step: number of optimizer steps done.
            samples: number of sequences trained on so far.
            data: state of the training data.
            figures: latest figures of the run, such as losses, which are stored in the checkpoint.

        Returns:
            The outcome of this save or, if checkpoint.asynchronous is set, of the previous one. None if the previous
            one does not exist or its outcome has already been returned.
        """
        prefix, state = rng.prefix(self._mesh.rank), engine.state()
        chunks = [*state.chunks, *(Chunk.whole(prefix + key, value) for key, value in rng.states().items())]
        info = CheckpointInfo(
            step=step,
            samples=samples,
            config=dataclasses.asdict(self._config),
            vocab_size=self._vocab_size,
            optimizer={
                "name": self._config.optimizer.name,
                "updates": state.updates,
                "skipped_steps": state.skipped_steps,
                **({"choices": state.choices} if state.choices else {}),
            },
            data=data,
            drawn=self._drawn,
            eod=self._eod,
            layout={
                "processes": self._mesh.size,
                "tensor": self._config.parallel.tensor,
                "zero_stage": self._config.parallel.zero_stage,
            },
            figures=figures,
        )
        info.tokenizers = self._tokenizers
        return self._saver.save(chunks, info, self._files)

    def poll(self) -> Outcome | None:
        """Return the outcome of a save that has ended since the last call, or None if none has."""
        return self._saver.poll()

    def wait(self, seconds: float | None = None) -> Outcome | None:
        """Wait, for at most `seconds`, until the save that was started last ends. Return its outcome, or None if it is
        still running, or if its outcome has been returned before."""
        return self._saver.wait(seconds)
