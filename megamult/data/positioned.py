"""Reading of token ids from a `.bin` by position. Other threads run during a read, and a failed read raises an error.

Megatron's own reader maps the file into memory. If a thread touches a page that has not been read from the file yet,
the whole interpreter waits until the page is read. If the page cannot be read, because the file was cut off or its
server is gone, SIGBUS kills the process.
"""

from __future__ import annotations

import os
from typing import Any

import numpy as np


class PositionedReader:
    """Replacement for the `bin_reader` of an `IndexedDataset`. Several threads may use it at the same time.

    Args:
        path: path of the .bin, which stays open as long as this object exists.
    """

    def __init__(self, path: str) -> None:
        self._file = open(path, "rb", buffering=0)  # noqa: SIM115 (see above)

    def read(self, dtype: type[np.number[Any]], count: int, offset: int) -> np.ndarray:
        """Read `count` items, starting at byte `offset`.

        Raises:
            ValueError: the file ends before the end of the last item.
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
                    "so the file has been cut off since the run began: copy the file again, and resume from the last "
                    "checkpoint"
                )
            done += read
        return found
