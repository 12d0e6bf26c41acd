"""Folded multipliers of transformers' FalconH1ForCausalLM: those of a model in which autograd knows each of them."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import transformers
from torch import Tensor

import megamult
from megamult.parameters.stated import named_specs
from tests.integrations.test_fold import VOCAB, batch

ROLES = {
    "q_proj": "row col",
    "k_proj": "row col",
    "v_proj": "row col",
    "o_proj": "row col",
    "gate_proj": "row col",
    "up_proj": "row col",
    "down_proj": "row col",
    "embed_tokens": "row col",
    "out_proj": "row col",
    "in_proj": "row col",
}
FREE = {
    "q_proj": "row",
    "o_proj": "row col",
    "gate_proj": "row",
    "down_proj": "row col",
    "embed_tokens": "row col",
    "out_proj": "row",  # after an inner norm
    "in_proj.z": "row",
    "in_proj.dt": "row",
}
"""METHOD's table of symmetry-free sides."""
PARTS = {"z": 24, "x": 24, "b": 12, "c": 12, "dt": 4}
"""Rows of each matrix of the input projection."""


def falcon(normed: bool) -> Any:
    config = transformers.FalconH1Config(
        vocab_size=VOCAB,
        hidden_size=32,
        intermediate_size=40,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        mamba_d_ssm=24,
        mamba_n_heads=4,
        mamba_d_head=6,
        mamba_d_state=6,
        mamba_n_groups=2,
        mamba_chunk_size=8,
        mamba_rms_norm=normed,
        initializer_range=0.3,
        key_multiplier=0.7,
        ssm_multipliers=[0.5, 1.5, 0.8, 1.2, 2.0],
        embedding_multiplier=3.0,
    )
    torch.manual_seed(3)
    return transformers.FalconH1ForCausalLM(config)


def sides_of(module: str, free: bool) -> dict[str, tuple[str, ...]]:
    """Sides of each logical matrix of a module, by the matrix's logical name without its leaf."""
    leaf = module.rpartition(".")[2]
    table = FREE if free else ROLES
    if leaf != "in_proj":
        return {module: tuple(table.get(leaf, "").split())}
    return {f"{module}.{part}": tuple(table.get(f"in_proj.{part}" if free else leaf, "").split()) for part in PARTS}


class Explicit:
    """W, r and c are parameters that autograd knows."""

    def __init__(self, model: Any, free: bool, initial: float) -> None:
        self.model = model
        self.weights = {name: p.detach().clone().requires_grad_() for name, p in model.named_parameters()}
        self.sides: dict[str, dict[str, tuple[str, ...]]] = {}
        self.multipliers: dict[str, Tensor] = {}
        for name, w in self.weights.items():
            module = name.removesuffix(".weight")
            self.sides[name] = sides_of(module, free) if w.ndim == 2 else {}
            for logical, sides in self.sides[name].items():
                rows = PARTS.get(logical.rpartition(".")[2], w.shape[0]) if "in_proj" in logical else w.shape[0]
                for side in sides:
                    size = rows if side == "row" else w.shape[1]
                    self.multipliers[f"{logical}.{side}_multiplier"] = torch.full((size,), initial, requires_grad=True)

    def effective(self) -> dict[str, Tensor]:
        found = {}
        for name, w in self.weights.items():
            parts = w.split(list(PARTS.values())) if "in_proj" in name else [w]
            scaled = []
            for part, logical in zip(parts, self.sides[name] or [""], strict=True):
                for side, shape in (("row", (-1, 1)), ("col", (1, -1))):
                    multiplier = self.multipliers.get(f"{logical}.{side}_multiplier")
                    part = part if multiplier is None else part * multiplier.view(shape)
                scaled.append(part)
            found[name] = torch.cat(scaled)
        return found

    def train(self, steps: int, lr: float, multiplier_lr: float, eps: float, clip: float) -> list[float]:
        decayed = [w for w in self.weights.values() if w.ndim == 2]
        rest = [w for w in self.weights.values() if w.ndim != 2]
        groups = [
            {"params": decayed, "weight_decay": 0.1},
            {"params": rest, "weight_decay": 0.0},
            {"params": list(self.multipliers.values()), "weight_decay": 2e-3, "lr": multiplier_lr},
        ]
        optimizer = torch.optim.AdamW(groups, lr=lr, betas=(0.9, 0.95), eps=eps)
        losses = []
        for step in range(steps):
            text = batch(step)
            keys = {"input_ids": text, "labels": text}
            loss = torch.func.functional_call(self.model, self.effective(), kwargs=keys)["loss"]
            optimizer.zero_grad()
            loss.backward()
            assert torch.nn.utils.clip_grad_norm_(decayed + rest, clip) > clip, "the clip rule must matter"
            optimizer.step()
            losses.append(loss.item())
        return losses


@pytest.mark.parametrize(("normed", "free", "initial"), [(False, False, 0.8), (True, True, 1.2)])
def test_a_folded_model_trains_as_one_with_explicit_multipliers(normed: bool, free: bool, initial: float) -> None:
    steps, lr, multiplier_lr, eps, clip = 4, 5e-3, 2e-2, 1e-4, 0.05
    reference = Explicit(falcon(normed), free, initial)
    expected = reference.train(steps, lr, multiplier_lr, eps, clip)
    model = falcon(normed)
    optimizer = megamult.fold(
        {"name": "adamw", "lr": lr, "adamw": {"eps": eps}, "clip_grad_norm": clip},
        model,
        megamult.FALCON_H1_RULES,
        placement="symmetry_free" if free else "all",
        multiplier_lr=multiplier_lr,
        initial=initial,
    )
    optimizer.begin()
    losses = []
    for step in range(steps):
        loss = model(input_ids=batch(step), labels=batch(step)).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses == pytest.approx(expected, rel=1e-5)
    folded = optimizer.folded
    assert folded is not None
    multipliers = {vector.name: folded.values[vector.entries] for vector in folded.vectors}
    assert multipliers.keys() == reference.multipliers.keys()
    # As in test_fold.py: fp32 sums in another order, which AdamW amplifies down to eps.
    for name, wanted in reference.multipliers.items():
        assert torch.linalg.vector_norm(multipliers[name] - wanted) < 1e-5 * torch.linalg.vector_norm(wanted), name
        assert (wanted - initial).abs().max() > 3e-4, (
            "more than weight decay moves it (1.3e-4) and than they may differ"
        )
    effective = reference.effective()
    for name, parameter in model.named_parameters():
        wanted = effective[name]
        assert torch.linalg.vector_norm(parameter - wanted) < 1e-5 * torch.linalg.vector_norm(wanted), name


def test_muon_orthogonalizes_each_matrix_of_the_input_projection() -> None:
    model = falcon(False)
    optimizer = megamult.fold({"name": "muon"}, model, megamult.FALCON_H1_RULES)
    kinds = {name.rpartition("layers.1.")[2]: spec.kind for name, _, spec in named_specs(model) if "layers.1." in name}
    assert {name for name, kind in kinds.items() if kind == "matrix"} == {
        "mamba.in_proj.weight",
        "mamba.out_proj.weight",
        *(f"self_attn.{each}_proj.weight" for each in "qkvo"),
        *(f"feed_forward.{each}_proj.weight" for each in ("gate", "up", "down")),
    }
    assert set(kinds.values()) == {"matrix", "undecayed"}
    assert "26 matrices" in str(optimizer.ownership), "in two layers, five for each input projection"


@pytest.mark.parametrize(
    ("normed", "factors", "multiplied"),
    [
        (True, {"ssm_norm": 0.5, "bias": 0.25}, {"mamba.norm.weight": 0.5, "mamba.conv1d.bias": 0.25}),
        (False, {"bias": 0.25}, {"mamba.conv1d.bias": 0.25}),
        (True, {"norm": 0.5}, {"input_layernorm.weight": 0.5, "pre_ff_layernorm.weight": 0.5}),
    ],
)
def test_inner_norm_and_bias_have_learning_rates_of_their_own(
    normed: bool, factors: dict[str, float], multiplied: dict[str, float]
) -> None:
    model = falcon(normed)
    optimizer = megamult.fold({"lr": 1e-3, "lr_factors": factors}, model, megamult.FALCON_H1_RULES)
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    optimizer.begin()
    model(input_ids=batch(0), labels=batch(0)).loss.backward()
    optimizer.step()
    for name, parameter in model.named_parameters():
        layer, _, rest = name.removeprefix("model.layers.").partition(".")
        if parameter.ndim == 1 and layer.isdigit():
            # The first update of AdamW is the sign of the gradient.
            moved = (parameter - before[name]).abs().max().item()
            assert moved == pytest.approx(1e-3 * multiplied.get(rest, 1.0), rel=1e-2), name
