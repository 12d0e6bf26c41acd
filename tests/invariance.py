"""Layouts that must all train the same model: what a case is, how it runs, which cases cover all pairs of settings."""

from __future__ import annotations

import itertools
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from megamult.config import Config
from megamult.distributed.config import ParallelConfig
from megamult.multipliers.config import MultipliersConfig
from megamult.optim.config import AdamWConfig, OptimizerConfig
from megamult.train.config import BatchRamp, TrainConfig
from tests.processes import run_distributed
from tests.small import MODELS, VOCAB, Samples

LR = 3e-3
PLACEMENTS: dict[str, Any] = {
    "all": "all",
    "symmetry_free": "symmetry_free",
    "scalar": "scalar",
    # Uneven: at TP 4 some ranks hold no row of K or V, others no row of Q.
    "mapping": {"q": "row", "k": ["row", "scalar"], "v": "col", "up": "row", "down": "scalar"},
}
_EVERY_ROLE = ("q", "k", "v", "attention_out", "gate", "up", "down", "embedding", "head")
KNOBS: dict[str, dict[str, dict[str, Any]]] = {
    "": {},
    "initial": {"multipliers": {"initial": {"q": {"row": 2.0, "col": 0.5}, "down": {"row": 4.0, "col": 1.0}}}},
    "fixed": {"multipliers": {"norm": "fixed", "parametrization": "softplus", "shared_columns": True}},
    "shared": {"multipliers": {"shared_columns": True}},
    # Every option of the published decoders. With QK-norm the gradients of K's biases are not 0 in any layer.
    "decoder": {
        "model": {
            "head_dim": 10,
            "attention_bias": "all",
            "mlp_bias": True,
            "qk_norm": True,
            "no_rope_layers": [1],
            "rotary_scaling": {"rope_type": "linear", "factor": 4.0},
        },
        "optimizer": {"lr_factors": {"bias": 2.0, "q_norm": 0.5, "k_norm": 3.0}},
    },
    # Below the largest logits of some heads in every step, and above those of others in most.
    "qk_clip": {"multipliers": {"qk_clip": 0.05}},
    "hyperball": {"multipliers": {"norm": "fixed", "placement": {}}},
    # Batches of 4, 4, 8, 12 and 16.
    "ramp": {"train": {"global_batch_size": 16, "batch_ramp": BatchRamp(start=4, increment=4, samples=24)}},
    # Six batches of 4, three of 8, two of 12, then 16: with step 10 the ramp is at 12.
    "long ramp": {"train": {"global_batch_size": 16, "batch_ramp": BatchRamp(start=4, increment=4, samples=72)}},
    # Every key that changes learning rates, decays, initial values, norms or clipping of single roles, at once.
    "all": {
        "model": {"norms": "scalar", "final_norm": "frozen", "init_std_factors": {"down": 4.0, "k": 0.5, "head": 2.0}},
        "multipliers": {
            "placement": {role: ["row", "col"] for role in _EVERY_ROLE},
            "lr": 2e-2,
            "lr_factors": {"q": 0.5, "head": 2.0, "down": {"row": 2.0, "col": 0.0}},
            "weight_decay": 0.5,
            "weight_decay_factors": {"k": 4.0, "up": {"col": 0.0}},
            "schedule": "constant",
            "clip": "joint",
            "parametrization": "log",
            "initial": {
                "v": {"row": 0.5, "col": 3.0},
                "down": {"row": 1.0, "col": 0.25},
                "head": {"row": 1.5, "col": 1.0},
                "embedding": {"row": 2.0, "col": 0.75},
            },
        },
        "optimizer": {
            "lr_factors": {"k": 0.25, "up": 2.0, "embedding": 0.5, "norm": 3.0, "head": 0.0, "attention_out": 0.0},
            "weight_decay_factors": {"q": 0.0, "down": 30.0, "embedding": 5.0},
        },
    },
}


@dataclass(frozen=True)
class Case:
    """One way to spread the same training run."""

    world: int = 1
    tensor: int = 1
    sequence: bool = False
    zero: int = 0
    accumulation: int = 1
    """Micro-batches of the first step."""
    placement: str = "all"
    tied: bool = False
    recompute: bool = False
    optimizer: str = "adamw"
    dtype: str = "fp32"
    implementation: str = "layer"
    steps: int = 5
    knobs: str = ""
    """Further keys of the configuration, one of KNOBS."""
    model: str = "llama"
    """One of tests.small.MODELS."""
    sub_group_size: int | None = None
    """Elements of a ZeRO 3 sub-group: DeepSpeed steps once for each."""

    @property
    def reference(self) -> Case:
        """The same training on one process, in one piece, with multipliers in the layers."""
        stage = 0 if self.dtype == "fp32" else 1  # ZeRO 0 cannot accumulate in fp32 what is bf16
        return Case(
            placement=self.placement,
            tied=self.tied,
            zero=stage,
            optimizer=self.optimizer,
            dtype=self.dtype,
            steps=self.steps,
            knobs=self.knobs,
            model=self.model,
        )

    @property
    def data(self) -> int:
        """Data-parallel size."""
        return self.world // self.tensor

    @property
    def valid(self) -> bool:
        """Whether such a layout exists."""
        fits = self.world % self.tensor == 0 and (self.tensor > 1 or not self.sequence)
        # Folded into a tied weight, the embedding's multipliers would reach the head: "mapping" has none there.
        return fits and not (self.implementation == "folded" and self.tied and self.placement != "mapping")

    def config(self) -> Config:
        """A run of the small model."""
        sections = ("model", "multipliers", "optimizer", "train")
        more = {section: KNOBS[self.knobs].get(section, {}) for section in sections}
        # 12 is divisible by 4 ranks x 3 micro-batches: a first, a middle and a last one.
        train = {"global_batch_size": 12, **more["train"]}
        first = train["batch_ramp"].start if "batch_ramp" in train else train["global_batch_size"]
        return Config(
            model=replace(MODELS[self.model], tie_embeddings=self.tied, **more["model"]),
            multipliers=MultipliersConfig(
                **{
                    "implementation": self.implementation,
                    "placement": PLACEMENTS[self.placement],
                    **more["multipliers"],
                }
            ),
            # eps: where a gradient vanishes, AdamW divides its rounding by its size. Elements here are of 1e-4 to
            # 1e-2, and sums in another order differ by about 1e-9; eps 1e-4 keeps that below 1e-5 of an update.
            optimizer=OptimizerConfig(
                name=self.optimizer,  # type: ignore[arg-type]
                lr=LR,
                adamw=AdamWConfig(eps=1e-4),
                clip_grad_norm=0.5,
                warmup_steps=2,
                **more["optimizer"],
            ),
            deepspeed=None
            if self.sub_group_size is None
            else {"zero_optimization": {"sub_group_size": self.sub_group_size}},
            parallel=ParallelConfig(tensor=self.tensor, sequence=self.sequence, zero_stage=self.zero),
            train=TrainConfig(
                steps=self.steps,
                dtype=self.dtype,  # type: ignore[arg-type]
                grad_accum_dtype="bf16" if self.dtype == "bf16" and self.zero == 0 else "auto",
                micro_batch_size=first // self.data // self.accumulation,
                recompute="full" if self.recompute else "none",
                **train,
            ),
        )


@dataclass
class Outcome:
    """What a run leaves: its records by step, and every logical tensor before and after."""

    initial: dict[str, Tensor] = field(default_factory=dict)
    records: list[dict[str, float]] = field(default_factory=list)
    tensors: dict[str, Tensor] = field(default_factory=dict)
    kinds: dict[str, str] = field(default_factory=dict)


def run_cases(cases: list[Case]) -> list[Outcome]:
    """Train every case, one after the other, on this launch's processes. Complete on rank 0."""
    from megamult.distributed import start
    from megamult.train.deepspeed_engine import build
    from megamult.train.loop import Trainer
    from megamult.zero.gather import trained

    outcomes = []
    for case in cases:
        torch.compiler.reset()  # of all cases together there are more compilations than torch's limit
        config = case.config()
        mesh = start.initialize(case.tensor)
        engine = build(config, VOCAB, mesh)
        trainer = Trainer(
            config, engine, Samples(VOCAB, config.model.seq_length, period=config.train.global_batch_size), None, VOCAB
        )
        outcome = Outcome()
        for tensors in (outcome.initial, outcome.tensors):
            if tensors is outcome.tensors:
                outcome.records = [trainer.train_step() for _ in range(case.steps)]
            for item in trained(engine.model, engine.partition, engine.optimizer):
                tensors[item.name], outcome.kinds[item.name] = item.tensor.cpu().clone(), item.kind
        trainer.close()
        engine.deepspeed.destroy()
        outcomes.append(outcome if torch.distributed.get_rank() == 0 else Outcome())
    return outcomes


_SETTINGS: dict[str, tuple[Any, ...]] = {
    "world": (1, 2, 4),
    "tensor": (1, 2, 4),
    "sequence": (False, True),
    "zero": (0, 1, 2, 3),
    "accumulation": (1, 3),
    "placement": tuple(PLACEMENTS),
    "tied": (False, True),
    "recompute": (False, True),
    "implementation": ("layer", "folded"),
}


def train(cases: Sequence[Case]) -> dict[Case, Outcome]:
    """Every case and every reference, trained: one launch for each number of processes."""
    by_world: dict[int, list[Case]] = defaultdict(list)
    for case in dict.fromkeys([*(case.reference for case in cases), *cases]):
        by_world[case.world].append(case)
    found: dict[Case, Outcome] = {}
    for world, members in by_world.items():
        members.sort(key=lambda case: case.tensor)  # process groups are made anew where this changes
        found.update(zip(members, run_distributed(world, run_cases, members, timeout=1200)[0], strict=True))
    return found


def name_of(case: Case) -> str:
    """For pytest's output."""
    flags = [case.placement, case.implementation]
    flags += [flag for flag in ("sequence", "tied", "recompute", "knobs") if getattr(case, flag)]
    return f"{case.world}p-tp{case.tensor}-zero{case.zero}-acc{case.accumulation}-{'-'.join(flags)}"


def _pairs(case: Case, names: Sequence[str]) -> set[tuple[str, Any, str, Any]]:
    return {(a, getattr(case, a), b, getattr(case, b)) for a, b in itertools.combinations(names, 2)}


def pairwise_cases(names: Sequence[str] = tuple(_SETTINGS), **fixed: Any) -> list[Case]:
    """Few cases in which every pair of settings that can occur together does.

    Args:
        names: the settings that vary.
        fixed: values of others.
    """
    candidates = [
        case
        for values in itertools.product(*(_SETTINGS[name] for name in names))
        if (case := Case(**dict(zip(names, values, strict=True)), **fixed)).valid
    ]
    # Data parallel follows from world and tensor, but must meet every setting too (ZeRO shards over it).
    return covering(candidates, (*_SETTINGS, "data"))


def covering(candidates: Sequence[Case], names: Sequence[str]) -> list[Case]:
    """Few of the candidates in which every pair of values of the settings `names` occurs that occurs in any of them.

    Greedy, and the same on every call.
    """
    uncovered = set().union(*(_pairs(case, names) for case in candidates))
    chosen: list[Case] = []
    while uncovered:
        # Among equals the one with fewer processes, which is quicker.
        best = max(candidates, key=lambda case: (len(_pairs(case, names) & uncovered), -case.world))
        chosen.append(best)
        uncovered -= _pairs(best, names)
    return chosen
