"""QK-clip: the rule in float64, what it does to a model's logits, and what it leaves alone."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from megamult.distributed.mesh import ALONE
from megamult.multipliers.config import MultipliersConfig
from megamult.multipliers.specs import multiplier
from megamult.optim.build import make_optimizer
from megamult.optim.config import AdamWConfig, OptimizerConfig
from megamult.optim.qk_clip import head_factors
from megamult.parameters import megatron
from megamult.parameters.stated import set_spec
from tests.optim.qk_clip_workers import THRESHOLD, run
from tests.processes import run_distributed


def reference(largest: list[float], threshold: float, groups: int, share: bool) -> tuple[list[float], list[float]]:
    """Factors of Q by head and of K by group, head by head."""
    shared = len(largest) // groups
    gamma = [min(1.0, threshold / s) if s > 0 else 1.0 for s in largest]
    of_keys = [math.sqrt(max(gamma[g * shared : (g + 1) * shared])) if share else 1.0 for g in range(groups)]
    return [gamma[h] / of_keys[h // shared] for h in range(len(gamma))], of_keys


LARGEST = [12.0, 3.0, 40.0, 10.0, 80.0, 20.0, 50.0, 10.001]


@pytest.mark.parametrize("share", [True, False], ids=["Q and K", "Q only"])
@pytest.mark.parametrize("groups", [8, 4, 2, 1])
def test_the_logits_of_every_head_get_its_factor_exactly(groups: int, share: bool) -> None:
    largest = torch.tensor([LARGEST, [-5.0, 0.0, -math.inf, 1e-3, 9.0, 11.0, 1e30, 10.0]], dtype=torch.float64)
    gamma, of_queries, of_keys = head_factors(largest, 10.0, groups, share)
    for i in range(2):
        expected = reference(largest[i].tolist(), 10.0, groups, share)
        assert of_queries[i].tolist() == pytest.approx(expected[0], rel=1e-14)
        assert of_keys[i].tolist() == pytest.approx(expected[1], rel=1e-14)
    together = of_queries * of_keys.repeat_interleave(8 // groups, dim=1)
    torch.testing.assert_close(together, torch.where(largest > 10, 10 / largest, 1.0), rtol=1e-14, atol=0)
    assert torch.all(together[largest <= 10] == 1), "to the last bit"
    assert of_queries.max() <= 1 and of_keys.max() <= 1, "nothing grows"
    generator = torch.Generator().manual_seed(3)
    q, k = (torch.randn(2, heads, 6, generator=generator, dtype=torch.float64) for heads in (8, groups))
    before, after = (
        torch.einsum("ahd,ahd->ah", a, b.repeat_interleave(8 // groups, dim=1))
        for a, b in ((q, k), (q * of_queries.unsqueeze(2), k * of_keys.unsqueeze(2)))
    )
    torch.testing.assert_close(after, gamma * before, rtol=1e-12, atol=0)
    if share and groups == 8:
        assert torch.equal(of_queries, gamma / gamma.sqrt()), "one K for each head: both get the root"


HEADS, GROUPS, DIM = 4, 2, 2
SPEC = megatron.fused_qkv(HEADS, GROUPS, DIM, 6)
LOGITS = torch.tensor([[8.0, 0.5, 4.0, 16.0]])
GAMMA = [0.25, 1.0, 0.5, 0.125]
OF_KEYS = [1.0, math.sqrt(0.5)]


class Fixed:
    """Logits that were measured somewhere."""

    def __init__(self) -> None:
        self.modules, self.heads = ["attention"], HEADS

    def take(self) -> Tensor:
        return LOGITS.clone()


class Attention(torch.nn.Module):
    """Q, K and V in one parameter, and a multiplier of each row if `layer` is true."""

    def __init__(self, layer: bool, roles: str) -> None:
        super().__init__()
        self.attention = torch.nn.Module()
        weight = torch.nn.Parameter(torch.randn(SPEC.shape, generator=torch.Generator().manual_seed(1)))
        set_spec(weight, SPEC)
        self.attention.weight = weight
        if layer:
            stated = multiplier("row", SPEC, ["qkv".index(role) for role in roles], partial=False)
            row = torch.nn.Parameter(torch.ones(stated.local_shape(ALONE.grid)))
            set_spec(row, stated)
            self.attention.row_multiplier = row


def multipliers_after(clip: bool, implementation: str, roles: str = "qkv", **more: Any) -> dict[str, Any]:
    """Row multipliers by role after one step, and with QK-clip its figures.

    Args:
        more: optimizer (`name`), whether a gradient is NaN (`nan`), and other keys of the multipliers.
    """
    settings = MultipliersConfig(
        implementation,  # type: ignore[arg-type]
        dict.fromkeys(roles, "row"),
        qk_clip=2.0 if clip else None,
        **{key: value for key, value in more.items() if key not in ("name", "nan")},
    )
    chosen = OptimizerConfig(name=more.get("name", "adamw"), lr=0.1, adamw=AdamWConfig(eps=1e-3))
    model = Attention(implementation == "layer", roles)
    optimizer = make_optimizer(model, chosen, settings, mesh=ALONE, logits=Fixed() if clip else None)
    for parameter in model.parameters():
        parameter.grad = torch.randn(parameter.shape, generator=torch.Generator().manual_seed(2))
        parameter.grad[0] = torch.nan if more.get("nan") else 1.0
    optimizer.step()
    found: dict[str, Any] = {}
    if implementation == "folded":
        found = {v.role: optimizer.folded.values[v.entries].double() for v in optimizer.folded.vectors}
        (piece,) = optimizer._bound.slices
        scaled = optimizer.weight(piece).view(SPEC.shape).double().clone()
        for p, part in enumerate(SPEC.parts):
            rows = torch.cat([torch.arange(s.start, s.start + s.length) for s in SPEC.segments if s.part == p])
            if part.role in found:
                scaled[rows] *= found[part.role].unsqueeze(1)
        torch.testing.assert_close(model.attention.weight.detach().double(), scaled, rtol=1e-6, atol=0)
    else:
        row: Any = model.attention.row_multiplier
        parts = multiplier("row", SPEC, ["qkv".index(role) for role in roles], partial=False)
        for p, part in enumerate(parts.parts):
            pieces = [row[s.start : s.start + s.length] for s in parts.local_segments(ALONE.coordinates) if s.part == p]
            found[part.role] = torch.cat(pieces).detach().double()
    if clip:
        found["figures"] = optimizer.qk_clip.figures()
    return found


def expected_of(plain: dict[str, Tensor], share: bool) -> dict[str, Tensor]:
    """Multipliers of a step without QK-clip, and what it makes of them, in float64."""
    of_keys = torch.tensor(OF_KEYS if share else [1.0] * GROUPS, dtype=torch.float64)
    of_queries = torch.tensor(GAMMA, dtype=torch.float64) / of_keys.repeat_interleave(HEADS // GROUPS)
    factors = {"q": of_queries.repeat_interleave(DIM), "k": of_keys.repeat_interleave(DIM)}
    return {role: values * factors.get(role, 1.0) for role, values in plain.items()}


@pytest.mark.parametrize("implementation", ["layer", "folded"])
@pytest.mark.parametrize(
    ("more", "share"),
    [
        ({}, True),
        ({"name": "muon"}, True),
        ({"roles": "qv"}, False),
        ({"lr_factors": {"k": 0.0}}, False),
        ({"parametrization": "log"}, True),
        ({"norm": "fixed"}, True),
    ],
    ids=["adamw", "muon", "no rows of K", "constant rows of K", "log", "fixed norm"],
)
def test_a_step_scales_the_rows_of_its_update(implementation: str, more: dict[str, Any], share: bool) -> None:
    plain = multipliers_after(False, implementation, **more)
    clipped = multipliers_after(True, implementation, **more)
    assert clipped.pop("figures") == {"qk_clip_heads": 3.0, "qk_clip_factor": 0.125, "qk_clip_logit": 16.0}
    for role, expected in expected_of(plain, share).items():
        # Two products in fp32.
        torch.testing.assert_close(clipped[role], expected, rtol=3e-7, atol=0)
    assert torch.equal(clipped["v"], plain["v"]) and torch.equal(clipped["q"][DIM : 2 * DIM], plain["q"][DIM : 2 * DIM])


@pytest.mark.parametrize("implementation", ["layer", "folded"])
def test_a_skipped_step_clips_nothing(implementation: str) -> None:
    found = multipliers_after(True, implementation, nan=True)
    assert found.pop("figures") == {"qk_clip_heads": 0.0, "qk_clip_factor": 1.0, "qk_clip_logit": 16.0}
    assert all(torch.all(values == 1) for values in found.values())


def test_an_optimizer_needs_both_a_threshold_and_logits() -> None:
    for threshold, logits, given in ((2.0, None, "None"), (None, Fixed(), "given")):
        settings = MultipliersConfig("folded", {"q": "row"}, qk_clip=threshold)
        with pytest.raises(ValueError, match=rf"qk_clip is {threshold} and logits {given}: .*; give both, or neither"):
            make_optimizer(Attention(False, ""), OptimizerConfig(), settings, mesh=ALONE, logits=logits)


def test_a_model_without_row_multipliers_of_q_is_refused() -> None:
    """Layers that were built with another placement than the optimizer's."""
    model = Attention(True, "kv")
    optimizer = make_optimizer(model, OptimizerConfig(), MultipliersConfig(qk_clip=2.0), mesh=ALONE, logits=Fixed())
    with pytest.raises(ValueError, match=r"Q has no trained row multipliers in 1 attention layers, .* attention: "):
        optimizer.begin()


CASES: dict[str, dict[str, Any]] = {
    f"{implementation}, {groups} groups, {more or 'all'}": {
        "groups": groups,
        "multipliers": {"implementation": implementation, **more},
        "optimizer": optimizer,
        "recompute": recompute,
    }
    for implementation, groups, optimizer, recompute, more in [
        ("layer", 12, "adamw", False, {}),
        ("layer", 2, "muon", True, {}),
        ("folded", 12, "muon", True, {}),
        ("folded", 2, "adamw", False, {}),
        ("layer", 4, "adamw", False, {"placement": "symmetry_free"}),
        ("folded", 4, "adamw", True, {"lr_factors": {"k": 0.0}}),
    ]
}


@pytest.fixture(scope="module")
def steps() -> dict[str, dict[str, Any]]:
    return dict(zip(CASES, run_distributed(1, run, list(CASES.values()))[0], strict=True))


@pytest.mark.parametrize("name", CASES)
def test_clipped_heads_end_at_the_threshold_and_others_stay(name: str, steps: dict[str, dict[str, Any]]) -> None:
    found, groups = steps[name], CASES[name]["groups"]
    before, after = found["before"], found["after"]
    clipped = before > THRESHOLD
    assert 3 <= clipped.sum() <= 9
    # Some hundred roundings of 2^-24 on the way from a multiplier to a logit.
    torch.testing.assert_close(after[clipped], torch.full_like(after[clipped], THRESHOLD), rtol=2e-6, atol=0)
    torch.testing.assert_close(after[~clipped], before[~clipped], rtol=2e-6, atol=0)
    figures = found["figures"]
    assert figures["qk_clip_heads"] == clipped.sum()
    # The evaluation before the step has other logits, which do not count.
    assert figures["qk_clip_logit"] == pytest.approx(before.max().item(), rel=2e-6)
    assert figures["qk_clip_factor"] == pytest.approx(THRESHOLD / before.max().item(), rel=2e-6)
    share = name.endswith("all")
    gamma, of_queries, of_keys = head_factors(before.double().view(1, -1), THRESHOLD, groups, share)
    dim = 96 // 12
    factors = {"q": of_queries, "k": of_keys, "v": torch.ones(1, groups)}
    for role, weights in found["weights before"].items():
        expected = weights * factors[role].view(-1).repeat_interleave(dim).unsqueeze(1)
        torch.testing.assert_close(found["weights after"][role], expected, rtol=2e-6, atol=1e-9)
    assert gamma.min() < 0.9
