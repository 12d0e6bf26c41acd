"""Defects in the inputs of a corpus: their kinds, how often each kind occurs, and where its first five are."""

from __future__ import annotations

import enum
from dataclasses import dataclass, field

_PLACES = 5


class Severity(enum.Enum):
    """What a kind of defect does to the corpus, and whether it is an error.

    `NOTE`: only reported, because no text is lost. `DEFECT`: an error, unless the user allows that the text at this
    place is left out. `MISTAKE`: always an error.
    """

    NOTE = enum.auto()
    DEFECT = enum.auto()
    MISTAKE = enum.auto()


@dataclass(frozen=True)
class _Named:
    one: str
    many: str
    severity: Severity
    remedy: str = ""


class Kind(enum.Enum):
    """Kinds of defects: what is left out of a corpus, or changed in it.

    A kind has at most one remedy. A remedy that is for one place only is in the `detail` given to :meth:`Report.add`.
    """

    MISSING = _Named("input cannot be opened", "inputs cannot be opened", Severity.MISTAKE)
    FORMAT = _Named("file has a format that is not read", "files have formats that are not read", Severity.DEFECT)
    DAMAGED = _Named("file is damaged", "files are damaged", Severity.DEFECT, "copy it again")
    NOT_UTF8 = _Named(
        "line is not UTF-8",
        "lines are not UTF-8",
        Severity.DEFECT,
        "convert the file, for example with iconv -t UTF-8",
    )
    INVALID_JSON = _Named(
        "line is invalid JSON", "lines are invalid JSON", Severity.DEFECT, "write one JSON object per line"
    )
    NO_OBJECT = _Named(
        "line holds no JSON object", "lines hold no JSON object", Severity.DEFECT, "write one JSON object per line"
    )
    NO_FIELD = _Named(
        "object has no field of the given name",
        "objects have no field of the given name",
        Severity.DEFECT,
        "give --json_key the name of the field that holds the text",
    )
    NO_STRING = _Named("text is no string", "texts are no strings", Severity.DEFECT, "make it a string")
    SURROGATE = _Named(
        "lone surrogate was replaced by U+FFFD", "lone surrogates were replaced by U+FFFD", Severity.NOTE
    )
    BLANK_LINE = _Named("blank line was skipped", "blank lines were skipped", Severity.NOTE)
    EMPTY_DOCUMENT = _Named("document without text was skipped", "documents without text were skipped", Severity.NOTE)
    EMPTY_FILE = _Named("file without text was skipped", "files without text were skipped", Severity.NOTE)


@dataclass
class _Found:
    count: int = 0
    places: list[str] = field(default_factory=list)


class Report:
    """What one pass over the inputs finds: how often each kind of defect or note occurs, and its first places."""

    def __init__(self) -> None:
        self._found: dict[Kind, _Found] = {}
        self._formats: dict[str, _Found] = {}

    def add(self, kind: Kind, place: str, detail: str = "", count: int = 1) -> None:
        """Record that `kind` occurs `count` times at a place, which is a file or `file, line 7`."""
        found = self._found.setdefault(kind, _Found())
        found.count += count
        if len(found.places) < _PLACES:
            found.places.append(f"{place}: {detail}" if detail else place)

    def add_file(self, form: str, path: str) -> None:
        """Record that a file is read in the format `form`."""
        found = self._formats.setdefault(form, _Found())
        found.count += 1
        if len(found.places) < _PLACES:
            found.places.append(path)

    def count(self, kind: Kind) -> int:
        """Return how often `kind` was recorded."""
        return self._found[kind].count if kind in self._found else 0

    def lines(self) -> list[str]:
        """Return a line for each kind that was found: count, name and first places.

        If files were read in more than one format, a first line says which files in which format. It shows, for
        example, that a README in the folder of a corpus was read as text.
        """
        formats = [f"{found.count} of {form} ({_places(found)})" for form, found in self._formats.items()]
        mixed = [f"files of different formats: {', '.join(formats)}"] if len(formats) > 1 else []
        dropped = {Severity.DEFECT: "dropped: "}
        kinds = [kind for kind in Kind if kind in self._found]
        return mixed + [dropped.get(kind.value.severity, "") + self._line(kind, remedy=False) for kind in kinds]

    def _line(self, kind: Kind, remedy: bool) -> str:
        found, named = self._found[kind], kind.value
        line = f"{found.count} {named.one if found.count == 1 else named.many} ({_places(found)})"
        return f"{line}: {named.remedy}" if remedy and named.remedy else line

    def refuse(self, skip_defects: bool = False) -> None:
        """Raise one error that lists everything found, if there are mistakes, or defects that may not be skipped.

        Raises:
            ValueError: there are mistakes, or there are defects and `skip_defects` is false.
        """
        refused = {Severity.MISTAKE} if skip_defects else {Severity.MISTAKE, Severity.DEFECT}
        reasons = [kind for kind in Kind if kind in self._found and kind.value.severity in refused]
        if not reasons:
            return
        message = "; ".join(self._line(kind, remedy=True) for kind in reasons)
        if all(kind.value.severity is Severity.DEFECT for kind in reasons):
            message += "; or drop what is defective with --on_error skip"
        others = [self._line(kind, remedy=False) for kind in Kind if kind in self._found and kind not in reasons]
        raise ValueError(f"{message} (also found: {'; '.join(others)})" if others else message)


def _places(found: _Found) -> str:
    return "; ".join(found.places) + ("; ..." if found.count > len(found.places) else "")
