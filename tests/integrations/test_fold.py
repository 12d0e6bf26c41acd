"""megamult.fold on a Hugging Face Llama against explicit multipliers, on Megatron's GPTModel, and its errors."""

from __future__ import annotations

import copy
import types
from collections.abc import Callable, Mapping
from typing import Any

import pytest
import torch
from torch import Tensor

import megamult
from megamult import TwoPhaseAdamW
from megamult.multipliers import specs
from megamult.optim.adamw import AdamW
from megamult.optim.config import OptimizerConfig
from megamult.optim.muon.rule import Muon
from megamult.parameters import megatron
from megamult.parameters.axes import Grid, tensor_shard
from megamult.parameters.spec import ParameterSpec
from megamult.parameters.stated import has_spec, named_specs, set_spec, spec_of
from tests.integrations import fold_workers
from tests.integrations.fold_workers import GATED_WITH_BIAS, GPT2_LIKE
from tests.processes import run_distributed

transformers = pytest.importorskip("transformers", reason="pip install megamult[test] brings it")

VOCAB, SEQ, BATCH = 96, 12, 4
ROLES = {
    "q_proj": "q",
    "k_proj": "k",
    "v_proj": "v",
    "o_proj": "attention_out",
    "gate_proj": "gate",
    "up_proj": "up",
    "down_proj": "down",
    "embed_tokens": "embedding",
}
SIDES: dict[str, dict[str, str]] = {  # METHOD's tables, written out
    "all": dict.fromkeys(ROLES.values(), "row col"),
    "symmetry_free": {
        "q": "row",
        "attention_out": "row col",
        "gate": "row",
        "down": "row col",
        "embedding": "row col",
    },
    "scalar": dict.fromkeys(ROLES.values(), "scalar"),
}
MULTIPLIER = specs.row_multiplier(megatron.single_matrix("q", 32, 8, 0), [0], False)


def llama(**settings: Any) -> Any:
    torch.manual_seed(1)
    sizes = {
        "vocab_size": VOCAB,
        "hidden_size": 32,
        "intermediate_size": 56,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
    }
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(**sizes | settings))


def published(family: str, **settings: Any) -> Any:
    """Return a small model of another family, whose biases are no zeros."""
    like: Any = llama().config
    same = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
    sizes = {key: getattr(like, key) for key in (*same, "num_key_value_heads")} | {"initializer_range": 0.1}
    model = getattr(transformers, f"{family}ForCausalLM")(getattr(transformers, f"{family}Config")(**sizes | settings))
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):
            torch.nn.init.normal_(parameter, std=0.1)
    return model


class Wrapped(torch.nn.Module):
    """A model within a model, as trainers and adapters have it."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model = model

    def forward(self, **inputs: Any) -> Any:
        return self.model(**inputs)


def partly_frozen() -> Any:
    """Return a model whose embedding and first layer are frozen."""
    model = llama(initializer_range=0.1)
    for part in (model.model.embed_tokens, model.model.layers[0]):
        part.requires_grad_(False)
    return model


def batch(step: int) -> Tensor:
    return torch.randint(0, VOCAB, (BATCH, SEQ), generator=torch.Generator().manual_seed(step))


class Explicit:
    """A Llama whose W, r, c, s are parameters that autograd knows, trained by torch's AdamW."""

    def __init__(self, model: Any, placement: str, initial: float) -> None:
        self.model = model
        self.weights = {
            name: p.detach().clone().requires_grad_(p.requires_grad) for name, p in model.named_parameters()
        }
        self.multipliers: dict[str, Tensor] = {}
        for name, w in self.weights.items():
            module = name.removesuffix(".weight")
            role = ROLES.get(module.rpartition(".")[2], "") if w.requires_grad else ""
            for side in SIDES[placement].get(role, "").split():
                size = {"row": w.shape[0], "col": w.shape[-1], "scalar": 1}[side]
                self.multipliers[f"{module}.{side}_multiplier"] = torch.full((size,), initial, requires_grad=True)

    def effective(self) -> dict[str, Tensor]:
        found = {}
        for name, w in self.weights.items():
            module = name.removesuffix(".weight")
            for side, shape in (("row", (-1, 1)), ("col", (1, -1)), ("scalar", (1, 1))):
                multiplier = self.multipliers.get(f"{module}.{side}_multiplier")
                w = w if multiplier is None else w * multiplier.view(shape)
            found[name] = w
        return found

    def train(self, steps: int, lr: float, multiplier_lr: float, eps: float, clip: float) -> list[float]:
        decayed = [w for w in self.weights.values() if w.ndim == 2 and w.requires_grad]
        norms = [w for w in self.weights.values() if w.ndim == 1 and w.requires_grad]
        groups = [
            {"params": decayed, "weight_decay": 0.1},
            {"params": norms, "weight_decay": 0.0},
            {"params": list(self.multipliers.values()), "weight_decay": 2e-3, "lr": multiplier_lr},
        ]
        optimizer = torch.optim.AdamW(groups, lr=lr, betas=(0.9, 0.95), eps=eps)
        losses = []
        for step in range(steps):
            text = batch(step)
            loss = torch.func.functional_call(self.model, self.effective(), kwargs={"input_ids": text, "labels": text})[
                "loss"
            ]
            optimizer.zero_grad()
            loss.backward()
            norm = torch.nn.utils.clip_grad_norm_(decayed + norms, clip)
            assert norm > clip, "the clip rule must matter"
            optimizer.step()
            losses.append(loss.item())
        return losses


MODELS: dict[str, tuple[Callable[[], Any], dict[str, Any]]] = {
    "llama": (lambda: llama(initializer_range=0.1), megamult.LLAMA_RULES),
    "mistral": (lambda: published("Mistral", sliding_window=None, head_dim=12), megamult.MISTRAL_RULES),
    "qwen2": (lambda: published("Qwen2"), megamult.QWEN2_RULES),
    "qwen3, wrapped": (lambda: Wrapped(published("Qwen3", head_dim=12)), megamult.QWEN3_RULES),
    "frozen": (partly_frozen, megamult.LLAMA_RULES),
}


@pytest.mark.parametrize(
    ("name", "placement", "initial"),
    [
        ("llama", "all", 1.0),
        ("llama", "all", 0.7),
        ("llama", "symmetry_free", 1.0),
        ("llama", "scalar", 1.5),
        ("mistral", "all", 0.7),
        ("qwen2", "all", 0.7),
        ("qwen3, wrapped", "symmetry_free", 1.2),
        ("frozen", "all", 0.7),
    ],
)
def test_a_folded_model_trains_as_one_with_explicit_multipliers(name: str, placement: str, initial: float) -> None:
    steps, lr, multiplier_lr, eps, clip = 8, 5e-3, 2e-2, 1e-5, 0.05
    make, rules = MODELS[name]
    reference = Explicit(make(), placement, initial)
    expected = reference.train(steps, lr, multiplier_lr, eps, clip)
    model = make()
    optimizer = megamult.fold(
        {"name": "adamw", "lr": lr, "adamw": {"eps": eps}, "clip_grad_norm": clip},
        model,
        rules,
        placement=placement,
        multiplier_lr=multiplier_lr,
        initial=initial,
    )
    optimizer.begin()
    losses = []
    for step in range(steps):
        text = batch(step)
        loss = model(input_ids=text, labels=text).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
        assert optimizer.norms is not None and optimizer.norms.multipliers > clip, "not clipping them must matter"
    folded = optimizer.folded
    assert folded is not None
    multipliers = {vector.name: folded.values[vector.entries] for vector in folded.vectors}
    assert multipliers.keys() == reference.multipliers.keys()
    # The two differ in the order of fp32 sums and products alone, 2^-24 each, some tens in a row. AdamW divides by the
    # gradient's own size and so lets elements with small gradients amplify that, down to eps: measured up to 7e-7 of
    # a tensor's norm. A multiplier that is clipped, or a side that is left out, is off by more than 1e-3.
    assert losses == pytest.approx(expected, rel=1e-5)
    effective = reference.effective()
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            assert torch.equal(parameter, reference.weights[name]), "frozen"
            continue
        latent = folded.latent(parameter, 0, parameter.numel()).view_as(parameter)
        for actual, wanted in ((latent, reference.weights[name]), (parameter, effective[name])):
            assert torch.linalg.vector_norm(actual - wanted) < 1e-5 * torch.linalg.vector_norm(wanted), name
    for name, values in multipliers.items():
        wanted = reference.multipliers[name]
        assert torch.linalg.vector_norm(values - wanted) < 1e-5 * torch.linalg.vector_norm(wanted), name
        assert (values - initial).abs().max() > 1e-3, "it must have moved"


def test_settings_reach_the_optimizer_and_its_multipliers() -> None:
    settings = {"name": "muon", "lr": 2e-3, "clip_grad_norm": 0.3, "muon": {"momentum": 0.8}}
    settings["adamw"] = {"betas": [0.8, 0.9]}
    for given in (settings, OptimizerConfig.of(settings | {"adamw": {"betas": (0.8, 0.9)}})):
        muon = megamult.fold(given, llama(), megamult.LLAMA_RULES, multiplier_weight_decay=0.01, clip_multipliers=True)
        rule = muon.rule_of("matrix")
        assert type(rule) is Muon and type(muon.rule_of("norm")) is AdamW and muon.folding is not None
        assert (rule.momentum, muon.clipping.threshold, muon.clipping.multipliers) == (0.8, 0.3, "own")
        assert [group["lr"] for group in muon.param_groups] == [2e-3] * 4 and muon.folding.lr == 2e-3
        betas = {group["kind"]: group.get("betas") for group in muon.param_groups}
        assert betas == dict.fromkeys(("undecayed", "embedding", "head"), (0.8, 0.9)) | {"matrix": None}
        assert (muon.folding.weight_decay, muon.folding.betas, muon.folding.eps) == (0.01, (0.8, 0.9), 1e-8)
        assert {group["kind"]: len(group["params"]) for group in muon.param_groups} == {
            "matrix": 14,
            "undecayed": 5,
            "embedding": 1,
            "head": 1,
        }
    adamw = megamult.fold({}, llama(), megamult.LLAMA_RULES)
    assert type(adamw.rule_of("matrix")) is AdamW


@pytest.mark.parametrize("name", ["adamw", "muon"])
def test_a_loop_of_ones_own_goes_on_from_its_state_bit_by_bit(name: str) -> None:
    def made() -> tuple[Any, Any]:
        model = llama()
        return model, megamult.fold({"name": name, "lr": 1e-2}, model, megamult.LLAMA_RULES, placement="all")

    def train(model: Any, optimizer: Any, steps: range) -> list[float]:
        losses = []
        for step in steps:
            loss = model(input_ids=batch(step), labels=batch(step)).loss
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            losses.append(loss.item())
        return losses

    model, optimizer = made()
    train(model, optimizer, range(3))
    kept = copy.deepcopy((model.state_dict(), optimizer.state_dict()))
    expected = train(model, optimizer, range(3, 6))
    again, other = made()
    again.load_state_dict(kept[0])
    other.load_state_dict(kept[1])
    assert train(again, other, range(3, 6)) == expected
    assert torch.equal(other.folded.values, optimizer.folded.values)
    plain = TwoPhaseAdamW([{**group, "params": list(group["params"])} for group in other.param_groups])
    with pytest.raises(ValueError, match="the state has folded multipliers, and this optimizer has none: load"):
        plain.load_state_dict(kept[1])
    with pytest.raises(ValueError, match="this optimizer has folded multipliers, and the state has none: load"):
        other.load_state_dict({key: value for key, value in kept[1].items() if key != "folded"})


def test_deepspeeds_own_clipping_is_refused() -> None:
    model = llama()
    optimizer = megamult.fold({}, model, megamult.LLAMA_RULES)
    engine = types.SimpleNamespace(gradient_clipping=lambda: 1.0, module=model, optimizer=optimizer)
    with pytest.raises(ValueError, match=r"gradient_clipping is 1\.0 .*: DeepSpeed would clip .*; set it to 0\.0"):
        megamult.attach(engine, optimizer)


def test_biases_are_trained_as_norms_are() -> None:
    model = llama(attention_bias=True, mlp_bias=True)
    megamult.fold({}, model, megamult.LLAMA_RULES)
    kinds = {name: spec.kind for name, _, spec in named_specs(model)}
    biases = [name for name in kinds if name.endswith("bias")]
    assert len(biases) == 14 and all(kinds[name] == "undecayed" for name in biases)


def test_parameters_emptied_by_zero_3_get_the_layouts_of_whole_ones() -> None:
    whole, emptied = llama(), llama()
    for parameter in emptied.parameters():
        parameter.ds_shape = parameter.shape
        parameter.data = torch.empty(0)
    for model in (whole, emptied):
        megamult.fold({}, model, megamult.LLAMA_RULES)
    assert [each[2] for each in named_specs(emptied)] == [each[2] for each in named_specs(whole)]


def test_a_tied_embedding_is_trained_where_placement_leaves_it_out() -> None:
    model = llama(tie_word_embeddings=True)
    assert model.lm_head.weight is model.model.embed_tokens.weight
    sides = {role: ["row", "col"] for role in ROLES.values() if role != "embedding"}
    optimizer = megamult.fold({}, model, megamult.LLAMA_RULES, placement=sides)
    before = model.lm_head.weight.detach().clone()
    text = batch(0)
    model(input_ids=text, labels=text).loss.backward()
    optimizer.step()
    assert spec_of(model.lm_head.weight).kind == "embedding"
    assert not torch.equal(model.lm_head.weight, before)


def test_a_rule_may_be_a_layout_or_make_one_and_a_stated_layout_needs_none() -> None:
    model = torch.nn.Module()
    heads, groups, dim, hidden = 4, 2, 3, 8
    model.fused = torch.nn.Linear(hidden, (heads + 2 * groups) * dim)
    model.mlp = torch.nn.Linear(hidden, 12, bias=False)
    model.own = torch.nn.Linear(12, hidden, bias=False)
    model.positions = torch.nn.Embedding(16, hidden)
    down = megatron.single_matrix("down", hidden, 12, None)
    set_spec(model.own.weight, down)
    rules: dict[str, Any] = {
        r"fused\.weight$": megatron.fused_qkv(heads, groups, dim, hidden),
        r"^mlp": lambda parameter: megatron.fused_gate_up(parameter.shape[0] // 2, hidden),
        "positions": "norm",
    }
    megamult.fold({"name": "muon"}, model, rules)
    stated = {name: each for name, _, each in named_specs(model)}
    assert stated["fused.weight"] == megatron.fused_qkv(heads, groups, dim, hidden)
    assert stated["mlp.weight"] == megatron.fused_gate_up(6, hidden)
    assert stated["own.weight"] == down
    assert (stated["fused.bias"].kind, stated["positions.weight"].kind) == ("undecayed", "undecayed")
    megamult.fold({"name": "muon"}, model, {})  # all is stated now


def test_a_vector_is_sharded_and_partial_as_megatron_says() -> None:
    model = torch.nn.Module()
    model.up = torch.nn.Linear(8, 6)
    model.norm = torch.nn.RMSNorm(8)
    model.up.bias.tensor_model_parallel, model.up.bias.partition_dim, model.up.bias.partition_stride = True, 0, 2
    model.norm.weight.sequence_parallel = True
    megamult.fold({}, model, {r"up\.weight": "up"}, placement={"up": "row"})
    stated = {name: each for name, _, each in named_specs(model)}
    (sharding,) = stated["up.bias"].shardings
    assert (sharding.axis, sharding.dim, len(sharding.blocks)) == ("tensor", 0, 2)
    assert (stated["norm.weight"].shardings, stated["norm.weight"].reduce_over) == ((), ("tensor",))


def frozen(part: str) -> Callable[[Any], None]:
    """Return a function that freezes the parameters of a model whose names contain `part`."""

    def freeze(model: Any) -> None:
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(part not in name)

    return freeze


def untouched(model: Any) -> None:
    pass


def without(key: str) -> dict[str, Any]:
    return {rule: role for rule, role in megamult.LLAMA_RULES.items() if key not in rule}


@pytest.mark.parametrize(
    ("prepare", "rules", "settings", "says"),
    [
        (untouched, {**megamult.LLAMA_RULES, "query": "q"}, {}, "rule 'query' matches no parameter"),
        (
            untouched,
            {**megamult.LLAMA_RULES, r"layers\.1.*q_proj": "q"},
            {},
            r"layers\.1\.self_attn\.q_proj\.weight is claimed by two rules, .*q_proj.*layers",
        ),
        (
            untouched,
            without("up_proj"),
            {},
            r"layers\.0\.mlp\.up_proj\.weight has the shape \(56, 32\), and no rule names it",
        ),
        (
            frozen("down_proj"),
            megamult.LLAMA_RULES,
            {"placement": {"q": "row", "down": "row"}},
            r"multipliers to down, and all parameters of this role are frozen: set requires_grad to True, or leave it",
        ),
        (
            frozen("down_proj"),
            without("q_proj") | {"q_proj": "k"},
            {"placement": {"q": "row", "v": "row", "down": "row", "head": "row"}},
            r"multipliers to q, and no parameter has this role: add a rule for it, or leave it out of placement; "
            "placement gives multipliers to down, and all parameters of this role are frozen",
        ),
        (frozen(""), megamult.LLAMA_RULES, {}, r"multipliers to q, k, .* and all parameters of these roles are frozen"),
        (
            frozen(""),
            without("gate_proj"),
            {},
            r"^placement gives multipliers to (?!.*gate).* are frozen: set requires_grad to True, or give a mapping",
        ),
        (untouched, {**without("up_proj"), "up_proj": "upper"}, {}, r"up_proj\.weight gives the role 'upper'"),
        (untouched, {**without("embed"), "embed(": "embedding"}, {}, "rule 'embed.' is no regular expression"),
        (untouched, {**megamult.LLAMA_RULES, r"^model\.norm": "q"}, {}, r"model\.norm\.weight has the shape \(32,\)"),
        (
            untouched,
            {**without("up_proj"), "up_proj": megatron.single_matrix("up", 57, 32, None)},
            {},
            r"mlp\.up_proj\.weight has the shape \(56, 32\), and its spec .* \(57, 32\)",
        ),
        (
            untouched,
            {
                **without("norm"),
                r"^model\.norm": specs.row_multiplier(megatron.single_matrix("q", 32, 8, 0), [0], False),
            },
            {},
            r"model\.norm\.weight is a multiplier: fold needs a model without multipliers; build one",
        ),
        (untouched, megamult.LLAMA_RULES, {"placement": "most"}, "placement is 'most'"),
        (untouched, megamult.LLAMA_RULES, {"placement": {}}, "multipliers to no role"),
        (
            untouched,
            {".*": "norm"},
            {"placement": {"up": "row"}},
            "multipliers to up, and no parameter has this role: add a rule for it",
        ),
        (
            untouched,
            {".*": "norm"},
            {},
            "multipliers to q, .* no parameter has these roles: add rules for them, or give a mapping",
        ),
        (untouched, megamult.LLAMA_RULES, {"multiplier_lr": -1.0}, "multipliers.lr is -1.0"),
        (untouched, megamult.LLAMA_RULES, {"initial": float("nan")}, "initial gives q .* the value nan: it must be"),
    ],
)
def test_a_mistake_is_an_error_that_names_it(
    prepare: Callable[[Any], None], rules: Mapping[str, Any], settings: dict[str, Any], says: str
) -> None:
    model = llama()
    prepare(model)
    with pytest.raises(ValueError, match=says):
        megamult.fold({}, model, rules, **settings)


@pytest.mark.parametrize(
    ("optimizer", "says"),
    [
        ({"name": "sgd"}, "optimizer.name is 'sgd': use one of adamw, muon"),
        ({"learning_rate": 1e-3}, "has no key 'learning_rate': use one of name, lr"),
        ({"lr": "1e-3"}, "optimizer.lr is '1e-3': give a number"),
        ({"lr": -1.0}, "optimizer.lr is -1.0"),
        ({"name": "muon", "muon": {"ns_dtype": "fp8"}}, "optimizer.muon.ns_dtype is 'fp8'"),
        ({"name": "muon", "muon": {"ns_dtypes": "fp8"}}, "optimizer.muon has no key 'ns_dtypes': use one of momentum,"),
        ({"name": "muon", "muon": {"section": "adamw"}}, "optimizer.muon has no key 'section': use one of momentum,"),
        ({"name": "muon", "muon": 0.9}, "optimizer.muon is 0.9: give a mapping of the section's keys"),
        ({"adamw": {"eps": "1"}}, "optimizer.adamw.eps is '1': give a number"),
        (
            {"muon": {"momentum": 0.9, "ns_steps": 5}},
            r"optimizer.name is 'adamw', which does not use optimizer.muon.momentum, optimizer.muon.ns_steps: remove "
            "them, or set optimizer.name to muon",
        ),
        (
            {"name": "muon", "momentum": 0.9, "betas": [0.9, 0.99]},
            "optimizer.momentum is optimizer.muon.momentum now, optimizer.betas is optimizer.adamw.betas now: use the",
        ),
        ({"warmup_steps": 10}, "optimizer.warmup_steps is 10: fold makes no schedule"),
        (OptimizerConfig(warmup_steps=10), "optimizer.warmup_steps is 10: fold makes no schedule"),
    ],
)
def test_an_unknown_setting_of_the_optimizer_is_an_error(optimizer: Any, says: str) -> None:
    with pytest.raises(ValueError, match=says):
        megamult.fold(optimizer, llama(), megamult.LLAMA_RULES)


@pytest.mark.parametrize("rules", [megamult.LLAMA_RULES, without("lm_head")])
def test_multipliers_on_an_embedding_that_is_the_head_are_an_error(rules: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=r"embed_tokens\.weight is shared .* lm_head\.weight \((head|no rule)\)"):
        megamult.fold({}, llama(tie_word_embeddings=True), rules)


def test_rules_give_biases_and_norms_of_heads_roles_of_their_own() -> None:
    for model, rules, expected in (
        (published("Qwen2"), megamult.QWEN2_RULES, {"bias": 6, "norm": 5}),
        (published("Qwen3", attention_bias=True), megamult.QWEN3_RULES, {"q_norm": 2, "k_norm": 2, "norm": 5 + 8}),
    ):
        megamult.fold({"lr_factors": {"norm": 0.5}}, model, rules)
        roles = [spec.parts[0].role for _, _, spec in named_specs(model) if len(spec.shape) == 1]
        assert {role: roles.count(role) for role in roles} == expected


def test_a_frozen_parameter_without_multipliers_is_left_alone() -> None:
    model = llama()
    model.lm_head.weight.requires_grad_(False)
    optimizer = megamult.fold({}, model, megamult.LLAMA_RULES)
    assert model.lm_head.weight not in {p for group in optimizer.param_groups for p in group["params"]}


def test_an_error_leaves_the_model_as_it_was() -> None:
    model = llama()
    with pytest.raises(ValueError, match="no rule names it"):
        megamult.fold({}, model, without("lm_head"))
    assert not any(has_spec(parameter) for parameter in model.parameters())


@pytest.mark.parametrize("tensor", [1, 2])
def test_megatron_rules_state_the_layouts_of_our_own_gpt(tensor: int) -> None:
    for by_rules, own in run_distributed(tensor, fold_workers.layouts_of_both, tensor):
        assert by_rules == own
        assert all(isinstance(each, ParameterSpec) for each in own.values())
        assert len(own) == 15 + 2 * 6, "and in each layer four biases and the norms of queries and keys"


@pytest.mark.parametrize(
    ("style", "positions"), [(GPT2_LIKE, "learned_absolute"), (GATED_WITH_BIAS, "rope")], ids=["gpt2", "gated"]
)
def test_a_folded_megatron_model_trains_the_same_at_any_tensor_parallel_size(
    style: dict[str, Any], positions: str
) -> None:
    """With biases, norms of queries and keys, and initial values that are not 1."""
    ((expected, multipliers),) = run_distributed(1, _train, 1, style, positions)
    assert expected[-1] < expected[0] - 0.5
    for losses, values in run_distributed(2, _train, 2, style, positions):
        # fp32 sums in another order, 2^-24 each, amplified by AdamW where gradients are small, down to eps 1e-4.
        assert losses == pytest.approx(expected, rel=1e-5)
        assert torch.linalg.vector_norm(values - multipliers) < 1e-5 * torch.linalg.vector_norm(multipliers)


def test_the_bias_of_fused_rows_is_fused_as_they_are() -> None:
    from megatron.core.transformer import TransformerConfig

    rules = megamult.megatron_rules(TransformerConfig(**fold_workers.SIZES, **GATED_WITH_BIAS), fold_workers.VOCAB)
    for module in ("linear_qkv", "linear_fc1"):
        weight, bias = rules[rf"\b{module}\.weight$"], rules[rf"\b{module}\.bias$"]
        assert isinstance(weight, ParameterSpec) and isinstance(bias, ParameterSpec)
        assert (bias.kind, bias.local_shape(Grid(tensor=2))) == ("undecayed", weight.local_shape(Grid(tensor=2))[:1])
        assert bias.local_segments(tensor_shard(1, 2)) == weight.local_segments(tensor_shard(1, 2))


def _train(tensor: int, style: dict[str, Any], positions: str) -> tuple[list[float], Tensor]:
    return fold_workers.train(tensor, style, 8, position_embedding_type=positions)


def test_mistakes_with_megatron_models_are_errors_that_name_them() -> None:
    (said,) = run_distributed(1, fold_workers.errors, 1)
    assert "embedding.word_embeddings.weight (embedding), output_layer.weight (head)" in said["tied"]
    assert said["tied, embedding left out"] == ""
    assert "output_layer.weight (no rule)" in said["tied, no rules"]
    assert said["vocabulary"].startswith("vocab_size is 257, but the embedding of the model has only 256 rows")
    assert said["experts"].startswith("num_moe_experts is 2")


def test_the_bias_of_a_row_parallel_layer_is_replicated_and_partial_under_sequence_parallelism() -> None:
    weight = megatron.single_matrix("down", 6, 8, 1)
    assert megatron.bias_of(weight).reduce_over == ()
    bias = megatron.bias_of(weight, partial=True)
    assert (bias.shape, bias.shardings, bias.reduce_over) == ((6,), (), ("tensor",))
