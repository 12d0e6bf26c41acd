"""Forked programs behave as those that an interpreter of their own runs."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from tests import programs
from tests.processes import REPOSITORY
from tests.programs import Program, Ranks

TELL = """
import os, sys
print(sys.argv, os.environ.get("MEGAMULT_TEST"), os.getcwd(), __name__)
print(sys.path[0], file=sys.stderr)
sys.exit(int(sys.argv[1]))
"""


@pytest.mark.parametrize("form", ["script", "code", "module"])
def test_arguments_variables_folder_streams_and_exit_code_are_an_interpreters(form: str, tmp_path: Path) -> None:
    (tmp_path / "tell.py").write_text(TELL)
    command = {"script": [str(tmp_path / "tell.py")], "code": ["-c", TELL], "module": ["-m", "tell"]}[form]
    environment = {**os.environ, "MEGAMULT_TEST": "here", "PYTHONPATH": str(REPOSITORY)}
    found = programs.run([*command, "3", "b c"], environment, tmp_path)
    expected = subprocess.run(
        [sys.executable, *command, "3", "b c"], env=environment, cwd=tmp_path, capture_output=True, text=True
    )
    assert (found.returncode, found.stdout, found.stderr) == (3, expected.stdout, expected.stderr)


@pytest.mark.parametrize(
    ("code", "status", "said"),
    [
        ("raise KeyError('no such key')", 1, "KeyError: 'no such key'\n"),
        ("import sys; sys.exit('a word')", 1, "a word\n"),
        ("import os, signal; os.kill(os.getpid(), signal.SIGTERM)", -signal.SIGTERM, ""),
        ("import os, signal; os.kill(os.getpid(), signal.SIGKILL)", -signal.SIGKILL, ""),
        ("import atexit, sys; atexit.register(print, 'bye', file=sys.stderr)", 0, "bye\n"),
        ("import threading, sys; threading.Timer(0.1, print, ['late'], {'file': sys.stderr}).start()", 0, "late\n"),
    ],
)
def test_it_ends_as_an_interpreter_does(code: str, status: int, said: str) -> None:
    done = programs.run(["-c", code])
    assert (done.returncode, done.stdout) == (status, "")
    assert done.stderr.endswith(said) and bool(done.stderr) == bool(said)


def test_an_ignored_signal_is_ignored_and_others_have_their_default() -> None:
    code = "import signal\nfor n in (signal.SIGINT, signal.SIGHUP, signal.SIGTERM): print(signal.getsignal(n))"
    interrupt, hangup, end = programs.run(["-c", code], ignored=[signal.SIGHUP]).stdout.splitlines()
    assert "default_int_handler" in interrupt
    assert (hangup, end) == (str(signal.SIG_IGN), str(signal.SIG_DFL))


def test_it_leads_a_process_group_in_which_its_descendants_are() -> None:
    code = "import os, subprocess, sys; subprocess.run([sys.executable, '-c', 'import os; print(os.getpgrp())'])"
    program = Program(["-c", code])
    assert program.communicate()[0] == f"{program.pid}\n"


def test_once_a_rank_has_failed_the_others_are_asked_to_end_and_the_code_is_the_first_ones() -> None:
    code = (
        "import os, signal, sys, time\n"
        "signal.signal(signal.SIGTERM, lambda *_: sys.exit('asked'))\n"
        "if os.environ['RANK'] == '1': sys.exit(3)\n"
        "time.sleep(600)\n"
    )
    ranks = Ranks(["-c", code], 2, os.environ)
    assert ranks.communicate(60.0) == ("", "asked\n")
    assert ranks.returncode == 3


def test_ranks_share_a_port_and_know_their_places() -> None:
    names = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
    # One write per rank: print makes several of them where output is not buffered, and both ranks share the pipe.
    code = f"import os, sys; sys.stdout.write(' '.join(os.environ[name] for name in {names}) + chr(10))"
    told = sorted(line.split() for line in Ranks(["-c", code], 2, os.environ).communicate(60.0)[0].splitlines())
    port = told[0][-1]
    assert told == [["0", "0", "2", "2", "127.0.0.1", port], ["1", "1", "2", "2", "127.0.0.1", port]]
