"""Files that a user's inputs name: files, folders, and patterns such as `data/*.jsonl.gz`."""

from __future__ import annotations

import glob
import os
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

from megamult.data.defects import Kind, Report


def expand(inputs: Sequence[str | Path], outputs: Iterable[Path], report: Report) -> list[str]:
    """Return the files that `inputs` name, in the order of `inputs`.

    A folder stands for all files in it and below it, sorted by name folder by folder, without hidden ones. A pattern
    stands for what matches it, sorted in the same way (`**` matches any number of folders). An input that is the path
    of a file or folder is taken literally, even if it contains `*`, `?` or `[`. A folder and a pattern leave `outputs`
    out, so that a command that writes into the folder that it reads can be repeated. What cannot be read, and a file
    that is named twice, is added to `report`.
    """
    own = tuple(f"{os.path.realpath(path)}{os.sep}" for path in outputs)  # an output may be a folder
    named: dict[str, str] = {}
    files: list[str] = []
    for each in map(str, inputs):
        found = _matches(each, own)
        if not found:
            report.add(Kind.MISSING, each, _reason(each))
        for file in found:
            real = os.path.realpath(file)
            if not os.path.isfile(file):
                # A file is read more than once: first to check it, later to encode it. A pipe can be read only once.
                fact = "is not a regular file" if os.path.exists(file) else "does not exist"
                report.add(Kind.MISSING, file, f"{fact}: give the path of a file, a folder or a pattern")
            elif not os.access(file, os.R_OK):
                report.add(Kind.MISSING, file, "may not be read: check its permissions")
            elif real in named:
                report.add(
                    Kind.MISSING,
                    file,
                    f"is named twice, by {named[real]} and by {each}: remove one (a larger weight in `data.train` "
                    "makes a run see a corpus more often)",
                )
            else:
                named[real] = each
                files.append(file)
    return files


def _matches(given: str, outputs: tuple[str, ...]) -> list[str]:
    if os.path.isdir(given):
        found = list(_walk(given, ()))
    elif os.path.lexists(given) or not glob.has_magic(given):
        return [given]
    else:
        # `**` matches a folder and also what is below it.
        below = [_walk(match, ()) if os.path.isdir(match) else [match] for match in glob.glob(given, recursive=True)]
        unique = {os.path.normpath(file): file for files in below for file in files}
        found = sorted(unique.values(), key=lambda file: Path(file).parts)
    return [file for file in found if not f"{os.path.realpath(file)}{os.sep}".startswith(outputs)]


def _walk(folder: str, above: tuple[str, ...]) -> Iterator[str]:
    real = os.path.realpath(folder)
    if real in above:  # a link to a folder that contains it
        return
    for name in sorted(os.listdir(folder)):
        path = os.path.join(folder, name)
        if name.startswith("."):
            continue
        if os.path.isdir(path):
            yield from _walk(path, (*above, real))
        else:
            yield path


def _reason(given: str) -> str:
    if os.path.isdir(given):
        return "is a folder without files to read: give the folder that holds the corpus"
    return "matches no file: correct the pattern, and quote it so that the shell does not change it"
