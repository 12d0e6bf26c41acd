"""Starts of a run's data on the ranks of a launch."""

from __future__ import annotations

import contextlib
import io
import os
from pathlib import Path
from typing import Any
from unittest import mock

from megamult.config import Config
from megamult.data.config import DataConfig
from megamult.distributed.mesh import current_mesh
from megamult.models.llama.config import ModelConfig


def opened(name: str, here: list[Path], nodes: int) -> tuple[object, str, list[int] | None, list[str]]:
    """(exit code, what it said, samples per epoch, corpora whose files it read) of a start on two ranks.

    Args:
        name: prefix of the corpora's names.
        here: working directory of each rank, with the corpora.
        nodes: 1 or 2; on two, each rank is its node's first.
    """
    from megamult.distributed import environment, start
    from megamult.train import command_line, corpora

    if nodes == 2:
        os.environ["LOCAL_RANK"] = "0"
    start.initialize(1)
    os.chdir(here[environment.rank()])
    config = Config(model=ModelConfig(seq_length=32), data=DataConfig(train=f"{name}_train", valid=f"{name}_valid"))
    config.data.tokenizer = f"{name}.model"
    tokenizer, _ = corpora.vocabulary(config)
    describe_all, read = corpora.describe_all, list[str]()

    def described(prefixes: list[str], tokenizer: Any) -> dict[str, Any]:
        read.extend(prefixes)
        return describe_all(prefixes, tokenizer)

    code, samples, stream = None, None, io.StringIO()
    with (
        mock.patch.object(corpora, "describe_all", described),
        mock.patch.object(start, "destroy"),
        mock.patch.object(command_line, "HEAD_START_SECONDS", 0.0),
        contextlib.redirect_stderr(stream),
        contextlib.redirect_stdout(stream),
    ):
        try:
            train, _ = corpora.open_datasets(config, tokenizer, Path("run"), current_mesh())
            samples = train.samples_per_epoch
        except SystemExit as exit_:
            code = exit_.code
    return code, stream.getvalue(), samples, read
