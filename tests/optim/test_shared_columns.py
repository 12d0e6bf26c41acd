"""Column multipliers that Q, K and V share: several steps against float64, in which there is one vector."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from megamult.distributed.mesh import ALONE
from megamult.multipliers import specs
from megamult.multipliers.config import MultipliersConfig
from megamult.multipliers.layer_scaling import LayerScaling
from megamult.multipliers.parameters import register_multipliers
from megamult.multipliers.wrapped import effective_weight
from megamult.optim.build import make_optimizer
from megamult.optim.config import AdamWConfig, OptimizerConfig
from megamult.optim.folded import LATENT
from megamult.parameters import megatron
from megamult.parameters.roles import resolve
from megamult.parameters.spec import ParameterSpec
from megamult.parameters.stated import set_spec, spec_of

HEADS, GROUPS, DIM, COLS = 4, 2, 2, 6
SPEC = megatron.fused_qkv(HEADS, GROUPS, DIM, COLS)
LR, CLIP, EPS, STEPS = 0.05, 0.5, 1e-3, 4
PLACEMENTS: dict[str, Any] = {
    "all": "all",
    # V has no columns that could be shared, and K has columns only.
    "mapping": {"q": ["row", "col"], "k": "col", "v": "row"},
}


class Fused(torch.nn.Module):
    """y = x W_eff^T with Q, K and V in one weight, whose multipliers are in the layer if `layer` is true."""

    def __init__(self, spec: ParameterSpec, placement: Any, layer: bool) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(1)
        self.weight = torch.nn.Parameter(torch.randn(spec.shape, generator=generator))
        set_spec(self.weight, spec)
        self.scaling = None
        if layer:
            sides = resolve(placement)
            register_multipliers(self, self.weight, spec, sides, ALONE.grid, False, shared_columns=True)
            self.scaling = LayerScaling(spec, sides, ALONE.coordinates, shared_columns=True)

    def forward(self, x: Tensor) -> Tensor:
        if self.scaling is None:
            return x @ self.weight.t()
        multipliers = [getattr(self, leaf) for leaf in specs.LEAVES.values()]
        with effective_weight(self, self.weight, multipliers, self.scaling) as weight:
            return x @ weight.t()


def objective(y: Tensor) -> Tensor:
    """A loss that has a minimum, so that gradients change from step to step."""
    return 0.1 * ((y - torch.linspace(-1, 1, y.shape[1], dtype=y.dtype)) ** 2).sum()


def batch(step: int) -> Tensor:
    return torch.randn(5, COLS, generator=torch.Generator().manual_seed(10 + step))


def rows_of(spec: ParameterSpec, role: str) -> Tensor:
    (part,) = (i for i, part in enumerate(spec.parts) if part.role == role)
    held = spec.local_segments(ALONE.coordinates)
    return torch.cat([torch.arange(s.start, s.start + s.length) for s in held if s.part == part])


def reference(spec: ParameterSpec, placement: Any) -> tuple[dict[str, Tensor], list[float]]:
    """W, r by role and the one c after STEPS of AdamW in float64, clipped by one norm, and all norms of r and c."""
    sides = resolve(placement)
    generator = torch.Generator().manual_seed(1)
    values: dict[str, Tensor] = {"W": torch.randn(spec.shape, generator=generator).double()}
    columns = [part.role for part in spec.parts if "col" in sides.get(part.role, ())]
    values["c"] = torch.ones(COLS, dtype=torch.float64)
    for part in spec.parts:
        if "row" in sides.get(part.role, ()):
            values[f"r {part.role}"] = torch.ones(part.rows, dtype=torch.float64)
    for value in values.values():
        value.requires_grad_()
    plain = torch.optim.AdamW(values.values(), lr=LR, betas=(0.9, 0.95), eps=EPS, weight_decay=0.0)
    norms = []
    for step in range(STEPS):
        plain.zero_grad()
        left, right = torch.ones(spec.shape[0], dtype=torch.float64), torch.ones(spec.shape, dtype=torch.float64)
        for part in spec.parts:
            rows = rows_of(spec, part.role)
            if f"r {part.role}" in values:
                left = left.index_copy(0, rows, values[f"r {part.role}"])
            if part.role in columns:
                right = right.index_copy(0, rows, values["c"].expand(part.rows, COLS))
        objective(batch(step).double() @ (left[:, None] * values["W"] * right).t()).backward()
        gradients = {name: value.grad for name, value in values.items() if value.grad is not None}
        squares = {name: float(gradient.square().sum()) for name, gradient in gradients.items()}
        norms.append((sum(squares.values()) - squares["W"]) ** 0.5)
        factor = min(1.0, CLIP / (sum(squares.values()) ** 0.5 + 1e-6))
        for gradient in gradients.values():
            gradient.mul_(factor)
        plain.step()
    return {name: value.detach() for name, value in values.items()}, norms


def logical(parameter: torch.nn.Parameter, letter: str) -> dict[str, Tensor]:
    """Multipliers of a layer by role: `r q`, `c k`, ..."""
    spec, values = spec_of(parameter), parameter.detach()
    return {f"{letter} {part.role}": values[rows_of(spec, part.role)] for part in spec.parts}


def trained(spec: ParameterSpec, placement: Any, implementation: str) -> tuple[dict[str, Tensor], list[float]]:
    """The same by the optimizer, with the columns of every role (`c q`, `c k`, ...)."""
    settings = MultipliersConfig(implementation, placement, shared_columns=True, weight_decay=0.0, clip="joint")  # type: ignore[arg-type]
    chosen = OptimizerConfig(lr=LR, weight_decay=0.0, clip_grad_norm=CLIP, adamw=AdamWConfig(eps=EPS))
    model = Fused(spec, placement, implementation == "layer")
    optimizer = make_optimizer(model, chosen, settings, mesh=ALONE)
    norms = []
    for step in range(STEPS):
        optimizer.zero_grad()
        objective(model(batch(step))).backward()
        optimizer.step()
        assert optimizer.norms is not None
        norms.append(optimizer.norms.multipliers)
    if optimizer.folded is None:
        found = {"W": model.weight.detach()}
        return found | logical(model.row_multiplier, "r") | logical(model.col_multiplier, "c"), norms
    found = {"W": optimizer.state[model.weight][LATENT].view(spec.shape)}
    letters = {"row": "r", "col": "c"}
    return found | {
        f"{letters[v.side]} {v.role}": optimizer.folded.values[v.entries] for v in optimizer.folded.vectors
    }, norms


@pytest.mark.parametrize("implementation", ["layer", "folded"])
@pytest.mark.parametrize("placement", list(PLACEMENTS))
def test_the_columns_are_those_of_one_vector_in_float64(placement: str, implementation: str) -> None:
    expected, norms = reference(SPEC, PLACEMENTS[placement])
    found, found_norms = trained(SPEC, PLACEMENTS[placement], implementation)
    assert found_norms == pytest.approx(norms, rel=1e-5)
    columns = [name for name in found if name.startswith("c ")]
    assert len(columns) == (3 if placement == "all" else 2)
    for name, value in found.items():
        wanted = expected["c" if name in columns else name]
        # Four steps in fp32 with sums of some ten products; eps keeps Adam from enlarging a small gradient's rounding.
        torch.testing.assert_close(value.double(), wanted, rtol=1e-5, atol=1e-5)
        assert torch.equal(value, found[columns[0]]) or name not in columns, "to the last bit"
    assert (expected["c"] - 1).abs().min() > 0.01, "all columns have moved, else agreement would prove nothing"


def test_a_shared_vector_counts_once() -> None:
    own, shared = (specs.col_multiplier(SPEC, [0, 1, 2], False, each) for each in (False, True))
    assert (own.numel_logical, shared.numel_logical) == (3 * COLS, COLS)
    assert specs.col_multiplier(SPEC, [1], False, True) == specs.col_multiplier(SPEC, [1], False), "nothing to share"
    with pytest.raises(ValueError, match=r"is shared and has parts of shape \(8,\), \(4,\).*state shared=False"):
        replace(specs.row_multiplier(SPEC, [0, 1], False), shared=True)


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"placement": {"q": ["row", "col"], "k": "row"}}, "no parameter of the model stores two matrices that have"),
        ({"placement": "scalar"}, "no parameter of the model stores two matrices that have column multipliers: give"),
        (
            {"lr_factors": {"k": {"col": 0.5}}, "initial": {"v": {"row": 1.0, "col": 3.0}}},
            r"lr_factors is \[1.0, 0.5, 1.0\] for the columns of q, k, v; multipliers.initial is \[1.0, 1.0, 3.0\] for",
        ),
    ],
)
def test_keys_that_leave_nothing_to_share_or_tell_the_matrices_apart_are_refused(
    keys: dict[str, Any], message: str
) -> None:
    settings = MultipliersConfig("folded", **{"placement": "all", **keys}, shared_columns=True)
    with pytest.raises(ValueError, match=message):
        make_optimizer(Fused(SPEC, settings.placement, layer=False), OptimizerConfig(), settings, mesh=ALONE)
