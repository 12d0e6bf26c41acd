"""Command line of a run: parsing of its keys, and the joint exit of all ranks after a user's mistake."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import is_dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn, TypeVar, get_type_hints

from megamult.config import SECTIONS, Config, ModelConfig
from megamult.distributed import environment
from megamult.models.architectures import model_class
from megamult.optim import legacy
from megamult.optim.config import OPTIMIZERS, OptimizerConfig, check_used, rule_sections
from megamult.runtime import exit_codes
from megamult.runtime.console import say_error
from megamult.train.deepspeed_config import without_auto, without_translated
from megamult.train.deepspeed_translation import adopted, echo

if TYPE_CHECKING:
    from megamult.distributed.mesh import Mesh

HEAD_START_SECONDS = 2.0
"""Seconds that ranks other than 0 wait before they exit. Rank 0 can thus print its message first: as soon as one rank
has exited, launchers end the others."""

_Result = TypeVar("_Result")


def parser(architecture: str = ModelConfig.architecture) -> Any:
    """Return a run's jsonargparse parser: `--config FILE.yaml`, `--section.key value`, `--print_config`, `--help`.

    Args:
        architecture: architecture of the model, which decides the keys of the section `model`.
    """
    from jsonargparse import ArgumentParser, set_parsing_settings

    class Parser(ArgumentParser):
        """Parser that leaves sections of unused update rules out of its dumps, so that it can parse a dump again."""

        def dump(self, cfg: Any, **settings: Any) -> str:
            return super().dump(_used(cfg), **settings)

    set_parsing_settings(docstring_parse_attribute_docstrings=True)
    made = Parser(
        prog="pretrain.py",
        description="Pretrain a language model with learnable row and column multipliers.",
        exit_on_error=False,
        allow_abbrev=False,  # a truncated key must not pass for the full one
    )
    made.add_argument("--config", action="config", help="YAML file with the keys below")
    for name, section in {**SECTIONS, "model": model_class(architecture)}.items():
        rules = rule_sections() if section is OptimizerConfig else {}
        made.add_class_arguments(section, name, skip=set(rules), instantiate=not rules)
        for rule, keys in rules.items():
            made.add_class_arguments(keys, f"{name}.{rule}", instantiate=False)
    made.add_argument(
        "--deepspeed",
        type=dict[str, Any] | str | None,
        default=None,
        help="DeepSpeed configuration (a mapping or a JSON file) to merge into the one that the run's own keys "
        "produce. docs/deepspeed.md lists the keys that it may have. A key with the value auto keeps megamult's value. "
        "The DeepSpeed keys optimizer, scheduler and gradient_clipping are translated to megamult's keys optimizer.* "
        "and train.*",
    )
    made.add_argument(
        "--dry_run",
        action="store_true",
        help="check the configuration, the data's headers, the checkpoint and the run directory, build the model and "
        "the optimizer, print what would run, and stop with nothing written",
    )
    made.add_argument("--local_rank", type=int, default=None, help="set by launchers, and ignored: LOCAL_RANK is used")
    return made


def parse(arguments: Sequence[str] | None = None) -> tuple[Config, str]:
    """Return the validated configuration, and its resolved form as YAML (see :func:`asked`)."""
    return asked(arguments)[:2]


def asked(arguments: Sequence[str] | None = None) -> tuple[Config, str, bool]:
    """Return the validated configuration, its resolved form as YAML, and whether the run is a dry run.

    Raises:
        ValueError: a key or a value is not valid.
    """
    from jsonargparse import ArgumentError

    arguments = list(sys.argv[1:] if arguments is None else arguments)
    files = _files(arguments)
    made = parser(_architecture(arguments, files))
    arguments = _modern(arguments, files)
    try:
        # Parse only the keys that the command line and its files give, without defaults.
        given = made.parse_args([each for each in arguments if not each.startswith("--print_config")], defaults=False)
        _check_used(given)
        # Read DeepSpeed's file once. It may be a pipe, it may change, and it may be missing on another host.
        file = Config(deepspeed=given.get("deepspeed")).deepspeed_overrides()
        # Keys that DeepSpeed's file says come first: the user's own keys, which follow, overrule them here, and
        # `deepspeed_config` names the conflict.
        read = adopted(without_auto(file), given, made.get_defaults())
        namespace = made.parse_args([*(f"--{key}={_argument(value)}" for key, value in read.items()), *arguments])
        for section in SECTIONS:  # given as a file (--optimizer FILE.yaml), its path stands among its keys
            if hasattr(namespace[section], "keys"):
                namespace[section].pop("__path__", None)
        for name in _section_names():  # jsonargparse accepts `model: 3`
            if not hasattr(namespace[name], "keys"):
                raise ValueError(f"{name} is {namespace[name]!r}: give a mapping of the section's keys")
        sections = made.instantiate(namespace)
    except ArgumentError as error:
        raise ValueError(f"{str(error).strip()}; --help lists every key with its unit") from None
    except UnicodeDecodeError as error:
        raise ValueError(f"the file that --config names is not UTF-8 ({error}): save it as UTF-8") from None
    dry_run = bool(namespace["dry_run"])
    del namespace["config"], namespace["local_rank"], namespace["dry_run"]
    sections["optimizer"] = OptimizerConfig.of(_used(namespace)["optimizer"].as_dict())
    config = Config(**{name: sections[name] for name in SECTIONS})
    kept = without_translated(file, config)
    said = echo(without_auto(file), config)
    if said is not None and kept != file and environment.rank() == 0:
        print(f"note: {said}", file=sys.stderr, flush=True)
    config.deepspeed = namespace["deepspeed"] = kept or None
    return config, made.dump(namespace, skip_validation=True, skip_unset=False), dry_run


def _files(arguments: Sequence[str]) -> dict[int, dict[str, Any]]:
    """Return the mappings in the YAML files that arguments name, by the position of the argument.

    Each file is read only once, because it may be a pipe."""
    keys = ("--config", "--optimizer", "--model")
    return {i: _loaded(value) for key, i, value in _given(arguments) if key in keys}


def _architecture(arguments: Sequence[str], files: Mapping[int, dict[str, Any]]) -> str:
    """Return the model's architecture that the arguments name; as in the parser, the last of them wins."""
    name: str = ModelConfig.architecture
    for key, i, value in _given(arguments):
        section = files[i] if key == "--model" else files[i].get("model") if key == "--config" else None
        if key == "--model.architecture":
            name = value
        elif isinstance(section, dict):
            name = section.get("architecture", name)
    return name


def _argument(value: Any) -> str:
    """Return a value as text that the parser reads back."""
    return value if isinstance(value, str) else json.dumps(value)


def _section_names() -> list[str]:
    """Return the names of all sections, and of the nested sections that every run has, such as train.batch_ramp."""
    return [
        *SECTIONS,
        *(
            f"{name}.{key}"
            for name, each in SECTIONS.items()
            for key, hint in get_type_hints(each).items()
            if is_dataclass(hint)
        ),
    ]


def _used(namespace: Any) -> Any:
    """Return a copy of a namespace without the sections of update rules that the optimizer does not use."""
    namespace = namespace.clone()
    for name in ("local_rank", "dry_run"):  # arguments of a start, no keys of the run
        namespace.pop(name, None)
    optimizer = namespace.get("optimizer")
    if hasattr(optimizer, "keys"):
        for name in rule_sections():
            if name not in OPTIMIZERS[optimizer["name"]].sections:
                optimizer.pop(name, None)
    return namespace


def _check_used(given: Any) -> None:
    """Check that the optimizer uses every update rule whose keys were given.

    Raises:
        ValueError: the optimizer does not use some of these rules.
    """
    optimizer = given.get("optimizer")
    if hasattr(optimizer, "keys"):
        sections = {name: optimizer.get(name) for name in rule_sections()}
        keys = [
            f"{name}.{key}" for name, keys in sections.items() if hasattr(keys, "keys") for key in list(keys.keys())
        ]
        check_used(optimizer.get("name", OptimizerConfig.name), keys)


def _modern(arguments: Sequence[str], loaded: Mapping[int, dict[str, Any]]) -> list[str]:
    """Return the arguments, with each configuration file of an earlier version replaced by YAML text in today's keys.

    Such a file is, for example, the config.yaml of an old run. Rank 0 prints what was translated.

    Args:
        arguments: the command line.
        loaded: the mappings in its files (:func:`_files`).

    Raises:
        ValueError: the command line itself has an old key.
    """
    dotted = [each.partition("=")[0].removeprefix("--optimizer.") for each in arguments if each.startswith("--optim")]
    legacy.check_modern(dict.fromkeys(dotted))
    given = [each for each in _given(arguments) if each[0] != "--model"]
    sections = {i: loaded[i].get("optimizer") if key == "--config" else loaded[i] for key, i, _ in given if i in loaded}
    name: str = OptimizerConfig.name
    for key, i, value in given:  # as in the parser, the last argument that names the optimizer wins
        section = {"name": value} if key == "--optimizer.name" else sections.get(i)
        name = section.get("name", name) if isinstance(section, dict) else name
    found = list(arguments)
    for key, i, value in given:
        section = sections.get(i)
        if key == "--config" and isinstance(section, dict) and legacy.is_old(section):
            found[i] = found[i].removesuffix(value) + _modern_file(value, loaded[i], name)
    return found


def _given(arguments: Sequence[str]) -> Iterator[tuple[str, int, str]]:
    """Yield (key, i, value) of each `--key value` and `--key=value`, where arguments[i] holds the value.

    In the second form arguments[i] is `--key=value`, so only its end is the value.
    """
    for i, argument in enumerate(arguments):
        key, equals, value = argument.partition("=")
        if not key.startswith("--"):
            continue
        if equals:
            yield key, i, value
        elif i + 1 < len(arguments):
            yield key, i + 1, arguments[i + 1]


def _loaded(value: str) -> dict[str, Any]:
    """Return the mapping in the YAML file that `value` names, or in `value` itself as YAML if there is no such file.

    If there is no mapping, return an empty one: the parser will say what is wrong."""
    import yaml
    from jsonargparse import get_loader

    try:
        text = Path(value).read_text(encoding="utf-8")
    except OSError:
        text = value
    except UnicodeDecodeError:
        return {}
    try:
        loaded = get_loader("yaml")(text)
    except yaml.YAMLError:
        return {}
    return loaded if isinstance(loaded, dict) else {}


def _modern_file(path: str, loaded: dict[str, Any], name: str) -> str:
    """Return a configuration of an earlier version as YAML text with today's keys.

    Args:
        path: path of the configuration's file, for the note that says what was translated.
        loaded: contents of the file.
        name: the optimizer of the run, which another file or the command line may have chosen.
    """
    import yaml

    modern = {**loaded, "optimizer": legacy.modern(loaded["optimizer"], name)}
    if environment.rank() == 0:
        said = "; ".join(legacy.translations(loaded["optimizer"], name))
        print(f"note: {path} is of an earlier version, read as: {said}", file=sys.stderr, flush=True)
    return yaml.safe_dump(modern, sort_keys=False, allow_unicode=True)


def fail(message: str) -> NoReturn:
    """Exit because of a mistake of the user. Every rank that knows of it calls this, and rank 0 prints the message."""
    if environment.rank() == 0:
        say_error(message)
    else:
        time.sleep(HEAD_START_SECONDS)
    sys.exit(exit_codes.USER_ERROR)


def fail_alone(message: str) -> NoReturn:
    """Exit, before the rendezvous, because of a mistake that other ranks may not have found.

    Only rank 0 prints, so any other rank first reports the message to rank 0."""
    if environment.rank() != 0:
        from megamult.distributed import rendezvous

        rendezvous.report_mistake(message)
    fail(message)


def agreed(mesh: Mesh, check: Callable[[], _Result]) -> _Result:
    """Call `check` on every rank, and return its result on this rank. Collective over all ranks.

    If `check` raises ValueError or OSError on any rank, all ranks exit. Rank 0 prints one message, the one of the
    lowest rank on which `check` raised."""
    from megamult.distributed import start
    from megamult.distributed.agreement import on_every_rank

    result, problem = on_every_rank(mesh, check)
    if problem is not None:
        start.destroy()
        fail(problem)
    return result  # type: ignore[return-value]
