"""launch/setup_env.sh with a small program in the place of Python: what it makes, uses and leaves alone."""

from __future__ import annotations

import os
import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]

# Makes "environments" that hold itself and their path, and notes what it is asked for.
_PYTHON = """#!/bin/bash
case "$1" in
    -V) echo Python 3.11.99 ;;
    -) cat >/dev/null ;; # asked what it lacks: nothing
    -m)
        if [[ "$2" == venv ]]; then
            [[ "$3" != --clear ]] || { shift && rm -rf "$3"/* "$3"/.[!.]*; }
            mkdir -p "$3/bin" && cp "$FAKE" "$3/bin/python" && echo "VIRTUAL_ENV=\\"$3\\"" >"$3/bin/activate"
        elif [[ "$2" == pip ]]; then
            echo "$0 $*" >>"$LOG"
        fi
        ;;
    megamult/distributed/extensions.py) echo "$0 $*" >>"$LOG" ;;
esac
"""


@dataclass
class Place:
    """A folder with checkouts."""

    folder: Path

    def checkout(self, name: str) -> Path:
        """A checkout with what the script reads."""
        made = self.folder / name
        (made / "launch").mkdir(parents=True)
        (made / "megamult").mkdir()
        for file in ("launch/setup_env.sh", "setup.py", "constraints.txt", "megamult/__init__.py"):
            shutil.copy(ROOT / file, made / file)
        return made

    def source(self, checkout: Path) -> tuple[Path, str]:
        """VIRTUAL_ENV after sourcing the script there, and what it said."""
        done = subprocess.run(
            ["bash", "-c", 'source launch/setup_env.sh && printf "%s" "$VIRTUAL_ENV"'],
            cwd=checkout,
            env={
                "PATH": os.environ["PATH"],
                "CUDA_VISIBLE_DEVICES": "",
                "CXX": "true",
                "MEGAMULT_PYTHON": str(self.folder / "python"),
                "FAKE": str(self.folder / "python"),
                "LOG": str(self.folder / "log"),
            },
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode == 0, done.stderr
        return Path(done.stdout), done.stderr

    def installed_into(self) -> set[Path]:
        """Environments that pip has installed into."""
        return {Path(line.split(" ")[0]).parents[1] for line in self.log() if " install " in line}

    def log(self) -> list[str]:
        """Calls of pip and of the program that frees locks."""
        return (self.folder / "log").read_text().splitlines()


@pytest.fixture
def place(tmp_path: Path) -> Place:
    (tmp_path / "python").write_text(_PYTHON)
    (tmp_path / "python").chmod(0o755)
    return Place(tmp_path)


def contents(folder: Path) -> dict[str, bytes]:
    return {str(file.relative_to(folder)): file.read_bytes() for file in folder.rglob("*") if file.is_file()}


def by_hand(environment: Path, place: Place) -> None:
    """An environment that no script of ours has made."""
    (environment / "bin").mkdir(parents=True)
    shutil.copy(place.folder / "python", environment / "bin" / "python")
    (environment / "bin" / "activate").write_text(f'VIRTUAL_ENV="{environment}"\n')
    (environment / "precious").write_text("packages")


def test_a_fresh_checkout_gets_its_venv_and_keeps_it(place: Place) -> None:
    checkout = place.checkout("a")
    made, said = place.source(checkout)
    assert made == checkout / ".venv" and "making .venv with" in said
    (made / "precious").write_text("packages")
    again, said = place.source(checkout)
    assert again == made and said == "" and (made / "precious").exists()
    assert place.log()[-1] == f"{made}/bin/python megamult/distributed/extensions.py {made}/torch_extensions", (
        "frees locks each time"
    )


def test_another_checkouts_environment_behind_a_link_is_neither_emptied_nor_installed_into(place: Place) -> None:
    theirs = place.checkout("theirs") / ".venv"
    by_hand(theirs, place)
    before = contents(theirs)
    ours = place.checkout("ours")
    (ours / ".venv").symlink_to("../theirs/.venv")
    made, said = place.source(ours)
    assert contents(theirs) == before
    assert made.parent == ours and made.name.startswith(".venv-") and (made / "bin" / "python").exists()
    assert f".venv is a link to {theirs}, which this checkout did not make: it is left as it is." in said
    assert place.installed_into() == {made}
    assert (ours / ".venv").is_symlink()
    again, said = place.source(ours)
    assert (again, said) == (made, ""), "said once, and used from then on"


def test_an_environment_that_a_script_of_ours_made_is_still_anothers_behind_a_link(place: Place) -> None:
    theirs = place.checkout("theirs")
    made, _ = place.source(theirs)
    before = contents(made)
    ours = place.checkout("ours")
    shutil.copy(theirs / ".venv-id", ours)  # as in a copy of the whole checkout
    (ours / ".venv").symlink_to(made)
    assert place.source(ours)[0].parent == ours
    assert contents(made) == before


@pytest.mark.parametrize("how", ["moved", "copied"])
def test_a_checkout_at_a_new_path_gets_a_new_environment_and_the_old_one_stays(place: Place, how: str) -> None:
    old, new = place.checkout("old"), place.folder / "new"
    place.source(old)
    (old / ".venv" / "precious").write_text("packages")
    shutil.move(old, new) if how == "moved" else shutil.copytree(old, new)
    before = contents(new / ".venv")
    made, said = place.source(new)
    assert contents(new / ".venv") == before
    assert made.parent == new and made.name != ".venv"
    assert f".venv was made for {old} (moved, copied, or seen from elsewhere): it is left as it is." in said
    assert place.source(new) == (made, "")


def test_an_environment_made_by_hand_in_the_checkout_is_used(place: Place) -> None:
    """Such an environment is that of the image with NVIDIA's packages, or a conda prefix."""
    checkout = place.checkout("a")
    by_hand(checkout / ".venv", place)
    (checkout / ".venv" / "bin" / "activate").rename(checkout / ".venv" / "bin" / "pip")  # conda's has no activate
    made, _ = place.source(checkout)
    assert made == checkout / ".venv" and (made / "precious").read_text() == "packages"


def test_only_an_environment_that_this_checkout_made_here_is_made_anew(place: Place) -> None:
    checkout = place.checkout("a")
    made, _ = place.source(checkout)
    (made / "bin" / "python").unlink()  # as after an upgrade of the system's Python
    (made / "leftover").touch()
    assert place.source(checkout)[0] == made
    assert not (made / "leftover").exists() and (made / "bin" / "python").exists()
    # The same on a machine that lacks the Python of the one that made it, where jobs may be using it.
    (made / "bin" / "python").unlink()
    stamp = made / ".megamult-owner"
    stamp.write_text("\n".join([*stamp.read_text().splitlines()[:2], "login-node"]) + "\n")
    before = contents(made)
    other, said = place.source(checkout)
    assert other != made and other.parent == checkout
    assert contents(made) == before
    assert ".venv does not work, and was not made by this checkout on this machine: it is left as it is." in said


def test_a_broken_environment_made_by_hand_is_left_alone(place: Place) -> None:
    checkout = place.checkout("a")
    by_hand(checkout / ".venv", place)
    (checkout / ".venv" / "bin" / "python").unlink()
    before = contents(checkout / ".venv")
    made, _ = place.source(checkout)
    assert made.name.startswith(".venv-") and contents(checkout / ".venv") == before


def test_a_link_to_an_empty_folder_or_to_what_was_made_through_it_is_used(place: Place) -> None:
    """A larger disk for the environment."""
    checkout, disk = place.checkout("a"), place.folder / "disk"
    disk.mkdir()
    (checkout / ".venv").symlink_to(disk)
    assert place.source(checkout)[0] == checkout / ".venv"
    assert (disk / "bin" / "python").exists()
    assert place.source(checkout) == (checkout / ".venv", "")


def test_what_an_interrupted_start_left_is_made_whole(place: Place) -> None:
    checkout = place.checkout("a")
    made, _ = place.source(checkout)
    shutil.rmtree(made / "bin")
    assert place.source(checkout)[0] == made and (made / "bin" / "python").exists()
