"""The report of tests/cluster/run_all.sh: `python tests/cluster/report.py JUNIT_XML CONTAINER_TABLE`."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import time
from pathlib import Path
from xml.etree import ElementTree


def result(case: ElementTree.Element) -> str:
    """passed, or why not."""
    for kind in ("failure", "error", "skipped"):
        found = case.find(kind)
        if found is not None:
            return f"{kind}: {found.get('message', '').splitlines()[0][:100]}"
    return "passed"


def name(case: ElementTree.Element) -> str:
    """In words."""
    file = case.get("classname", "").rpartition(".")[2]
    return f"{file}: {case.get('name', '').removeprefix('test_')}".replace("_", " ").replace("|", "/")


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
    for case in cases:
        print(f"| {name(case)} | {result(case)} | {float(case.get('time', 0)):.0f} |")
    print("\n## What the tests printed")
    for case in cases:
        if result(case) == "passed" and (text := said(case)):
            print(f"\n{name(case)}:\n\n```\n{text}\n```")
    print(f"\n## Containers\n\n{Path(sys.argv[2]).read_text(encoding='utf-8').strip()}")


if __name__ == "__main__":
    main()
