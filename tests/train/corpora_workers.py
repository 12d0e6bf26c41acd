"""Starts of a run's data on the ranks of a launch."""

from __future__ import annotations

import contextlib
import dataclasses
import io
import os
from pathlib import Path
from typing import Any
from unittest import mock

from megamult.config import Config
from megamult.data.config import DataConfig
from megamult.distributed.mesh import current_mesh
from megamult.models.llama.config import ModelConfig


def opened(prefix: str, folder: Path, nodes: int, other: bool) -> tuple[object, str, list[int] | None]:
    """(exit code, what it said, samples per epoch) of a start on two ranks of one or two nodes.

    Args:
        nodes: on two, each rank is its node's first.
        other: the second rank's node has other files under the same name.
    """
    from megamult.distributed import environment, start
    from megamult.train import command_line, corpora

    if nodes == 2:
        os.environ["LOCAL_RANK"] = "0"
    start.initialize(1)
    config = Config(model=ModelConfig(seq_length=32), data=DataConfig(train=f"{prefix}_train", valid=f"{prefix}_valid"))
    config.data.tokenizer = f"{prefix}.model"
    tokenizer, _ = corpora.vocabulary(config)
    describe_all = corpora.describe_all

    def described(prefixes: list[str], tokenizer: Any) -> dict[str, Any]:
        assert environment.local_rank() == 0, "one rank of each node reads"
        found = describe_all(prefixes, tokenizer)
        if other and environment.rank() == 1:
            first = found[prefixes[0]]
            found[prefixes[0]] = dataclasses.replace(
                first, identity=dataclasses.replace(first.identity, contents="changed")
            )
        return found

    code, samples, stream = None, None, io.StringIO()
    with (
        mock.patch.object(corpora, "describe_all", described),
        mock.patch.object(start, "destroy"),
        mock.patch.object(command_line, "HEAD_START_SECONDS", 0.0),
        contextlib.redirect_stderr(stream),
        contextlib.redirect_stdout(stream),
    ):
        try:
            train, _ = corpora.open_datasets(config, tokenizer, folder, current_mesh())
            samples = train.samples_per_epoch
        except SystemExit as exit_:
            code = exit_.code
    return code, stream.getvalue(), samples
