"""Libraries that only some formats of inputs need. The package's extra `corpora` installs them."""

from __future__ import annotations

import importlib
from types import ModuleType


class MissingLibrary(Exception):
    """A library is not installed. The message names it and says how to install it."""


def load(module: str) -> ModuleType:
    """Import a module of a library that the extra `corpora` installs.

    Raises:
        MissingLibrary: it is not installed.
    """
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        library = module.partition(".")[0]
        if (error.name or "").partition(".")[0] != library:
            raise  # the library is there, and lacks one of its own
        raise MissingLibrary(
            f"needs the library {library}, which is not installed: install the extra `corpora`, with "
            'pip install -c constraints.txt -e ".[corpora]"'
        ) from None
