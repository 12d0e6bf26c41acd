"""launch/pretrain.py as a user starts it: a corpus, the launcher, what it said, who is still there afterwards."""

from __future__ import annotations

import contextlib
import hashlib
import io
import os
import random
import subprocess
import sys
import time
import traceback
import uuid
from dataclasses import dataclass
from pathlib import Path
from unittest import mock

from tests import programs
from tests.processes import free_port, starts_processes
from tests.programs import Ranks

REPOSITORY = Path(__file__).parents[2]
VOCAB = 400


def make_corpus(folder: Path) -> Path:
    """PREFIX of a corpus of about 20,000 tokens, made by launch/prepare_data.py."""
    starts_processes()
    draw = random.Random(0)
    words = ["".join(draw.choices("abcdefghijklmnop", k=draw.randint(2, 6))) for _ in range(200)]
    text = "\n\n".join(" ".join(draw.choices(words, k=100)) for _ in range(100))
    (folder / "text.txt").write_text(text, encoding="utf-8")
    arguments = [
        "--input",
        folder / "text.txt",
        "--output",
        folder / "tiny",
        "--valid_fraction",
        "0.1",
        "--workers",
        "1",
    ]
    programs.run([REPOSITORY / "launch" / "prepare_data.py", *arguments, "--vocab_size", str(VOCAB)]).check_returncode()
    return folder / "tiny"


def data_arguments(prefix: Path) -> list[str]:
    """The keys that name a corpus."""
    return [f"--data.train={prefix}_train", f"--data.valid={prefix}_valid", f"--data.tokenizer={prefix}.model"]


def run(script: str, *arguments: object) -> subprocess.CompletedProcess[str]:
    """Run a program of `launch/` to its end, as a user does."""
    environment = {**os.environ, "PYTHONPATH": str(REPOSITORY), "OMP_NUM_THREADS": "1"}
    environment.pop("PYTHONWARNINGS", None)  # what a user would see
    return programs.run([REPOSITORY / "launch" / script, *map(str, arguments)], environment)


def snapshot(folder: Path) -> dict[str, str]:
    """Every path below `folder`, with a digest of each file's bytes."""
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() if path.is_file() else "folder"
        for path in sorted(folder.rglob("*"))
    }


@dataclass
class Outcome:
    """What a launch left."""

    code: int
    stdout: str
    stderr: str
    left: list[str]
    """Command lines of its processes that were still there five seconds after it had ended."""

    @property
    def text(self) -> str:
        """Both streams."""
        return self.stdout + self.stderr

    @property
    def errors(self) -> list[str]:
        """The lines that tell a user's mistake."""
        return [line for line in self.text.splitlines() if line.startswith("error:")]


class Launch:
    """launch/pretrain.py as it runs: by itself, on `processes` ranks, or on so many under DeepSpeed's launcher.

    Without the launcher, the ranks are forked (`tests/programs.py`) and this object does what a launcher does: when a
    rank ends with an error, it ends the others.

    Args:
        first: a folder to import from before all others.
    """

    def __init__(
        self,
        arguments: list[str],
        processes: int | None = None,
        first: Path | None = None,
        launcher: bool = False,
    ) -> None:
        starts_processes()
        self._marker = f"MEGAMULT_TEST_{uuid.uuid4().hex}"
        environment = {**os.environ, self._marker: "1", "OMP_NUM_THREADS": "1"}
        environment["PYTHONPATH"] = os.pathsep.join(str(path) for path in (first, REPOSITORY) if path is not None)
        environment.pop("PYTHONWARNINGS", None)  # what a user would see
        command = [str(REPOSITORY / "launch" / "pretrain.py"), *arguments]
        self.process: Ranks | subprocess.Popen[str]
        if launcher:
            runner = [str(Path(sys.executable).with_name("deepspeed")), "--num_gpus", str(processes)]
            self.process = subprocess.Popen(
                [*runner, "--master_port", str(free_port()), *command],
                cwd=REPOSITORY,
                env=environment,
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                text=True,
            )
        else:
            self.process = Ranks(command, processes, env=environment)

    def pids(self) -> dict[int, str]:
        """Process id -> command line of every process of it that is there."""
        ranks = self.process.groups if isinstance(self.process, Ranks) else set()
        found = {}
        for process in Path("/proc").glob("[0-9]*"):
            with contextlib.suppress(OSError):
                group = int((process / "stat").read_text().rpartition(")")[2].split()[2])
                if group in ranks or self._marker.encode() in (process / "environ").read_bytes():
                    found[int(process.name)] = (process / "cmdline").read_bytes().replace(b"\0", b" ").decode()
        return found

    def ranks(self) -> list[int]:
        """Process ids of the ranks that are there."""
        if isinstance(self.process, Ranks):
            return sorted(self.process.groups & self.pids().keys())
        return [pid for pid, line in self.pids().items() if "pretrain.py" in line and "deepspeed" not in line]

    def wait(self, timeout: float = 180.0) -> Outcome:
        """Until it has ended."""
        stdout, stderr = self.process.communicate(timeout=timeout)
        deadline = time.monotonic() + 5.0
        while (left := self.pids()) and time.monotonic() < deadline:
            time.sleep(0.1)
        assert self.process.returncode is not None
        return Outcome(self.process.returncode, stdout, stderr, list(left.values()))


def start(
    arguments: list[str], processes: int | None = None, timeout: float = 180.0, launcher: bool = False
) -> Outcome:
    """Run launch/pretrain.py to its end."""
    return Launch(arguments, processes, launcher=launcher).wait(timeout)


def answers(cases: list[list[str]]) -> list[tuple[object, str]]:
    """(exit code, or the traceback of what is no exit; standard error) of the command line for each case, on this rank.

    One process asks many times: its torch.distributed outlives each case (DeepSpeed starts it once per process), and
    nobody waits for a launcher.
    """
    from torch.distributed import PrefixStore

    from megamult.distributed import environment, rendezvous, start
    from megamult.train import command_line, pretrain

    environment.set_defaults()
    all_here = rendezvous.meet(60.0)
    found: list[tuple[object, str]] = []
    for number, case in enumerate(cases):
        # As if the processes had just been started for it.
        meeting = rendezvous.Meeting(PrefixStore(f"case {number}", all_here.store), all_here.machines)
        stream, code = io.StringIO(), None
        with (
            mock.patch.object(start, "destroy"),
            mock.patch.object(command_line, "HEAD_START_SECONDS", 0.0),
            mock.patch.object(pretrain, "_meet", return_value=meeting),
            contextlib.redirect_stderr(stream),
        ):
            try:
                pretrain.main(case)
            except SystemExit as exit_:
                code = exit_.code
            except BaseException:
                code = traceback.format_exc()
        found.append((code, stream.getvalue()))
    return found
