"""README and docs/ name only what exists: files, keys of a run, and names of the package."""

from __future__ import annotations

import importlib
import re
from pathlib import Path

import pytest

from megamult.models.architectures import ARCHITECTURES
from megamult.train.command_line import parser

ROOT = Path(__file__).resolve().parents[1]
README = ROOT / "README.md"
PAGES = [README, ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
EVERY_PAGE = pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)

FOLDERS = "launch|examples|tests|docs|docker|megamult"
SECTIONS = "model|multipliers|optimizer|parallel|data|train|checkpoint|monitor"


def broken_links(page: Path, text: str) -> list[str]:
    """Relative links to a file or a heading that is not there."""
    broken = []
    for link in re.findall(r"\]\(([^)\s]+)\)", text):
        if link.startswith(("http://", "https://")):
            continue
        name, _, heading = link.partition("#")
        target = page.parent / name if name else page
        if not target.exists() or (heading and heading not in headings(target.read_text())):
            broken.append(link)
    return broken


def headings(text: str) -> set[str]:
    """Anchors that a Markdown reader makes of the headings."""
    titles = re.findall(r"^#+ (.+)$", re.sub(r"```.*?```", "", text, flags=re.S), re.M)
    return {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}


def code(text: str) -> list[str]:
    """Words in code, inline and in blocks."""
    blocks = re.findall(r"```\w*\n(.*?)```", text, re.S)
    inline = re.findall(r"`([^`\n]+)`", re.sub(r"```.*?```", "", text, flags=re.S))
    return " ".join(blocks + inline).split()


def missing_files(text: str) -> list[str]:
    """Paths in code that begin with one of the repository's folders and do not exist."""
    words = {word.strip("(),;:\"'").split("::")[0] for word in code(text)}
    paths = {word for word in words if re.fullmatch(rf"(?:\./)?(?:{FOLDERS})/[\w./-]*", word)}
    # What a command writes is not there yet; `runs/` and the data of the examples are not among the folders.
    return sorted(path for path in paths if not (ROOT / path).exists())


def unknown_keys(text: str, known: set[str]) -> list[str]:
    """Keys of a run, as `--section.key` anywhere or as `section.key` in code, that the parser does not have."""
    named = set(re.findall(rf"--((?:{SECTIONS})\.[\w.]*\w)", text))
    bare = (re.fullmatch(rf"((?:{SECTIONS})\.[\w.]+?):?", word) for word in code(text))
    named |= {match[1] for match in bare if match and not match[1].endswith((".py", ".yaml"))}
    return sorted(named - known)


def unknown_names(text: str) -> list[str]:
    """Names `megamult.x.y` in code that cannot be imported."""
    text = re.sub(r"```(?!python).*?```", "", text, flags=re.S)
    blocks = re.findall(r"```python\n(.*?)```", text, re.S)
    inline = re.findall(r"`([^`\n]+)`", re.sub(r"```.*?```", "", text, flags=re.S))
    names = {name for block in blocks for name in re.findall(r"\bmegamult(?:\.\w+)+", block)}
    names |= {match[1] for part in inline if (match := re.match(r"(megamult(?:\.\w+)+)(?=$|\()", part))}
    return sorted(name for name in names if not can_be_imported(name))


def can_be_imported(name: str) -> bool:
    """Whether `name` is a module, or an attribute of the longest part of it that is one."""
    parts = name.split(".")
    for cut in range(len(parts), 0, -1):
        try:
            found = importlib.import_module(".".join(parts[:cut]))
        except ModuleNotFoundError:
            continue
        for part in parts[cut:]:
            found = getattr(found, part, None)
        return found is not None
    return False


@pytest.fixture(scope="module")
def keys() -> set[str]:
    """Keys of every architecture."""
    return set().union(*(parser(name).get_defaults().keys() for name in ARCHITECTURES))


def test_the_readme_is_short_and_has_a_line_for_each_folder_and_each_page() -> None:
    text = README.read_text()
    assert len(text.splitlines()) <= 150
    folders = {folder.name for folder in (ROOT / "megamult").iterdir() if (folder / "__init__.py").exists()}
    assert folders == set(re.findall(r"^\| `megamult/(\w+)/` \|", text, re.M))
    for page in PAGES[2:]:
        assert f"](docs/{page.name})" in text


@EVERY_PAGE
def test_every_relative_link_leads_somewhere(page: Path) -> None:
    assert broken_links(page, page.read_text()) == []


@EVERY_PAGE
def test_every_path_of_the_repository_exists(page: Path) -> None:
    assert missing_files(page.read_text()) == []


@EVERY_PAGE
def test_every_key_is_one_of_the_parser(page: Path, keys: set[str]) -> None:
    assert unknown_keys(page.read_text(), keys) == []


@EVERY_PAGE
def test_every_name_of_the_package_can_be_imported(page: Path) -> None:
    assert unknown_names(page.read_text()) == []


def test_the_glossary_has_at_most_eight_nouns_for_a_step_and_each_word_once() -> None:
    text = (ROOT / "docs" / "glossary.md").read_text()
    tables = [re.findall(r"^\| ([^|]+) \|", part, re.M)[1:] for part in text.split("\n## ")[1:]]
    assert 0 < len(tables[0]) <= 8
    words = [word for table in tables for entry in table for word in entry.split(", ")]
    assert len(words) == len(set(words)), "one word, one meaning"


def test_mistakes_are_found(keys: set[str]) -> None:
    links = "[a](docs/none.md) [b](README.md#nowhere) [c](docs) [d](#start)"
    assert broken_links(README, links) == ["docs/none.md", "README.md#nowhere"]
    assert missing_files("`launch/none.py`, `megamult/zero/`\n```bash\nlaunch/test.sh tests/no -k row\n```") == [
        "launch/none.py",
        "tests/no",
    ]
    assert unknown_keys("`--train.stepz 3` `train.steps` `optimizer.lrr`: `examples/train.py`", keys) == [
        "optimizer.lrr",
        "train.stepz",
    ]
    named = "`megamult.fold` `megamult.none(x)` `a megamult.sif`\n```python\nmegamult.zero.no\nmegamult.attach(e)\n```"
    assert unknown_names(named) == ["megamult.none", "megamult.zero.no"]
