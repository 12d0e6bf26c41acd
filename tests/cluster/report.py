"""The report of tests/cluster/run_all.sh: `python tests/cluster/report.py JUNIT_XML CONTAINER_TABLE`."""

from __future__ import annotations

import itertools
import os
import re
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from xml.etree import ElementTree

_QUICK = 8.0  # seconds; the shortest test with hosts took 11


def result(case: ElementTree.Element) -> str:
    """passed, or why not."""
    for kind in ("failure", "error", "skipped"):
        found = case.find(kind)
        if found is not None:
            return f"{kind}: {found.get('message', '').splitlines()[0][:100]}"
    return "passed"


def name(case: ElementTree.Element) -> str:
    """In words."""
    return f"{file(case)}: {case.get('name', '').removeprefix('test_')}".replace("_", " ").replace("|", "/")


def file(case: ElementTree.Element) -> str:
    """That it is from, without its ending."""
    return case.get("classname", "").rpartition(".")[2]


def seconds(case: ElementTree.Element) -> float:
    """That it took."""
    return float(case.get("time", 0))


def rows(cases: list[ElementTree.Element]) -> Iterator[tuple[str, str, float]]:
    """(test, result, seconds); a file whose tests all passed in a few seconds each needs no hosts, and is one row."""
    for of_file, tests in itertools.groupby(cases, key=file):
        together = list(tests)
        if all(result(case) == "passed" and seconds(case) < _QUICK for case in together):
            yield f"{of_file.replace('_', ' ')}: {len(together)} tests", "passed", sum(map(seconds, together))
        else:
            for case in together:
                yield name(case), result(case), seconds(case)


def said(case: ElementTree.Element) -> str:
    """What a test printed that passed: its measurements, and the job's own words."""
    # pytest puts headings into it.
    lines = (case.findtext("system-out") or "").splitlines()
    return "\n".join(line for line in lines if line.strip() and not re.fullmatch(r"-+ [\w ]+ -+", line))


def processor() -> str:
    """Its name."""
    found = re.search(r"^model name\s*: (.*)$", Path("/proc/cpuinfo").read_text(encoding="utf-8"), re.MULTILINE)
    return found[1] if found else "unknown"


def main() -> None:
    """Print it."""
    cases = list(ElementTree.parse(sys.argv[1]).iter("testcase"))
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=False)
    print("# What runs on clusters, shown on one machine\n")
    print(
        f"`tests/cluster/run_all.sh`, {time.strftime('%d %B %Y')}, commit {commit.stdout.strip()}, {os.cpu_count()} "
        f"cores ({processor()}), no GPU. Hosts are namespaces with their own network, processes and shared memory.\n"
    )
    print("| test | result | seconds |\n|---|---|---|")
    for test, outcome, taken in rows(cases):
        print(f"| {test} | {outcome} | {taken:.0f} |")
    print("\n## What the tests printed")
    for case in cases:
        if result(case) == "passed" and (text := said(case)):
            print(f"\n{name(case)}:\n\n```\n{text}\n```")
    print(f"\n## Containers\n\n{Path(sys.argv[2]).read_text(encoding='utf-8').strip()}")


if __name__ == "__main__":
    main()
