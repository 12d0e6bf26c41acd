"""The section `optimizer` of a run: keys that all optimizers share, and one nested section for each update rule."""

from __future__ import annotations

import types
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, fields, is_dataclass
from functools import cache
from typing import Any, ClassVar, Literal, get_args, get_type_hints

from megamult.parameters.by_role import ByRole, by_role_mistakes
from megamult.validation import not_negative, positive, require

DType = Literal["auto", "fp32", "bf16"]


@dataclass
class AdamWConfig:
    """Settings of AdamW, which updates folded multipliers and all parameters that no other rule updates."""

    betas: tuple[float, float] = (0.9, 0.95)
    """Decay rates of the first and the second moment."""
    eps: float = 1e-8
    """Number added to the square root of the second moment."""

    def __post_init__(self) -> None:
        positive("optimizer.adamw", eps=self.eps)
        for beta in self.betas:
            require(0 <= beta < 1, f"optimizer.adamw.betas is {self.betas}: each must be in [0, 1)")


@dataclass
class OrthogonalizedConfig:
    """Settings that Muon and NorMuon share: momentum and Newton-Schulz."""

    momentum: float = 0.95
    """Decay rate of the momentum."""
    nesterov: bool = True
    """If true, orthogonalize Nesterov's momentum: momentum * M + (1 - momentum) * gradient, where M is the updated
    momentum. If false, orthogonalize M."""
    ns_steps: int = 5
    """Number of Newton-Schulz steps."""
    coefficients: Literal["simple", "quintic", "polar_express", "cans", "aol", "deepseekv4", "cubic5"] = "simple"
    """Name of the Newton-Schulz polynomials, as in NVIDIA's Emerging-Optimizers. `simple` has the coefficients
    (3.4445, -4.7750, 2.0315) in every step. `cubic5` needs `ns_steps` 5."""
    ns_dtype: Literal["auto", "fp32", "bf16", "fp16"] = "auto"
    """Dtype in which Newton-Schulz computes. `auto`: fp32 if `train.dtype` is fp32, else bf16, or fp32 on a CPU
    that is clearly faster in it (more precise, too)."""
    ns_form: Literal["auto", "standard", "gram"] = "auto"
    """How Newton-Schulz computes its polynomial. `auto`: the way that is the fastest for each shape, measured at the
    first start on a device, and kept. `standard` and `gram`: this form, with all else fixed too, so that rounding does
    not depend on measurements."""
    exchange_dtype: DType = "auto"
    """Dtype in which ranks send momentum and updates to each other. `auto`: fp32 if `train.dtype` is fp32, else
    bf16."""

    section: ClassVar[str]

    def __post_init__(self) -> None:
        name = f"optimizer.{self.section}"
        require(0 <= self.momentum < 1, f"{name}.momentum is {self.momentum}: it must be in [0, 1)")
        positive(name, ns_steps=self.ns_steps)
        require(
            self.coefficients != "cubic5" or self.ns_steps == 5,
            f"{name}.ns_steps is {self.ns_steps} with {name}.coefficients cubic5: use 5",
        )


@dataclass
class MuonConfig(OrthogonalizedConfig):
    """Settings of Muon, which updates the matrices of the transformer blocks."""

    scale: Literal["match_rms_adamw", "spectral", "unit_rms_norm", "shape_scaling"] = "match_rms_adamw"
    """Name of the factor that multiplies the orthogonalized update of W[out, in]. `match_rms_adamw`:
    0.2 sqrt(max(out, in)), with which `lr` and `weight_decay` can have the same values as for AdamW. `spectral`:
    sqrt(max(out, in)). `unit_rms_norm`: sqrt(out / in). `shape_scaling`: sqrt(max(1, out / in))."""

    section: ClassVar[str] = "muon"


@dataclass
class NorMuonConfig(OrthogonalizedConfig):
    """Settings of NorMuon, which updates the matrices of the transformer blocks."""

    beta2: float = 0.95
    """Decay rate of the second moment of each row of an update."""
    eps: float = 1e-8
    """Number added to the square root of the second moment."""

    section: ClassVar[str] = "normuon"

    def __post_init__(self) -> None:
        super().__post_init__()
        require(0 <= self.beta2 < 1, f"optimizer.normuon.beta2 is {self.beta2}: it must be in [0, 1)")
        positive("optimizer.normuon", eps=self.eps)


@dataclass(frozen=True)
class Choice:
    """One value of `optimizer.name`: AdamW for all parameters, or another rule for matrices and AdamW for the rest."""

    sections: tuple[str, ...]
    """Sections whose keys this optimizer uses."""
    rule: str | None = None
    """Update rule of the matrices, as `module:class`. Its arguments are the keys of all `sections` except `adamw`. None
    means that AdamW updates the matrices too."""


OPTIMIZERS = {
    "adamw": Choice(("adamw",)),
    "muon": Choice(("adamw", "muon"), "megamult.optim.muon.rule:Muon"),
    "normuon": Choice(("adamw", "normuon"), "megamult.optim.muon.normuon:NorMuon"),
}
"""Optimizers by the value of `optimizer.name`. A new optimizer needs an entry here, a dataclass for its section, and in
OptimizerConfig a field for the section and a value of `name`."""


@dataclass
class OptimizerConfig:
    """Optimizer and learning-rate schedule. The section of a rule that the optimizer does not use is None."""

    name: Literal["adamw", "muon", "normuon"] = "adamw"
    """Optimizer of the transformer blocks' matrices. AdamW updates all other parameters."""
    lr: float = 1e-3
    """Peak learning rate."""
    weight_decay: float = 0.1
    """Decoupled weight decay of the blocks' matrices, the embedding and the head."""
    lr_factors: ByRole = field(default_factory=dict)
    """Factors of the learning rate by role, such as {head: 0.5, norm: 2.0}. The roles are q, k, v, attention_out, gate,
    up, down, embedding, head, norm, final_norm, q_norm, k_norm (the norms of model.qk_norm) and bias. Weights of a role
    with the factor 0 stay constant, and no gradient norm includes their gradients."""
    weight_decay_factors: ByRole = field(default_factory=dict)
    """Factors of the weight decay by role. Norms and biases have no weight decay."""
    clip_grad_norm: float = 1.0
    """Global L2 norm to which larger gradients are scaled down. It is the norm of the gradients of all parameters
    except multipliers, or of all parameters if `multipliers.clip` is `joint`. 0 means no clipping."""
    skip_grad_norm: float = 0.0
    """Skip a step if the norm that `clip_grad_norm` limits is above this value before clipping. 0 means no limit. A
    step whose gradient is not finite is skipped in any case."""
    warmup_steps: int = 0
    """Number of steps at the beginning of the run in which the learning rate rises linearly, from `lr` / `warmup_steps`
    in the first step to `lr` in the last of them."""
    decay_steps: int = 0
    """Number of steps in which the learning rate falls from `lr` to `min_lr`. They end where the `final_steps` begin.
    Between the warm-up and these steps the learning rate is `lr`."""
    decay: Literal["linear", "cosine", "exponential", "inverse_sqrt"] = "linear"
    """Curve by which the learning rate falls over `decay_steps`."""
    min_lr: float = 0.0
    """Learning rate at the end of `decay_steps`. If `decay_steps` is not 0 and `decay` is `exponential` or
    `inverse_sqrt`, it must be positive."""
    final_steps: int = 0
    """Number of steps at the end of the run in which the learning rate stays at `min_lr`. If there are such steps,
    `decay_steps` and `min_lr` must be positive."""
    adamw: AdamWConfig | None = None
    muon: MuonConfig | None = None
    normuon: NorMuonConfig | None = None

    def __post_init__(self) -> None:
        if self.name not in OPTIMIZERS:
            raise ValueError(f"optimizer.name is {self.name!r}: use one of {', '.join(OPTIMIZERS)}")
        given = {name: getattr(self, name) for name in rule_sections()}
        check_used(self.name, [f"{name}.{key}" for name, section in given.items() if section for key in vars(section)])
        for name in OPTIMIZERS[self.name].sections:
            if given[name] is None:
                setattr(self, name, rule_sections()[name]())
        positive("optimizer", lr=self.lr)
        not_negative(
            "optimizer",
            weight_decay=self.weight_decay,
            clip_grad_norm=self.clip_grad_norm,
            skip_grad_norm=self.skip_grad_norm,
            warmup_steps=self.warmup_steps,
            decay_steps=self.decay_steps,
            min_lr=self.min_lr,
            final_steps=self.final_steps,
        )
        require(self.min_lr <= self.lr, f"optimizer.min_lr is {self.min_lr}, above optimizer.lr {self.lr}: lower it")
        require(
            self.min_lr > 0 or self.decay_steps == 0 or self.decay not in ("exponential", "inverse_sqrt"),
            f"optimizer.min_lr is {self.min_lr} with optimizer.decay {self.decay}: this curve never reaches 0; "
            "set a positive min_lr",
        )
        require(
            self.final_steps == 0 or (self.decay_steps > 0 and self.min_lr > 0),
            f"optimizer.final_steps is {self.final_steps} with optimizer.decay_steps {self.decay_steps} and "
            f"optimizer.min_lr {self.min_lr}: the learning rate falls to min_lr in decay_steps, and stays there "
            "for final_steps; make both positive",
        )

    def role_mistakes(self, roles: Iterable[str]) -> list[str]:
        """Return all mistakes in the keys that name roles of a model, each as fact, value and remedy.

        Args:
            roles: roles of the model.
        """
        roles = tuple(roles)
        return [
            *by_role_mistakes("optimizer.lr_factors", self.lr_factors, roles, lambda role: True, "use one of"),
            *by_role_mistakes(
                "optimizer.weight_decay_factors",
                self.weight_decay_factors,
                roles,
                lambda role: role.decay,
                "these have weight decay:",
            ),
        ]

    @staticmethod
    def of(settings: Mapping[str, Any]) -> OptimizerConfig:
        """Make the configuration from nested mappings such as `{"name": "muon", "muon": {"momentum": 0.9}}`."""
        sections = {
            name: section(**settings[name])
            for name, section in rule_sections().items()
            if settings.get(name) is not None
        }
        return OptimizerConfig(**{**settings, **sections})

    def keys_of(self, section: str) -> dict[str, Any]:
        """Return the keys and values of a rule's section. The optimizer must be one that uses this rule; for others the
        section is None."""
        return {field.name: getattr(getattr(self, section), field.name) for field in fields(rule_sections()[section])}


@cache
def rule_sections() -> dict[str, type]:
    """Return the dataclass of each update rule's section, by the section's name."""
    found = {}
    for name, hint in get_type_hints(OptimizerConfig).items():
        inner = get_args(hint)[0] if isinstance(hint, types.UnionType) else None
        if is_dataclass(inner):
            found[name] = inner
    return found  # type: ignore[return-value]


def check_used(optimizer: str, given: Iterable[str]) -> None:
    """Check that an optimizer uses every key that a user gave in the sections of update rules.

    Args:
        optimizer: the optimizer's name.
        given: the keys, such as `muon.momentum`.

    Raises:
        ValueError: the optimizer does not use some of the keys; the message names all of these.
    """
    used = OPTIMIZERS[optimizer].sections
    unused = [f"optimizer.{key}" for key in given if key.partition(".")[0] not in used]
    if unused:
        theirs = [
            name for name, choice in OPTIMIZERS.items() if all(key.split(".")[1] in choice.sections for key in unused)
        ]
        others = f", or set optimizer.name to {' or '.join(theirs)}" if theirs else ""
        raise ValueError(
            f"optimizer.name is {optimizer!r}, which does not use {', '.join(unused)}: remove "
            f"{'it' if len(unused) == 1 else 'them'}{others}"
        )
