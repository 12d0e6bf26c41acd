"""Start of a run: parse the command line, meet the other processes, start the watchdog, train.

Megatron and DeepSpeed, which are slow to import, are imported last. A mistake in the configuration or a host that is
down is therefore reported soon, and the watchdog ends ranks that hang in an import.
"""

from __future__ import annotations

import contextlib
import dataclasses
import sys
import time
from collections.abc import Sequence
from typing import TYPE_CHECKING

from megamult.config import Config
from megamult.distributed import environment, launcher
from megamult.runtime import exit_codes
from megamult.runtime.console import say_error
from megamult.runtime.patience import ON_FILES
from megamult.settings import run_settings
from megamult.train.command_line import HEAD_START_SECONDS, agreed, asked, fail, fail_alone
from megamult.train.deepspeed_config import deepspeed_config

if TYPE_CHECKING:
    from megamult.distributed.rendezvous import Meeting

_BEGAN = time.monotonic()


def main(arguments: Sequence[str] | None = None) -> None:
    """Pretrain a model as the command line asks."""
    environment.set_defaults()
    try:
        config, resolved, dry = asked(arguments)
        config.check_world(environment.world_size())
        deepspeed_config(config, environment.world_size() // config.parallel.tensor)
    except (ValueError, OSError) as error:
        fail_alone(str(error))
    run(config, resolved, dry)


def run(config: Config, resolved: str, dry: bool = False) -> None:
    """Start a run with the configuration `config`, and train. `resolved` is the configuration's text for config.yaml.

    If `dry` is true, only check and say what would run.

    Megatron and DeepSpeed are imported only after all processes have met and the watchdog runs; see the module's
    docstring.
    """
    meeting = _meet(config)
    from megamult.runtime.lock import RunLock
    from megamult.runtime.logs import RankLog
    from megamult.runtime.progress import Progress
    from megamult.runtime.watchdog import Watchdog

    minutes = config.train.max_minutes
    with contextlib.ExitStack() as stack:
        log = stack.enter_context(RankLog())
        lock = stack.enter_context(RunLock(log.ended))
        progress = Progress()
        if environment.world_size() > 1:
            watchdog = Watchdog(meeting, 60 * config.parallel.timeout_minutes, log)
            progress = stack.enter_context(watchdog).progress
        progress.at(0, "importing", ON_FILES)
        from megamult.distributed import extensions, process_groups, start
        from megamult.runtime.signals import StopRequests

        progress.at(0, "joining the process groups", extensions.LIMIT)
        try:
            mesh = start.initialize(
                config.parallel.tensor,
                # The watchdog ends a stuck run first. A process group's own timeout would also end ranks that wait for
                # work on files, so it is longer by the time limit of such work.
                timeout_minutes=config.parallel.timeout_minutes + ON_FILES / 60,
                across_nodes=True,  # checked already, in _meet
                meeting=meeting,
            )
        except TimeoutError as error:
            say_error(f"rank {environment.rank()} on {environment.host()}: {error}")
            sys.exit(exit_codes.UNAVAILABLE)
        progress.at(0, "joining the group for work on files")
        process_groups.files()
        stop = stack.enter_context(StopRequests(None if minutes is None else _BEGAN + 60 * minutes, log.ended))
        from megamult.train import run_dir as run_dirs

        run_dir = agreed(mesh, lambda: stack.enter_context(run_dirs.chosen(config.train.run_dir, mesh)))
        from megamult.train.run import Run, train

        code = train(Run(config, resolved, run_dir, mesh, progress, log, lock, stop, dry))
        start.destroy()
    if code:
        sys.exit(code)


def _meet(config: Config) -> Meeting:
    """Meet all other processes, or exit.

    Few modules are imported before the meeting, so that the message that names a host that is down comes soon.
    """
    from megamult.distributed import device, open_files, rendezvous

    open_files.raise_limit()
    try:
        gloo, tensor, corpora = device.backend() == "gloo", config.parallel.tensor, config.data.open_files()
        open_files.check_limit(environment.rank(), environment.world_size(), tensor, gloo, corpora)
    except ValueError as error:
        fail_alone(str(error))
    try:
        meeting = rendezvous.meet(config.parallel.rendezvous_seconds, run_settings(dataclasses.asdict(config)))
        if not config.parallel.tensor_across_nodes:
            meeting.check_nodes(config.parallel.tensor)
        return meeting
    except ValueError as error:
        fail(str(error))
    except rendezvous.RefusedError as error:
        # Of the ranks that one launcher started on this node, only the first prints the reason. Rank 0 refuses others
        # and is never refused, so beside it rank 1 prints the reason.
        if environment.rank() <= max(1, launcher.siblings()[0]):
            say_error(str(error))
        else:
            time.sleep(HEAD_START_SECONDS)
        sys.exit(exit_codes.USER_ERROR if error.configuration else exit_codes.UNAVAILABLE)
    except rendezvous.RanksMissingError as error:
        # Rank 0 names the missing ranks; if rank 0 itself is missing, one rank of each node says so.
        if environment.rank() == 0 or (error.rank_0_is_missing and environment.local_rank() == 0):
            say_error(str(error))
        sys.exit(exit_codes.UNAVAILABLE)
