"""Imports go only down the data flow of DESIGN.md, and the command line parses before anything heavy is imported."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).parents[1]
MESH = "megamult.distributed.mesh"
PACKAGE = REPOSITORY / "megamult"

# A module may import from its own line and from the lines above it.
DATA_FLOW = [
    ["megamult.noise"],
    ["megamult"],  # imports nothing else at import time; its public names are looked up when asked for
    [
        "megamult.models.common.norm_weight",
        "megamult.models.common.rotary",
        "megamult.models.common.vocabulary",
        "megamult.runtime.exit_codes",
        "megamult.runtime.patience",
        "megamult.settings",
        "megamult.validation",
    ],
    ["megamult.parameters"],
    ["megamult.distributed.environment", "megamult.distributed.extensions", "megamult.distributed.open_files"],
    ["megamult.runtime.console", "megamult.runtime.partial"],
    ["megamult.distributed"],
    ["megamult.multipliers.parametrization"],
    # The sections of a run's configuration stand above the code that they configure.
    [
        "megamult.checkpoint.config",
        "megamult.data.config",
        "megamult.distributed.config",
        "megamult.models.common.config",
        "megamult.models.llama.config",
        "megamult.monitor.config",
        "megamult.multipliers.config",
        "megamult.optim.config",
        "megamult.train.config",
    ],
    ["megamult.config"],
    ["megamult.data"],
    ["megamult.multipliers"],
    ["megamult.layers"],
    ["megamult.models"],
    ["megamult.zero"],
    ["megamult.optim"],
    ["megamult.integrations"],
    ["megamult.huggingface.files"],
    ["megamult.checkpoint", "megamult.monitor"],
    ["megamult.effective"],
    ["megamult.huggingface"],
    ["megamult.runtime"],
    ["megamult.train"],
]
# Order within a folder, where it has more than one floor.
DATA_FLOW_INSIDE = [
    ["megamult.parameters.spec", "megamult.parameters.rectangles", "megamult.parameters.roles"],
    [
        "megamult.distributed.claims",
        "megamult.distributed.launcher",
        "megamult.distributed.reception",
        "megamult.distributed.device",
        "megamult.distributed.rendezvous",
        "megamult.distributed.process_groups",
        "megamult.distributed.mesh",
        "megamult.distributed.agreement",
        "megamult.distributed.start",
    ],
    ["megamult.runtime.verdict", "megamult.runtime.hub", "megamult.runtime.watchdog"],
    [
        "megamult.models.common.architecture",
        "megamult.models.common.parameters",
        "megamult.models.common.transformer_layer",
        "megamult.models.common.decoder",
        "megamult.models.llama.model",
        "megamult.models.llama.architecture",
        "megamult.models.architectures",
    ],
    [
        "megamult.monitor.names",
        "megamult.monitor.squares",
        "megamult.monitor.symmetries",
        "megamult.monitor.equilibrium",
        "megamult.monitor.decay",
        "megamult.monitor.vectors",
        "megamult.monitor.weights",
        "megamult.monitor.imbalance",
    ],
    [
        "megamult.train.deepspeed_key",
        "megamult.train.deepspeed_zero_keys",
        "megamult.train.deepspeed_keys",
        "megamult.train.deepspeed_translation",
        "megamult.train.deepspeed_config",
        "megamult.train.command_line",
        "megamult.train.schedule",
        "megamult.train.batches",
        "megamult.train.engine",
        "megamult.train.checkpoints",
        "megamult.train.records",
        "megamult.train.monitoring",
        "megamult.train.loop",
        "megamult.train.model",
        "megamult.train.deepspeed_engine",
        "megamult.train.startup",
        "megamult.train.summary",
        "megamult.train.run",
        "megamult.train.pretrain",
    ],
]
# Side branches of the flow: on the way down, but no business of one another.
FORBIDDEN = [
    ("megamult.data", "megamult.config"),  # a reader of files, of use without a run
    ("megamult.data", MESH),
    ("megamult.multipliers", "megamult.config"),  # others import the layers into loops of their own
    ("megamult.multipliers", "megamult.data"),
    ("megamult.models", "megamult.data"),
    ("megamult.zero", "megamult.models"),
    ("megamult.zero", "megamult.config"),
    ("megamult.optim", "megamult.config"),
    ("megamult.optim", "megamult.models"),  # the optimizer knows specs, no model
    ("megamult.optim", "megamult.data"),
    ("megamult.checkpoint", "megamult.models.architectures"),
    ("megamult.checkpoint", "megamult.monitor"),
    ("megamult.monitor", "megamult.checkpoint"),
    ("megamult.monitor", "megamult.models"),
    ("megamult.runtime", "megamult.train"),
    ("megamult.huggingface", "megamult.train.loop"),
    ("megamult.train.checkpoints", "megamult.train.deepspeed_engine"),  # the loop knows engines by their protocol
    ("megamult.train.loop", "megamult.train.deepspeed_engine"),
    ("megamult.train.loop", "megamult.zero"),
    ("megamult.train.records", "megamult.train.deepspeed_engine"),
]
# The mathematics stays apart from communication.
PURE = [
    "megamult.parameters.spec",
    "megamult.parameters.rectangles",
    "megamult.parameters.roles",
    "megamult.parameters.by_role",
    "megamult.parameters.initial",
    "megamult.multipliers.reference",
    "megamult.multipliers.merge",
    "megamult.multipliers.kernels",
    "megamult.multipliers.layer_scaling",
    "megamult.multipliers.scaling",
    "megamult.multipliers.specs",
    "megamult.models.common.draw",
    "megamult.models.common.norm_weight",
    "megamult.models.common.rotary",
    "megamult.models.common.vocabulary",
    "megamult.models.llama.mup",
    "megamult.optim.clip",
    "megamult.optim.muon.newton_schulz",
    "megamult.optim.ownership",
    "megamult.optim.param_groups",
    "megamult.optim.muon.plan",
    "megamult.optim.schedule",
    "megamult.optim.muon.symmetric",
    "megamult.monitor.decay",
    "megamult.monitor.equilibrium",
    "megamult.monitor.names",
    "megamult.monitor.screen",
    "megamult.monitor.squares",
    "megamult.monitor.statistics",
    "megamult.monitor.symmetries",
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
    for order in DATA_FLOW_INSIDE:
        later = order[order.index(name) + 1 :] if name in order else []
        wrong += [f"{name} imports {other}, which lies below it" for other in sorted(ours & set(later))]
    for branch, secret in FORBIDDEN:
        # megamult.parameters.roles belongs to the vocabulary above, not to the layers' branch.
        if within(name, branch):
            wrong += [
                f"{name} imports {other}: {branch} must not know {secret}" for other in ours if within(other, secret)
            ]
    if name in PURE:
        outside = {
            other for other in imports(name, source) if other.startswith(("torch.distributed", "megatron", "deepspeed"))
        }
        wrong += [
            f"{name} is pure mathematics and imports {other}"
            for other in outside | (ours & {"megamult.distributed.mesh"})
        ]
        wrong += [f"{name} is pure mathematics and calls torch.distributed"] * ("torch.distributed." in source)
    return wrong


_ASKS = {"get_rank", "get_world_size", "is_initialized", "barrier", "new_group", "init_process_group", "group"}
"""What of torch.distributed speaks of the default group, whatever its arguments."""
_COLLECTIVES = re.compile("all_reduce|all_gather|all_to_all|broadcast|gather|reduce|scatter|send|recv")


def asks_for_groups(source: str) -> list[str]:
    """What `source` asks Megatron's parallel_state or torch's default group for."""
    found = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.ImportFrom | ast.Import) and "parallel_state" in ast.unparse(node):
            found.append(ast.unparse(node))
        if isinstance(node, ast.Attribute) and ast.unparse(node.value) in ("torch.distributed", "dist"):
            found += [ast.unparse(node)] * (node.attr in _ASKS)
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute):
            of_torch = ast.unparse(node.func.value) in ("torch.distributed", "dist")
            if of_torch and _COLLECTIVES.match(node.func.attr) and "group" not in [each.arg for each in node.keywords]:
                found.append(ast.unparse(node.func))
    return found


@pytest.mark.parametrize("name", [name for name in FILES if not within(name, "megamult.distributed")])
def test_only_the_mesh_knows_megatrons_groups_and_the_default_group(name: str) -> None:
    assert asks_for_groups(FILES[name].read_text(encoding="utf-8")) == []


@pytest.mark.parametrize(
    "source",
    [
        "from megatron.core import parallel_state",
        "import torch\nfirst = torch.distributed.get_rank() == 0",
        "import torch\ntorch.distributed.all_reduce(x)",
        "import torch\ntorch.distributed.broadcast_object_list(x, src=0)",
        "import torch.distributed as dist\ndist.all_to_all_single(a, b, async_op=True)",
        "import torch\nworld = torch.distributed.group.WORLD",
    ],
)
def test_a_question_to_the_default_group_is_found(source: str) -> None:
    assert asks_for_groups(source)
    assert not asks_for_groups("import torch\ntorch.distributed.all_reduce(x, group=mesh.world)")


def test_every_module_is_read() -> None:
    assert {"megamult", "megamult.config", "megamult.train.loop", "megamult.optim.adamw"} <= set(FILES)


@pytest.mark.parametrize("name", FILES)
def test_imports_go_only_down_the_data_flow(name: str) -> None:
    assert violations(name, FILES[name].read_text(encoding="utf-8")) == []


@pytest.mark.parametrize(
    ("name", "source"),
    [
        ("megamult.parameters.spec", "from megamult.config import Config"),
        ("megamult.parameters.spec", "def f():\n    import megamult.optim.clip"),
        ("megamult.optim.clip", "from megamult import train"),
        ("megamult.optim.clip", "from ..train.engine import build"),
        ("megamult.models.llama.model", "if True:\n    from megamult.optim import schedule"),
        ("megamult.train.engine", "from megamult.train.loop import Trainer"),
        ("megamult.train.loop", "from megamult.train.deepspeed_engine import build"),
        ("megamult.zero.partition", "from megamult.models.llama.model import GPT"),
        ("megamult.optim.schedule", "import torch.distributed as dist"),
        ("megamult.optim.schedule", "import torch\ndef f(x): torch.distributed.all_reduce(x)"),
        ("megamult.data.indexed", "from megamult.distributed import mesh"),
    ],
)
def test_an_import_against_the_flow_is_found(name: str, source: str) -> None:
    assert violations(name, source)


def test_an_architectures_folder_is_known_to_the_table_of_architectures_and_to_the_configuration() -> None:
    known = {
        (name, other.split(".")[2])
        for name, file in FILES.items()
        for other in imports(name, file.read_text(encoding="utf-8"))
        if other.startswith("megamult.models.") and len(other.split(".")) > 3 and ".common." not in other
        if not within(name, ".".join(other.split(".")[:3]))
    }
    assert known == {
        ("megamult.config", "llama"),
        ("megamult.models.architectures", "llama"),
        ("megamult.models.architectures", "falcon_h1"),
    }


@pytest.mark.parametrize(
    "statement",
    [
        "import megamult",
        "import megamult.config",
        "from megamult.models.architectures import ARCHITECTURES",
        "from megamult.train.pretrain import main\ntry: main(['--help'])\nexcept SystemExit: pass",
        "from megamult.train.pretrain import main\ntry: main(['--model.num_layers', '0'])\nexcept SystemExit: pass",
    ],
    ids=["package", "config", "architectures", "help", "mistake"],
)
def test_heavy_libraries_are_not_imported_before_they_are_needed(statement: str) -> None:
    code = f"{statement}\nimport sys\nprint('LOADED', *{{name.split('.')[0] for name in sys.modules}})"
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=REPOSITORY, capture_output=True, text=True, timeout=120, check=True
    )
    loaded = set(done.stdout.split("LOADED", 1)[1].split())
    assert "megamult" in loaded
    assert not loaded & {"deepspeed", "megatron", "transformers", "tensorboard", "sentencepiece"}
