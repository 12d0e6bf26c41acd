"""Imports go only down the data flow of DESIGN.md, and the command line parses before anything heavy is imported."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).parents[1]
PACKAGE = REPOSITORY / "megamult"

# A module may import from its own line and from the lines above it. `megamult.config` stands below `layout` and
# `placement` because it validates by their vocabulary of roles and sides; neither of the two reads the configuration.
DATA_FLOW = [
    ["megamult"],  # imports nothing at import time; its public names are looked up when asked for
    [
        "megamult.console",
        "megamult.environment",
        "megamult.extensions",
        "megamult.open_files",
        "megamult.partial",
        "megamult.patience",
        "megamult.settings",
    ],
    ["megamult.claims", "megamult.launcher"],
    ["megamult.reception"],
    ["megamult.device", "megamult.rendezvous"],
    ["megamult.process_groups"],
    ["megamult.parallel"],
    ["megamult.layout"],
    ["megamult.rectangles"],
    ["megamult.multipliers.placement"],
    ["megamult.config"],
    ["megamult.data"],
    ["megamult.multipliers"],
    ["megamult.layers"],
    ["megamult.model"],
    ["megamult.zero"],
    ["megamult.optim"],
    ["megamult.checkpoint", "megamult.monitor"],
    ["megamult.train.changes", "megamult.train.command_line"],
    ["megamult.train.deepspeed_keys"],
    ["megamult.train.deepspeed_config"],
    ["megamult.train.batches", "megamult.train.corpora", "megamult.train.engine"],
    ["megamult.train.lock", "megamult.train.logs", "megamult.train.progress", "megamult.train.signals"],
    ["megamult.train.run_dir", "megamult.train.verdict"],
    ["megamult.train.hub"],
    ["megamult.train.watchdog"],
    ["megamult.train.checkpoints"],
    ["megamult.train.loop"],
    ["megamult.train"],
]
# Side branches of the flow: on the way down, but no business of one another.
FORBIDDEN = [
    ("megamult.data", "megamult.config"),  # a reader of files, of use without a run
    ("megamult.data", "megamult.parallel"),
    ("megamult.multipliers", "megamult.config"),  # others import the layers into loops of their own
    ("megamult.multipliers", "megamult.data"),
    ("megamult.model", "megamult.data"),
    ("megamult.zero", "megamult.model"),
    ("megamult.zero", "megamult.config"),
    ("megamult.optim", "megamult.model"),  # the optimizer knows layouts, no model
    ("megamult.optim", "megamult.data"),
    ("megamult.checkpoint", "megamult.model"),
    ("megamult.checkpoint", "megamult.monitor"),
    ("megamult.monitor", "megamult.checkpoint"),
    ("megamult.monitor", "megamult.model"),
]
# The mathematics stays apart from communication.
PURE = [
    "megamult.layout",
    "megamult.rectangles",
    "megamult.multipliers.placement",
    "megamult.multipliers.reference",
    "megamult.multipliers.merge",
    "megamult.model.draw",
    "megamult.optim.bands",
    "megamult.optim.clip",
    "megamult.optim.newton_schulz",
    "megamult.optim.param_groups",
    "megamult.optim.plan",
    "megamult.optim.schedule",
    "megamult.optim.symmetric",
    "megamult.monitor.statistics",
    "megamult.data.blend",
    "megamult.data.splitmix",
]


def module_name(file: Path) -> str:
    parts = file.relative_to(REPOSITORY).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


FILES = {module_name(file): file for file in sorted(PACKAGE.rglob("*.py"))}


def imports(name: str, source: str) -> set[str]:
    """Every module that the source imports, inside functions too; `from p import m` is p.m where that is a module."""
    package = name if FILES.get(name, Path()).name == "__init__.py" else name.rpartition(".")[0]
    found = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            above = package.split(".")[: len(package.split(".")) - node.level + 1] if node.level else []
            base = ".".join([*above, *([node.module] if node.module else [])])
            found |= {f"{base}.{alias.name}" if f"{base}.{alias.name}" in FILES else base for alias in node.names}
    return found


def within(name: str, prefix: str) -> bool:
    return name == prefix or name.startswith(prefix + ".")


def rank(name: str) -> int:
    """The line of the longest prefix of `name` in DATA_FLOW."""
    lines = [
        (len(p), i)
        for i, line in enumerate(DATA_FLOW)
        for p in line
        if name == p or (p != "megamult" and within(name, p))
    ]
    assert lines, f"{name} has no place in DATA_FLOW: add it where DESIGN.md puts it"
    return max(lines)[1]


def violations(name: str, source: str) -> list[str]:
    """What `source`, as module `name`, imports from further down, or from a branch that it must not know."""
    ours = {other for other in imports(name, source) if within(other, "megamult")}
    wrong = [f"{name} imports {other}, which lies below it" for other in ours if rank(other) > rank(name)]
    for branch, secret in FORBIDDEN:
        # megamult.multipliers.placement belongs to the vocabulary above, not to the layers' branch.
        if within(name, branch):
            wrong += [
                f"{name} imports {other}: {branch} must not know {secret}" for other in ours if within(other, secret)
            ]
    if name in PURE:
        outside = {
            other for other in imports(name, source) if other.startswith(("torch.distributed", "megatron", "deepspeed"))
        }
        wrong += [
            f"{name} is pure mathematics and imports {other}" for other in outside | (ours & {"megamult.parallel"})
        ]
        wrong += [f"{name} is pure mathematics and calls torch.distributed"] * ("torch.distributed." in source)
    return wrong


def test_every_module_is_read() -> None:
    assert {"megamult", "megamult.config", "megamult.train.loop", "megamult.optim.adamw"} <= set(FILES)


@pytest.mark.parametrize("name", FILES)
def test_imports_go_only_down_the_data_flow(name: str) -> None:
    assert violations(name, FILES[name].read_text(encoding="utf-8")) == []


@pytest.mark.parametrize(
    ("name", "source"),
    [
        ("megamult.layout", "from megamult.config import Config"),
        ("megamult.layout", "def f():\n    import megamult.optim.clip"),
        ("megamult.optim.clip", "from megamult import train"),
        ("megamult.optim.clip", "from ..train.engine import build"),
        ("megamult.model.gpt", "if True:\n    from megamult.optim import schedule"),
        ("megamult.train.engine", "from megamult.train.loop import Trainer"),
        ("megamult.zero.slices", "from megamult.model.gpt import GPT"),
        ("megamult.optim.schedule", "import torch.distributed as dist"),
        ("megamult.optim.schedule", "import torch\ndef f(x): torch.distributed.all_reduce(x)"),
        ("megamult.data.indexed", "from megamult import parallel"),
    ],
)
def test_an_import_against_the_flow_is_found(name: str, source: str) -> None:
    assert violations(name, source)


@pytest.mark.parametrize(
    "statement",
    [
        "import megamult",
        "import megamult.config",
        "from megamult.train.pretrain import main\ntry: main(['--help'])\nexcept SystemExit: pass",
        "from megamult.train.pretrain import main\ntry: main(['--model.num_layers', '0'])\nexcept SystemExit: pass",
    ],
    ids=["package", "config", "help", "mistake"],
)
def test_heavy_libraries_are_not_imported_before_they_are_needed(statement: str) -> None:
    code = f"{statement}\nimport sys\nprint('LOADED', *{{name.split('.')[0] for name in sys.modules}})"
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=REPOSITORY, capture_output=True, text=True, timeout=120, check=True
    )
    loaded = set(done.stdout.split("LOADED", 1)[1].split())
    assert "megamult" in loaded
    assert not loaded & {"deepspeed", "megatron", "transformers", "tensorboard", "sentencepiece"}
