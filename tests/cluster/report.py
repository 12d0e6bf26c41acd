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
        name = f"{case.get('classname', '').rpartition('.')[2]}: {case.get('name', '').removeprefix('test_')}"
        print(f"| {name.replace('_', ' ').replace('|', '/')} | {result(case)} | {float(case.get('time', 0)):.0f} |")
    print(f"\n## Containers\n\n{Path(sys.argv[2]).read_text(encoding='utf-8').strip()}")


if __name__ == "__main__":
    main()
