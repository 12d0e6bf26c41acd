"""Number of sockets that a rank of a run holds open, and a check that the limit of open files allows these and the
corpora."""

from __future__ import annotations

import contextlib
import resource

_SPARE = 256
"""Number of open files that are neither sockets to other ranks nor corpora: libraries, checkpoints, logs, DeepSpeed's
extensions."""


def raise_limit() -> None:
    """Raise this process's soft limit of open files to the hard limit, if the kernel allows it."""
    hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    # Some containers inherit a hard limit above the kernel's own. The kernel refuses to set such a value, so the soft
    # limit stays as it is.
    with contextlib.suppress(ValueError, OSError):
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))


def sockets(rank: int, processes: int, tensor: int, gloo: bool) -> int:
    """Return the number of sockets from one rank to others. gloo connects every pair of ranks of a group.

    Args:
        rank: number of the rank. Rank 0 serves the store of the rendezvous and the watchdog, which notices dead ranks
            (:mod:`megamult.runtime.watchdog`). Every rank connects to both.
        processes: number of processes of the run.
        tensor: tensor-parallel size.
        gloo: whether training communicates over gloo, as on CPUs. The process group for reading and writing files uses
            gloo in any case. Connections of NCCL are not counted.
    """
    meshes = [processes]  # the group for work on files
    if gloo:
        # The group of all ranks, and this rank's tensor- and data-parallel groups. If one of the latter would hold all
        # ranks, the group of all ranks is used instead, so there is nothing more to count.
        meshes += [processes, *(size for size in (tensor, processes // tensor) if size < processes)]
    served = 2 * (processes + 1) if rank == 0 else 2  # rank 0 has both ends of its own connections
    return sum(size - 1 for size in meshes) + served


def check_limit(rank: int, processes: int, tensor: int, gloo: bool, corpora: int = 0) -> None:
    """Check that the hard limit of open files lets this rank connect to its peers and read its corpora.

    Args:
        rank, processes, tensor, gloo: those of :func:`sockets`.
        corpora: number of files of corpora that the rank may hold open.

    Raises:
        ValueError: the limit is too low.
    """
    needed = sockets(rank, processes, tensor, gloo) + corpora + _SPARE
    hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    if hard != resource.RLIM_INFINITY and hard < needed:
        raise ValueError(
            f"the hard limit of open files is {hard} per process, and rank {rank} of {processes} needs {needed}: raise "
            f"it to at least that (`ulimit -Hn {needed}` as root, limits.conf, or LimitNOFILE of the service that "
            "starts jobs)"
        )
