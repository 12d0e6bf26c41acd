"""Reading token ids from a `.bin` by position: other threads run meanwhile, and a failed read is an error.

Megatron maps the file instead: a thread that touches a page outside memory stops the whole interpreter until the page
is read, and a page that cannot be read (a file that was cut off, a server that is gone) kills the process by SIGBUS.
"""

from __future__ import annotations

import os
from typing import Any

import numpy as np


class PositionedReader:
    """Replacement for the `bin_reader` of an `IndexedDataset` that several threads may use.

    Args:
        path: the .bin, which stays open as long as this object exists.
    """

    def __init__(self, path: str) -> None:
        self._file = open(path, "rb", buffering=0)  # noqa: SIM115 (see above)

    def read(self, dtype: type[np.number[Any]], count: int, offset: int) -> np.ndarray:
        """Read `count` items from byte `offset` on.

        Raises:
            ValueError: the file ends before them.
            OSError: the file cannot be read.
        """
        found = np.empty(count, dtype)
        wanted, done = found.view(np.uint8).data, 0
        while done < found.nbytes:
            read = os.preadv(self._file.fileno(), [wanted[done:]], int(offset) + done)
            if read == 0:
                size = os.fstat(self._file.fileno()).st_size
                raise ValueError(
                    f"{self._file.name} has {size} bytes, and the run reads up to byte {int(offset) + found.nbytes}, "
                    "which was there when it began. It has been cut off: copy it again, and go on from the last "
                    "checkpoint"
                )
            done += read
        return found
