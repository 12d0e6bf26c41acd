"""launch/pretrain.py by hand on two nodes: commands and files that differ do not train as one run."""

from __future__ import annotations

import json
import os
from pathlib import Path

from megamult.distributed import environment
from tests.processes import free_port
from tests.programs import Program
from tests.train.command import REPOSITORY, data_arguments


def rank(number: int, port: int, *arguments: str) -> Program:
    """One of two ranks, as a launcher on its node would start it."""
    place = {"RANK": str(number), "LOCAL_RANK": "0", "WORLD_SIZE": "2"}
    place |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "OMP_NUM_THREADS": "1"}
    return Program([REPOSITORY / "launch" / "pretrain.py", *arguments], {**os.environ, **place})


def test_another_learning_rate_and_another_deepspeed_file_on_the_second_node_are_named_on_both(
    corpus: Path, tmp_path: Path
) -> None:
    run_dir, port = tmp_path / "run", free_port()
    files = [tmp_path / "one.json", tmp_path / "two.json"]
    for file, size in zip(files, (1000, 2000), strict=True):
        file.write_text(json.dumps({"zero_optimization": {"reduce_bucket_size": size}}))
    started = [
        rank(
            number,
            port,
            *("--config", "examples/configs/tiny.yaml", *data_arguments(corpus)),
            *("--train.run_dir", str(run_dir), "--train.steps", "2", "--optimizer.warmup_steps", "0"),
            *("--optimizer.lr", lr, "--deepspeed", str(file), "--parallel.rendezvous_seconds", "10"),
        )
        for number, (lr, file) in enumerate(zip(("1e-3", "2e-3"), files, strict=True))
    ]
    said = [process.communicate(timeout=180)[1] for process in started]
    assert [process.returncode for process in started] == [2, 2], said
    here = environment.host()
    for text in said:
        (line,) = [line for line in text.splitlines() if line.startswith("error:")]
        assert f"optimizer.lr is 0.002 on rank 1 ({here}) and 0.001 on rank 0 ({here})" in line
        assert "deepspeed.zero_optimization.reduce_bucket_size is 2000 on rank 1" in line
    assert not run_dir.exists(), "nothing was written"
