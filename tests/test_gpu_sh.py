"""`examples/benchmarks/gpu.sh`, rehearsed on a CPU: every part prints figures, and none fails without a row.

The parts that are scripts of their own are read in `tests/test_examples.py`, where those run.
"""

from __future__ import annotations

import ast
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from examples.benchmarks import gpu
from tests.processes import REPOSITORY, starts_processes
from tests.programs import run

SCRIPT = REPOSITORY / "examples" / "benchmarks" / "gpu.sh"


def part(code: str, seconds: float = 60) -> gpu.Part:
    """A part that runs a line of Python."""
    return gpu.Part("a part", seconds, ["-c", code], gpu._printed)


def measured(tmp_path: Path, code: str, seconds: float = 60, left: float = 60) -> tuple[bool, list[str]]:
    """Whether a part succeeded, and the rows that it left."""
    path = tmp_path / "table.md"
    good = gpu.run(part(code, seconds), gpu.Table(path), left)
    return good, path.read_text().splitlines()


@pytest.mark.parametrize("name", gpu.OWN)
def test_every_part_of_its_own_prints_figures_at_toy_sizes(name: str) -> None:
    done = run([SCRIPT.with_name("gpu.py"), "--part", name, "--toy"], env={**os.environ, "DS_ACCELERATOR": "cpu"})
    assert done.returncode == 0, done.stderr
    figures = [found for line in done.stdout.splitlines() if (found := gpu._printed(line))]
    assert len(figures) == {"machine": 2, "symmetric products": 2, "newton-schulz": 2, "model flops": 6}[name]
    for what, value in figures:
        assert what and (name == "machine" or float(re.findall(r"[\d.]+", value.replace(",", ""))[0]) > 0), value


def test_a_part_that_works_leaves_its_figures_and_its_time(tmp_path: Path) -> None:
    good, rows = measured(tmp_path, "print('noise'); print('figure: a | b = 3 ms')")
    assert good and rows[0] == "| a part | a / b | 3 ms |" and re.fullmatch(r"\| a part \| time \| \d+ s \|", rows[1])


@pytest.mark.parametrize(
    ("code", "seconds", "kept", "why"),
    [
        ("print('figure: x = 1'); raise SystemExit('no room')", 60, 1, r"exit code 1 after \d+ s: no room"),
        ("import os; os.kill(os.getpid(), 9)", 60, 0, r"exit code -9 after \d+ s: no output"),
        ("print('nothing measured')", 60, 0, r"no figures in \d+ s: nothing measured"),
        # Its child holds the pipe open, and must go with it.
        (
            "import subprocess, time; print('figure: x = 1', flush=True); subprocess.Popen(['sleep', '99']).wait()",
            2,
            1,
            r"stopped at its limit of 2 s: no output",
        ),
    ],
)
def test_a_part_that_fails_is_a_row_and_keeps_what_it_measured(
    tmp_path: Path, code: str, seconds: float, kept: int, why: str
) -> None:
    starts_processes()
    good, rows = measured(tmp_path, code, seconds)
    assert not good and len(rows) == kept + 1
    assert re.fullmatch(rf"\| a part \| FAILED \| {why} \|", rows[-1]), rows


def test_a_part_for_which_no_time_is_left_is_a_row(tmp_path: Path) -> None:
    assert measured(tmp_path, "print('figure: x = 1')", left=0.5) == (
        False,
        ["| a part | FAILED | no time was left of 540 s |"],
    )


def test_rows_are_on_the_disk_before_the_part_ends(tmp_path: Path) -> None:
    """What is measured survives the end of everything."""
    path = tmp_path / "table.md"
    wait = f"while 'x' not in open({str(path)!r}).read(): time.sleep(0.01)"
    code = f"import time; print('figure: x = 1', flush=True)\n{wait}"
    assert gpu.run(part(code), gpu.Table(path), 60)


def test_tests_that_are_all_skipped_are_no_figure() -> None:
    assert gpu._tests("2 passed, 30 skipped, 99 deselected in 41.20s") == (
        "tests",
        "2 passed, 30 skipped, 99 deselected",
    )
    assert gpu._tests("======= 7 passed in 1.2s =======") == ("tests", "7 passed")
    assert gpu._tests("30 skipped in 2.00s") is None


def test_the_script_ends_with_1_if_a_part_failed_and_prints_its_wheels(tmp_path: Path) -> None:
    starts_processes()
    environment = {**os.environ, "PYTHON": sys.executable}
    output = tmp_path / "new" / "gpu.md"
    # Without --toy, a machine without a GPU is a failure.
    command = [SCRIPT, "--parts", "machine", "--output", output]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, cwd=tmp_path)
    rows = output.read_text().splitlines()
    assert done.returncode == 1, done.stdout + done.stderr
    assert rows[:2] == ["| part | measured | figure |", "|---|---|---|"]
    assert "| machine | FAILED |" in rows[2] and "torch sees no GPU" in rows[2]
    assert rows[3] == "| all | failed parts | machine |"
    wheels = subprocess.run([SCRIPT, "--wheels"], env=environment, capture_output=True, text=True, check=True).stdout
    assert re.search(r"^\| deepspeed \| [\d.]+ \| [\d.]+ \|", wheels, re.M) and "pip wheel --no-deps" in wheels


def test_every_optimizer_that_steps_has_a_row() -> None:
    found = re.search(r"^NAMES = (.*)", SCRIPT.with_name("muon_step.py").read_text(), re.MULTILINE)
    assert found is not None
    for name in ast.literal_eval(found[1]):
        row = gpu._muon_step(f"{name:<24}{12.5:>10.1f}{0.1:>14.3f}{0.8:>14.3f}")
        assert row is not None and name in row[0] and row[1] == "12.5 ms; ours over it 0.800"


def test_a_signal_ends_the_part_that_runs(tmp_path: Path) -> None:
    alive = tmp_path / "alive"
    os.mkfifo(alive)
    code = f"import time; held = open({str(alive)!r}, 'w'); time.sleep(600)"
    main = (
        "import sys; from examples.benchmarks import gpu; "
        f"gpu.parts = lambda toy: [gpu.Part('a part', 600, ['-c', {code!r}], gpu._printed)]; "
        f"sys.argv[1:] = ['--output', {str(tmp_path / 'table.md')!r}]; sys.exit(gpu.main())"
    )
    process = subprocess.Popen([sys.executable, "-c", main], cwd=REPOSITORY)
    with alive.open() as end:  # the part runs now
        process.terminate()
        assert process.wait() == 143
        assert end.read() == ""  # comes when the part has ended


def test_all_parts_fit_into_the_time_and_begin_scripts_that_exist() -> None:
    every = gpu.parts(toy=False)
    *others, last = [each.seconds for each in every]
    assert last == gpu.SECONDS > sum(others)  # the last one gets what is left; a part rarely takes its limit
    scripts = [Path(each.command[0]) for each in every if each.command[0] != "-m"]
    assert len(scripts) == len(every) - 1 and all(script.is_file() for script in scripts)
    for each in every:
        options = [word for word in each.command if word.startswith("--") and Path(each.command[0]).is_file()]
        text = Path(each.command[0]).read_text() if options else ""
        assert all(f'"{option}"' in text for option in options), each.command
