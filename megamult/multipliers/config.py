"""The section `multipliers` of a run's configuration."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Literal, get_args

from megamult.multipliers.parametrization import ParametrizationName
from megamult.parameters.by_role import BySide, by_side_mistakes, resolve_by_side
from megamult.parameters.initial import Initial
from megamult.parameters.roles import ROLES, Placement, mistakes, resolve
from megamult.parameters.spec import Role, Side
from megamult.validation import not_negative, positive, require

MultiplierClip = Literal["out", "own", "joint"]
"""Clipping of the multipliers' gradients. `out`: they are not clipped. `own`: they are clipped by one norm of the
gradients of all multipliers. `joint`: all gradients, those of multipliers included, are clipped by one norm."""
_Key = Literal["lr_factors", "weight_decay_factors", "initial"]
_BY_SIDE: tuple[_Key, ...] = get_args(_Key)
CLIP_OF_BOOL: dict[bool, MultiplierClip] = {False: "out", True: "own"}
"""Meaning of false and true as values of `clip`. Earlier versions had these values, and they are still accepted."""


@dataclass
class MultipliersConfig:
    """Learnable multipliers (arXiv 2601.04890)."""

    implementation: Literal["none", "layer", "folded"] = "layer"
    """`layer`: the multipliers are parameters of the layers. `folded`: the optimizer holds the multipliers and the
    model holds effective weights, so that micro-batches cost nothing extra. `none`: there are no multipliers."""
    placement: str | dict[str, str | list[str]] = "all"
    """Sides that have multipliers: all, symmetry_free, scalar (one multiplier per logical matrix), or a mapping from
    role to row, col, scalar or a list of these. Only a mapping can give multipliers to the role head."""
    shared_columns: bool = False
    """Whether the matrices of one fused parameter (q, k and v; gate and up; ssm_z, ssm_x, ssm_b, ssm_c and ssm_dt) have
    the same column multipliers, if they have any. If false, each matrix has its own."""
    lr: float | None = None
    """Peak learning rate of the multipliers, or null to use optimizer.lr."""
    lr_factors: BySide = field(default_factory=dict)
    """Factors of the multipliers' learning rate by role, or by role and side, such as {q: 0.5, down: {row: 2.0}}.
    Multipliers with the factor 0 stay constant, and no gradient norm includes their gradients."""
    schedule: Literal["same", "constant"] = "same"
    """`same`: the learning rate follows the schedule of optimizer.lr. `constant`: it always has its peak value."""
    weight_decay: float = 2e-3
    """Decoupled weight decay of the multipliers."""
    weight_decay_factors: BySide = field(default_factory=dict)
    """Factors of the multipliers' weight decay by role, or by role and side."""
    clip: MultiplierClip | bool = "out"
    """Clipping of the multipliers' gradients at the norm optimizer.clip_grad_norm. `out`: they are not clipped. `own`:
    they are clipped by one norm of the gradients of all multipliers. `joint`: all gradients, those of multipliers
    included, are clipped by one norm. false means `out`, and true means `own`."""
    parametrization: ParametrizationName = "direct"
    """Variable that AdamW trains for each multiplier r: r itself (`direct`), u with r = exp(u) (`log`), or u with
    r = log(1 + exp(u)) (`softplus`). Weight decay acts on this variable. With `log` and `softplus`, multipliers stay
    positive."""
    norm: Literal["free", "fixed"] = "free"
    """`free`: weight decay and gradients decide the norms of the blocks' matrices. `fixed`: after every update each of
    these matrices is scaled back to its initial Frobenius norm. The matrices then have no weight decay, and their
    multipliers are the gains of arXiv 2606.25971."""
    qk_clip: float | None = None
    """Threshold of QK-clip (arXiv 2507.20534), or null for none. If the largest attention logit of a head in a
    step was above the threshold, the row multipliers of this head are scaled after the update, so that the logit
    becomes the threshold. They are the row multipliers of Q, which must be trained, and those of K if they are
    trained."""
    initial: BySide = field(default_factory=dict)
    """Initial values by role, or by role and side, such as {head: {col: 0.5}}. All other multipliers start at 1."""
    divide_weights: bool = True
    """Whether initial weights are divided by the initial values of their multipliers, so that the model begins with the
    same effective weights as with multipliers of 1. If false, the initial values change the function that the model
    computes."""

    def __post_init__(self) -> None:
        if isinstance(self.placement, str):
            resolve(self.placement)
        not_negative("multipliers", weight_decay=self.weight_decay)
        if self.lr is not None:
            positive("multipliers", lr=self.lr)
        if isinstance(self.clip, bool):
            self.clip = CLIP_OF_BOOL[self.clip]
        clips = get_args(MultiplierClip)
        require(self.clip in clips, f"multipliers.clip is {self.clip!r}: use one of {', '.join(clips)}")
        names = get_args(ParametrizationName)
        require(
            self.parametrization in names,
            f"multipliers.parametrization is {self.parametrization!r}: use one of {', '.join(names)}",
        )
        given = {key: getattr(self, key) for key in ("lr_factors", "weight_decay_factors", "initial")}
        useless = [f"multipliers.{key}" for key, value in given.items() if value]
        useless += ["multipliers.shared_columns"] * self.shared_columns
        useless += ["multipliers.parametrization"] * (self.parametrization != "direct")
        useless += ["multipliers.qk_clip"] * (self.qk_clip is not None)
        require(
            self.implementation != "none" or not useless,
            f"multipliers.implementation is none, and then {', '.join(useless)} has no effect: leave it out",
        )
        if self.qk_clip is not None:
            positive("multipliers", qk_clip=self.qk_clip)

    def role_mistakes(self, roles: Iterable[Role]) -> list[str]:
        """Return all mistakes in the keys that name roles of a model, each as fact, value and remedy.

        Args:
            roles: roles of the model.
        """
        roles = tuple(roles)
        found, good = mistakes(self.placement, roles), self.placement
        if not isinstance(good, str):
            good = {role: sides for role, sides in good.items() if not mistakes({role: sides}, roles)}
        placement = resolve(good, roles)
        clip = self._clip_mistakes(placement.get("q", frozenset()), attention="q" in roles)
        return [*found, *self.by_side_mistakes(placement), *clip]

    def by_side_mistakes(self, placement: Placement) -> list[str]:
        """Return all mistakes in the numbers by role and side, for the sides on which a model has multipliers."""
        found = []
        for key in _BY_SIDE:
            initial = key == "initial"
            found += by_side_mistakes(
                f"multipliers.{key}", getattr(self, key), placement, positive=initial, apart=initial
            )
        return found

    def _clip_mistakes(self, sides: frozenset[Side], attention: bool) -> list[str]:
        """Return the mistake that Q has no row multipliers which QK-clip can scale, if it is one.

        Args:
            sides: sides on which Q has multipliers.
            attention: whether the model has attention.
        """
        if self.qk_clip is None:
            return []
        given = f"multipliers.qk_clip is {self.qk_clip}, which scales the rows of single heads of Q, and"
        if not attention:
            return [f"{given} the model has no attention: leave qk_clip out"]
        if "row" not in sides:
            scalar = ": one scalar scales all heads" if sides == {"scalar"} else ""
            return [
                f"{given} multipliers.placement gives q {', '.join(sorted(sides)) or 'no multipliers'}{scalar}; give q "
                "the side row, or leave qk_clip out"
            ]
        if self.by_side("lr_factors").get(("q", "row")) == 0:
            return [
                f"{given} multipliers.lr_factors keeps the row multipliers of q constant: give them a positive factor, "
                "or leave qk_clip out"
            ]
        return []

    def sharing(self, fused: Iterable[Sequence[Role]]) -> list[tuple[Role, ...]]:
        """Return the roles of each group of matrices that share column multipliers.

        Args:
            fused: the roles of the matrices that each parameter of the model stores.
        """
        sides = self.sides(ROLES)
        with_columns = [tuple(role for role in dict.fromkeys(roles) if "col" in sides.get(role, ())) for roles in fused]
        return sorted({roles for roles in with_columns if len(roles) > 1}) if self.shared_columns else []

    def check_shared_columns(self, fused: Iterable[Sequence[Role]]) -> None:
        """Check, if `shared_columns` is true, that the model has matrices that can share column multipliers.

        No key may give the column multipliers of these matrices different values.

        Args:
            fused: the roles of the matrices that each parameter of the model stores.

        Raises:
            ValueError: no parameter stores two matrices with column multipliers, or a key has different values for the
                columns of two matrices of one parameter. The message names all such keys.
        """
        if not self.shared_columns:
            return
        fused = [tuple(dict.fromkeys(roles)) for roles in fused]
        groups = self.sharing(fused)
        could = dict.fromkeys(roles for roles in fused if len(roles) > 1 and all(ROLES[role].sides for role in roles))
        named = " or to ".join(f"{', '.join(roles[:-1])} and {roles[-1]}" for roles in could)
        require(
            bool(groups),
            "multipliers.shared_columns is true, and no parameter of the model stores two matrices that have column "
            f"multipliers: {f'give the side col to {named} in multipliers.placement, or ' if could else ''}leave "
            "multipliers.shared_columns out",
        )
        apart = []
        for key in _BY_SIDE:
            given = self.by_side(key)
            for roles in groups:
                values = [given.get((role, "col"), 1.0) for role in roles]
                if len(set(values)) > 1:
                    apart.append(f"multipliers.{key} is {values} for the columns of {', '.join(roles)}")
        require(
            not apart,
            f"multipliers.shared_columns is true, and {'; '.join(apart)}: give the matrices that share columns one "
            "value, or leave multipliers.shared_columns out",
        )

    def sides(self, roles: Iterable[Role]) -> Placement:
        """Return the sides on which a model with these roles has multipliers, by role; empty if it has none."""
        return {} if self.implementation == "none" else resolve(self.placement, roles)

    def by_side(self, key: _Key) -> dict[tuple[Role, Side], float]:
        """Return the numbers that the user gave under `multipliers.<key>`, by (role, side)."""
        return resolve_by_side(getattr(self, key), resolve(self.placement, ROLES))

    def initial_values(self) -> Initial:
        """Return the initial values of the multipliers, and whether initial weights are divided by them so that the
        effective weights begin as with multipliers of 1."""
        values = self.by_side("initial")
        return Initial(lambda role, side: values.get((role, side), 1.0), self.divide_weights)
