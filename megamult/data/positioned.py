"""Token ids read from a `.bin` by position: other threads run while a file server answers, a failed read is an error.

Megatron maps the file instead: a thread that touches a page which is not in memory stops the whole interpreter until it
has come, and a page that cannot come (a file that was cut off, a server that is gone) kills the process with SIGBUS.
"""

import os
from typing import Any

import numpy as np


class PositionedReader:
    """Stands in for the `bin_reader` of an `IndexedDataset`; may be used by several threads.

    Args:
        path: of the .bin; open as long as this object.
    """

    def __init__(self, path: str) -> None:
        self._file = open(path, "rb", buffering=0)  # noqa: SIM115 (see above)

    def read(self, dtype: type[np.number[Any]], count: int, offset: int) -> np.ndarray:
        """`count` items from byte `offset` on.

        Raises:
            ValueError: the file ends before.
            OSError: it cannot be read.
        """
        found = np.empty(count, dtype)
        wanted, done = found.view(np.uint8).data, 0
        while done < found.nbytes:
            read = os.preadv(self._file.fileno(), [wanted[done:]], int(offset) + done)
            if read == 0:
                size = os.fstat(self._file.fileno()).st_size
                raise ValueError(
                    f"{self._file.name} has {size} bytes, and the run reads up to byte {int(offset) + found.nbytes}, "
                    "which was there when it began: it has been cut off; copy it again, and go on from the last "
                    "checkpoint"
                )
            done += read
        return found
