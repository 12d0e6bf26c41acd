"""The command line of a run: its keys, and how a user's mistake ends it on every rank at once."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, NoReturn, TypeVar

from megamult.config import SECTIONS, Config
from megamult.distributed import environment
from megamult.runtime import exit_codes
from megamult.runtime.console import say_error

if TYPE_CHECKING:
    from megamult.distributed.mesh import Mesh

HEAD_START_SECONDS = 2.0
"""Launchers end all ranks once one has left: the others let rank 0 speak first."""

_Result = TypeVar("_Result")


def parser() -> Any:
    """The jsonargparse parser of a run: `--config FILE.yaml`, `--section.key value`, `--print_config`, `--help`."""
    from jsonargparse import ArgumentParser, set_parsing_settings

    set_parsing_settings(docstring_parse_attribute_docstrings=True)
    made = ArgumentParser(
        prog="pretrain.py",
        description="Pretrain a language model with learnable row and column multipliers.",
        exit_on_error=False,
        allow_abbrev=False,  # a misspelt key must not pass for another one that it begins
    )
    made.add_argument("--config", action="config", help="YAML file with the keys below")
    for name, section in SECTIONS.items():
        made.add_class_arguments(section, name)
    made.add_argument(
        "--deepspeed",
        type=dict[str, Any] | str | None,
        default=None,
        help="DeepSpeed configuration (a mapping or a JSON file) merged into the one that the keys produce; "
        'docs/deepspeed.md lists its keys, and "auto" is megamult\'s value',
    )
    made.add_argument("--local_rank", type=int, default=None, help="set by the launcher; LOCAL_RANK is what counts")
    return made


def parse(arguments: Sequence[str] | None = None) -> tuple[Config, str]:
    """The validated configuration, and it resolved as YAML.

    Raises:
        ValueError: a key or a value that is not possible.
    """
    from jsonargparse import ArgumentError

    made = parser()
    try:
        namespace = made.parse_args(arguments)
        for name in SECTIONS:  # jsonargparse lets `model: 3` pass
            if not hasattr(namespace[name], "keys"):
                raise ValueError(f"{name} is {namespace[name]!r}: it is a section; give a mapping of its keys")
        sections = made.instantiate_classes(namespace)
    except ArgumentError as error:
        raise ValueError(f"{str(error).strip()}; --help lists every key with its unit") from None
    except UnicodeDecodeError as error:
        raise ValueError(f"the file that --config names is not UTF-8 ({error}): save it as UTF-8") from None
    del namespace["config"], namespace["local_rank"]
    config = Config(**{name: sections[name] for name in SECTIONS}, deepspeed=sections["deepspeed"])
    # The contents of a file of DeepSpeed's belong to the configuration: they may be others the next time, or elsewhere.
    config.deepspeed = namespace["deepspeed"] = config.deepspeed_overrides() or None
    return config, made.dump(namespace, skip_validation=True, skip_none=False)


def fail(message: str) -> NoReturn:
    """End this rank because of a mistake that every rank knows; rank 0 says why, in one line."""
    if environment.rank() == 0:
        say_error(message)
    else:
        time.sleep(HEAD_START_SECONDS)
    sys.exit(exit_codes.USER_ERROR)


def fail_alone(message: str) -> NoReturn:
    """End this rank because of a mistake that the others may not have found, before all have met."""
    if environment.rank() != 0:
        from megamult.distributed import rendezvous

        rendezvous.excuse(message)
    fail(message)


def agreed(mesh: Mesh, check: Callable[[], _Result]) -> _Result:
    """Run `check` on every rank; if any rank raises ValueError or OSError, all end with the first one's message."""
    from megamult.distributed import start
    from megamult.distributed.agreement import everywhere

    result, problem = everywhere(mesh, check)
    if problem is not None:
        start.destroy()
        fail(problem)
    return result  # type: ignore[return-value]
