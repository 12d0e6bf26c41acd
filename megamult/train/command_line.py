"""The command line of a run: its keys, and how a user's mistake ends it on every rank at once."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn, TypeVar

from megamult.config import SECTIONS, Config
from megamult.distributed import environment
from megamult.optim import legacy
from megamult.optim.config import OPTIMIZERS, OptimizerConfig, check_used, rule_sections
from megamult.runtime import exit_codes
from megamult.runtime.console import say_error

if TYPE_CHECKING:
    from megamult.distributed.mesh import Mesh

HEAD_START_SECONDS = 2.0
"""Launchers end all ranks once one has left: the others let rank 0 speak first."""

_Result = TypeVar("_Result")


def parser() -> Any:
    """Make a run's jsonargparse parser: `--config FILE.yaml`, `--section.key value`, `--print_config`, `--help`."""
    from jsonargparse import ArgumentParser, set_parsing_settings

    class Parser(ArgumentParser):
        """Leaves out the sections of rules that the optimizer does not use: what it dumps and prints can be read."""

        def dump(self, cfg: Any, **settings: Any) -> str:
            return super().dump(_used(cfg), **settings)

    set_parsing_settings(docstring_parse_attribute_docstrings=True)
    made = Parser(
        prog="pretrain.py",
        description="Pretrain a language model with learnable row and column multipliers.",
        exit_on_error=False,
        allow_abbrev=False,  # a misspelt key must not pass for another one that it begins
    )
    made.add_argument("--config", action="config", help="YAML file with the keys below")
    for name, section in SECTIONS.items():
        rules = rule_sections() if section is OptimizerConfig else {}
        made.add_class_arguments(section, name, skip=set(rules), instantiate=not rules)
        for rule, keys in rules.items():
            made.add_class_arguments(keys, f"{name}.{rule}", instantiate=False)
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
    """Return the validated configuration, and the same resolved as YAML.

    Raises:
        ValueError: a key or a value that is not possible.
    """
    from jsonargparse import ArgumentError

    arguments = _modern(sys.argv[1:] if arguments is None else arguments)
    made = parser()
    try:
        # Keys that the command line and its files give, without defaults.
        given = made.parse_args([each for each in arguments if not each.startswith("--print_config")], defaults=False)
        _check_used(given)
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
    sections["optimizer"] = OptimizerConfig.of(_used(namespace)["optimizer"].as_dict())
    config = Config(**{name: sections[name] for name in SECTIONS}, deepspeed=sections["deepspeed"])
    # The contents of a file of DeepSpeed's belong to the configuration: they may be others the next time, or elsewhere.
    config.deepspeed = namespace["deepspeed"] = config.deepspeed_overrides() or None
    return config, made.dump(namespace, skip_validation=True, skip_none=False)


def _used(namespace: Any) -> Any:
    """Copy all sections but those of rules that the optimizer does not use."""
    namespace = namespace.clone()
    namespace.pop("local_rank", None)  # of a launcher, not of a run
    optimizer = namespace.get("optimizer")
    if hasattr(optimizer, "keys"):
        for name in rule_sections():
            if name not in OPTIMIZERS[optimizer["name"]].sections:
                optimizer.pop(name, None)
    return namespace


def _check_used(given: Any) -> None:
    """See that the keys of rules that were given are of rules that the optimizer uses."""
    optimizer = given.get("optimizer")
    if hasattr(optimizer, "keys"):
        sections = {name: optimizer.get(name) for name in rule_sections()}
        keys = [
            f"{name}.{key}" for name, keys in sections.items() if hasattr(keys, "keys") for key in list(keys.keys())
        ]
        check_used(optimizer.get("name", OptimizerConfig.name), keys)


def _modern(arguments: Sequence[str]) -> list[str]:
    """Translate configurations of earlier versions, such as an old run's config.yaml, to today's keys; rank 0
    says what was translated.

    Raises:
        ValueError: the command line itself has an old key.
    """
    dotted = [each.partition("=")[0].removeprefix("--optimizer.") for each in arguments if each.startswith("--optim")]
    legacy.check_modern(dict.fromkeys(dotted))
    found = list(arguments)
    for i, argument in enumerate(found):
        if argument == "--config" and i + 1 < len(found):
            found[i + 1] = _modern_file(found[i + 1])
        elif argument.startswith("--config="):
            found[i] = f"--config={_modern_file(argument.removeprefix('--config='))}"
    return found


def _modern_file(path: str) -> str:
    """Return the path of a configuration, or, for one of an earlier version, its contents in today's keys."""
    import yaml
    from jsonargparse import get_loader

    try:
        loaded = get_loader("yaml")(Path(path).read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError):
        return path  # the parser says what is wrong with it
    optimizer = loaded.get("optimizer") if isinstance(loaded, dict) else None
    if not isinstance(optimizer, dict) or not legacy.is_old(optimizer):
        return path
    loaded["optimizer"] = legacy.modern(optimizer)
    if environment.rank() == 0:
        said = "; ".join(legacy.translations(optimizer))
        print(f"note: {path} is of an earlier version, read as: {said}", file=sys.stderr, flush=True)
    return yaml.safe_dump(loaded, sort_keys=False, allow_unicode=True)


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
