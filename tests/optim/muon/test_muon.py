"""DistributedMuon against a float64 reference and torch.optim.Muon; outside DeepSpeed; its errors."""

from __future__ import annotations

import io
import math
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import Parameter

from megamult import DistributedMuon, param_groups
from megamult.multipliers import specs
from megamult.parameters import megatron, spec
from megamult.parameters.spec import ParameterSpec
from megamult.parameters.stated import set_spec
from tests.optim.muon.test_newton_schulz import reference as newton_schulz_reference
from tests.optim.muon.workers import exchange_figures, own_loop, routed, two_processes
from tests.optim.workers import StepCase
from tests.processes import run_distributed

SIMPLE = [(3.4445, -4.7750, 2.0315)] * 5
HEADS, GROUPS, HEAD, HIDDEN, FFN = 6, 2, 4, 20, 28
LAYOUTS = {
    "qkv": megatron.fused_qkv(HEADS, GROUPS, HEAD, HIDDEN),
    "gate_up": megatron.fused_gate_up(FFN, HIDDEN),
    "down": megatron.single_matrix("down", HIDDEN, FFN, 1),
    "norm": megatron.norm(HIDDEN, False),
}
MULTIPLIER = specs.row_multiplier(LAYOUTS["down"], [0], False)


class Small(torch.nn.Module):
    """Parameters of the given layouts."""

    def __init__(self, specs: dict[str, ParameterSpec]) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(3)
        for name, stated in specs.items():
            parameter = Parameter(torch.randn(stated.shape, generator=generator))
            set_spec(parameter, stated)
            self.register_parameter(name, parameter)


def gradients(step: int) -> dict[str, Tensor]:
    """Of every parameter of LAYOUTS, and of the multiplier of `down`."""
    generator = torch.Generator().manual_seed(100 + step)
    found = {name: torch.randn(stated.shape, generator=generator) for name, stated in LAYOUTS.items()}
    return found | {"row_multiplier": 50 * torch.randn(HIDDEN, generator=generator)}


def logical(name: str, fused: Tensor) -> dict[str, Tensor]:
    """The logical matrices of a fused parameter, row by row as Megatron fuses them."""
    if name == "qkv":
        per_group = (HEADS // GROUPS + 2) * HEAD
        groups = fused.view(GROUPS, per_group, HIDDEN)
        q = HEADS // GROUPS * HEAD
        return {
            "q": groups[:, :q].reshape(-1, HIDDEN),
            "k": groups[:, q : q + HEAD].reshape(-1, HIDDEN),
            "v": groups[:, q + HEAD :].reshape(-1, HIDDEN),
        }
    if name == "gate_up":
        return {"gate": fused[:FFN], "up": fused[FFN:]}
    return {"": fused}


def train(model: Small, steps: int, **settings: Any) -> DistributedMuon:
    optimizer = DistributedMuon(param_groups(model, lr=0.02, weight_decay=0.1), **settings)
    for step in range(steps):
        for name, parameter in model.named_parameters():
            parameter.grad = gradients(step)[name].to(parameter.dtype)
        optimizer.step()
    return optimizer


@pytest.mark.parametrize("scale", ["match_rms_adamw", "unit_rms_norm"])
@pytest.mark.parametrize("nesterov", [True, False])
@pytest.mark.parametrize("clip", [0.0, 1.0])
def test_steps_are_those_of_a_float64_singular_value_reference(scale: str, nesterov: bool, clip: float) -> None:
    model = Small(LAYOUTS | {"row_multiplier": MULTIPLIER})
    before = {name: p.detach().double().clone() for name, p in model.named_parameters()}
    steps, beta, lr, decay = 3, 0.9, 0.02, 0.1
    train(model, steps, scale=scale, nesterov=nesterov, clip_grad_norm=clip, momentum=beta)
    for name in ("qkv", "gate_up", "down"):
        actual, initial = logical(name, getattr(model, name).detach().double()), logical(name, before[name])
        for part, w in initial.items():
            expected, momentum = w.clone(), torch.zeros_like(w)
            for step in range(steps):
                every = gradients(step)
                norm = math.sqrt(sum(float(every[n].double().square().sum()) for n in LAYOUTS))  # no multiplier in it
                g = logical(name, every[name].double())[part] * (min(1.0, clip / norm) if clip else 1.0)
                momentum = beta * momentum + (1 - beta) * g
                direction = newton_schulz_reference(beta * momentum + (1 - beta) * g if nesterov else momentum, SIMPLE)
                out, into = w.shape
                size = 0.2 * math.sqrt(max(out, into)) if scale == "match_rms_adamw" else math.sqrt(out / into)
                expected = expected - lr * (decay * expected + size * direction)
            # fp32 amplified by Newton-Schulz (test_newton_schulz.py): 6e-5 of the update; and 2^-24 of weights of
            # about 1, which move by some 0.05 here: 1e-6 of the change.
            difference = torch.linalg.vector_norm(actual[part] - expected)
            assert difference < 1e-4 * torch.linalg.vector_norm(expected - w), (name, part)


def test_other_kinds_are_updated_by_adamw() -> None:
    ours, theirs = Small(LAYOUTS | {"row_multiplier": MULTIPLIER}), Small(LAYOUTS | {"row_multiplier": MULTIPLIER})
    train(ours, 3, clip_grad_norm=0.0, betas=(0.8, 0.9), eps=1e-3)
    reference = torch.optim.AdamW(
        [
            {"params": [theirs.norm], "weight_decay": 0.0},
            {"params": [theirs.row_multiplier], "weight_decay": 2e-3},
        ],
        lr=0.02,
        betas=(0.8, 0.9),
        eps=1e-3,
    )
    for step in range(3):
        theirs.norm.grad, theirs.row_multiplier.grad = gradients(step)["norm"], gradients(step)["row_multiplier"]
        reference.step()
    # A few fp32 roundings per step.
    torch.testing.assert_close(ours.norm, theirs.norm, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(ours.row_multiplier, theirs.row_multiplier, rtol=1e-6, atol=1e-6)


def test_momentum_scale_and_decay_are_those_of_torchs_muon() -> None:
    """torch.optim.Muon computes Newton-Schulz in bf16: so does ours here, in the same (standard) form or another."""
    names = ("down", "norm")
    ours, theirs = (Small({name: LAYOUTS[name] for name in names}) for _ in range(2))
    before = theirs.down.detach().clone()
    train(ours, 4, ns_dtype=torch.bfloat16, exchange_dtype=torch.float32, clip_grad_norm=0.0)
    reference = torch.optim.Muon([theirs.down], lr=0.02, weight_decay=0.1, adjust_lr_fn="match_rms_adamw")
    for step in range(4):
        theirs.down.grad = gradients(step)["down"].clone()
        reference.step()
    # bf16 rounds to 2^-9; ten products per step, whose errors are random and partly amplified: either is off by
    # some 2 % of a float64 update. A wrong momentum, decay or scale is off by 5 % to 500 %.
    change = torch.linalg.vector_norm(theirs.down - before)
    assert torch.linalg.vector_norm(ours.down - theirs.down) < 0.04 * change


def test_fused_q_k_v_are_updated_as_three_separate_parameters() -> None:
    rows = {"q": HEADS * HEAD, "k": GROUPS * HEAD, "v": GROUPS * HEAD}
    stated = {"q": "q", "k": "k", "v": "v"}
    fused = Small({"qkv": LAYOUTS["qkv"]})
    apart = Small({n: megatron.single_matrix(stated[n], rows[n], HIDDEN, None) for n in rows})  # type: ignore[arg-type]
    for name, part in logical("qkv", fused.qkv.detach()).items():
        getattr(apart, name).data.copy_(part)
    optimizers = [
        DistributedMuon(param_groups(m, lr=0.02, weight_decay=0.1), clip_grad_norm=0.0) for m in (fused, apart)
    ]
    for step in range(3):
        fused.qkv.grad = gradients(step)["qkv"]
        for name, part in logical("qkv", gradients(step)["qkv"]).items():
            getattr(apart, name).grad = part.clone()
        for optimizer in optimizers:
            optimizer.step()
    for name, part in logical("qkv", fused.qkv.detach()).items():
        assert torch.equal(part, getattr(apart, name)), name


@pytest.mark.parametrize("bucket_elements", [1, 500, 2**25])
def test_buckets_do_not_change_the_result(bucket_elements: int) -> None:
    expected, actual = Small(LAYOUTS), Small(LAYOUTS)
    train(expected, 2)
    optimizer = train(actual, 2, bucket_elements=bucket_elements)
    assert optimizer.plan is not None and len(optimizer.plan.buckets) == {1: 6, 500: 5, 2**25: 1}[bucket_elements]
    for p, q in zip(actual.parameters(), expected.parameters(), strict=True):
        # Other batches of the same matrices: another kernel may round otherwise, amplified by up to 484.
        torch.testing.assert_close(p, q, rtol=0, atol=1e-5)


def test_a_zero_gradient_decays_and_does_nothing_else() -> None:
    model = Small({"down": LAYOUTS["down"]})
    before = model.down.detach().clone()
    model.down.grad = torch.zeros_like(model.down)
    DistributedMuon(param_groups(model, lr=0.02, weight_decay=0.1)).step()
    torch.testing.assert_close(model.down.detach(), before * (1 - 0.02 * 0.1), rtol=1e-6, atol=0)


def test_a_bad_gradient_leaves_weights_and_momentum_alone() -> None:
    model = Small(LAYOUTS)
    optimizer = train(model, 1)

    def values() -> list[Tensor]:
        states = [value for state in optimizer.state.values() for value in state.values()]
        return [t.clone() for t in (*model.parameters(), *states) if isinstance(t, Tensor)]

    before = values()
    for name, parameter in model.named_parameters():
        parameter.grad = gradients(1)[name]
    model.norm.grad[3] = float("inf")
    optimizer.step()
    assert optimizer.skipped_steps == 1
    assert all(torch.equal(a, b) for a, b in zip(values(), before, strict=True))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_saved_state_continues_bitwise(dtype: torch.dtype) -> None:
    settings: dict[str, Any] = {"exchange_dtype": torch.float32, "ns_dtype": torch.float32}
    first = Small(LAYOUTS | {"row_multiplier": MULTIPLIER}).to(dtype)
    saved = train(first, 2, **settings)
    second = Small(LAYOUTS | {"row_multiplier": MULTIPLIER}).to(dtype)
    second.load_state_dict(first.state_dict())
    resumed = DistributedMuon(param_groups(second, lr=0.02, weight_decay=0.1), **settings)
    buffer = io.BytesIO()
    torch.save(saved.state_dict(), buffer)
    buffer.seek(0)
    resumed.load_state_dict(torch.load(buffer))
    for model, optimizer in ((first, saved), (second, resumed)):
        for name, parameter in model.named_parameters():
            parameter.grad = gradients(2)[name].to(dtype)
        optimizer.step()
    for p, q in zip(first.parameters(), second.parameters(), strict=True):
        assert torch.equal(p, q)
        states = zip(saved.state[p].items(), resumed.state[q].items(), strict=True)
        assert all(
            key == other and torch.equal(torch.as_tensor(a), torch.as_tensor(b)) for (key, a), (other, b) in states
        )
        assert all(s["momentum_buffer"].dtype == torch.float32 for s in (resumed.state[q],) if "momentum_buffer" in s)


def test_each_group_of_matrices_has_its_own_rate() -> None:
    both, halves = Small(LAYOUTS), Small(LAYOUTS)
    before = both.down.detach().clone()
    train(both, 1)
    groups = param_groups(halves, lr=0.02, weight_decay=0.1)
    matrices = next(group for group in groups if group["kind"] == "matrix")
    last = {**matrices, "params": matrices["params"][-1:], "lr": 0.002}
    matrices["params"] = matrices["params"][:-1]
    optimizer = DistributedMuon([*groups, last])
    for name, parameter in halves.named_parameters():
        parameter.grad = gradients(0)[name]
    optimizer.step()
    assert torch.equal(halves.qkv, both.qkv) and torch.equal(halves.gate_up, both.gate_up)
    # A tenth of the rate makes a tenth of the change, both in decay and update; weights of 1 round to 2^-24.
    torch.testing.assert_close(halves.down - before, 0.1 * (both.down - before), rtol=1e-4, atol=1e-6)


def test_gradients_may_be_where_megatrons_ddp_leaves_them() -> None:
    expected, actual = Small(LAYOUTS), Small(LAYOUTS)
    train(expected, 2)
    optimizer = DistributedMuon(param_groups(actual, lr=0.02, weight_decay=0.1))
    for step in range(2):
        for name, parameter in actual.named_parameters():
            parameter.main_grad = gradients(step)[name]
        optimizer.step()
        assert all(parameter.grad is None for parameter in actual.parameters()), "Megatron's hooks would add it again"
    for p, q in zip(actual.parameters(), expected.parameters(), strict=True):
        assert torch.equal(p, q)


def test_a_step_without_any_gradient_is_an_error() -> None:
    with pytest.raises(RuntimeError, match="none of the 4 parameters has a gradient: call backward"):
        DistributedMuon(param_groups(Small(LAYOUTS), lr=0.02, weight_decay=0.1)).step()


def test_a_closure_is_called_with_gradients_enabled() -> None:
    model = Small({"down": LAYOUTS["down"]})
    optimizer = DistributedMuon(param_groups(model, lr=0.02, weight_decay=0.1))

    def closure() -> float:
        loss = model.down.square().sum()
        loss.backward()
        return float(loss)

    before = float(model.down.detach().square().sum())
    assert optimizer.step(closure) == before
    assert float(model.down.detach().square().sum()) < before


def test_gradients_that_a_scaler_scaled_are_unscaled_by_it() -> None:
    """An optimizer that says it scales itself would be given them as they are."""
    assert not getattr(
        DistributedMuon(param_groups(Small(LAYOUTS), lr=1.0, weight_decay=0.0)), "_step_supports_amp_scaling", False
    )


def test_a_matrix_that_tensor_parallel_ranks_replicate_is_updated_once_for_all() -> None:
    stages = [None, 0, 1, 2, 3]
    ((expected,),) = run_distributed(1, routed, 1, [None])
    found = run_distributed(4, routed, 2, stages)[0]
    for stage, actual in zip(stages, found, strict=True):
        for name, value in expected.items():
            # As below: roundings of the sums, amplified by up to 484 in each of three updates of 2e-2 per element, on
            # weights of 1.
            difference = torch.linalg.vector_norm(actual[name] - value)
            assert difference <= 1e-5 * torch.linalg.vector_norm(value), (stage, name)


FIGURES = [StepCase(world=2, zero=stage, optimizer="muon") for stage in range(4)] + [
    StepCase(world=2, tensor=2, zero=stage, optimizer="muon") for stage in (0, 1, 3)
]


@pytest.fixture(scope="module")
def two() -> list[dict[str, Any]]:
    return run_distributed(2, two_processes, FIGURES)


@pytest.mark.parametrize("tensor", [1, 2])
def test_a_loop_without_deepspeed_trains_the_same_on_two_processes(two: list[dict[str, Any]], tensor: int) -> None:
    (expected,) = run_distributed(1, own_loop, 1)
    actual = two[0][f"own loop, TP {tensor}"]
    assert list(actual) == list(expected)
    for name, value in expected.items():
        # Sums in another order, 1e-7, amplified by up to 484 in each of three updates; AdamW divides the rounding of a
        # small gradient by its size. An update has the size 1e-2 x 0.2 = 2e-3 per element, weights 2e-2.
        assert torch.linalg.vector_norm(actual[name] - value) <= 1e-4 * torch.linalg.vector_norm(value), name


@pytest.mark.parametrize("case", FIGURES, ids=lambda case: f"tp{case.tensor}-zero{case.zero}")
def test_bytes_sent_are_those_of_the_plan(two: list[dict[str, Any]], case: StepCase) -> None:
    figures = [rank["figures"][FIGURES.index(case)] for rank in two]
    data = 2 // case.tensor
    for rank in figures:
        gathered = 0
        if case.zero == 0 and data == 2:  # and what the all-gather sends: half of every matrix, twice
            gathered = 2 * 4 * rank["matrices"] // 2
        assert rank["sent"] == rank["planned"] + gathered
    # Both exchanges: at most 2 x itemsize x (matrix elements / ranks), in each of two steps; and nothing is sent twice.
    assert sum(rank["planned"] for rank in figures) / 2 <= 2 * (2 * 4 * figures[0]["matrices"] / 2)


@pytest.mark.parametrize("case", FIGURES, ids=lambda case: f"tp{case.tensor}-zero{case.zero}")
def test_momentum_is_fp32_kept_once_and_no_adam_state_beside_it(two: list[dict[str, Any]], case: StepCase) -> None:
    figures = [rank["figures"][FIGURES.index(case)] for rank in two]
    keys = {"momentum_buffer", "momentum_interval"} if case.zero == 0 else {"momentum_buffer"}
    assert all(rank["dtypes"] == {torch.float32} and rank["keys"] == keys for rank in figures)
    kept, matrices = sum(rank["momentum"] for rank in figures), figures[0]["matrices"]
    # Flat partitions are padded to a multiple of the ranks (and of DeepSpeed's alignment).
    assert matrices <= kept <= matrices + 64


@pytest.mark.parametrize("case", FIGURES, ids=lambda case: f"tp{case.tensor}-zero{case.zero}")
def test_deepspeed_reports_the_norm_of_the_gradients_and_not_of_the_updates(
    two: list[dict[str, Any]], case: StepCase
) -> None:
    for rank in two:
        ours, theirs = rank["figures"][FIGURES.index(case)]["norms"]
        assert theirs is None or theirs == ours
        assert case.zero != 3 or theirs is not None


def test_where_nothing_is_said_muon_computes_and_exchanges_in_the_models_dtype(two: list[dict[str, Any]]) -> None:
    dtypes = {"fp32": torch.float32, "bf16": torch.bfloat16}
    for rank in two:
        assert rank["automatic dtypes"] == {(stage, name): {dtypes[name]} for stage in range(4) for name in dtypes}


def test_the_start_up_check_sees_a_wrong_map_even_where_all_values_are_alike(two: list[dict[str, Any]]) -> None:
    for rank in two:
        for case, message in rank["wrong maps"].items():
            assert "DeepSpeed 0." in message and "constraints.txt" in message, case


def test_one_process_sends_nothing() -> None:
    ((figures,),) = run_distributed(1, exchange_figures, [StepCase(zero=1, optimizer="muon")])
    assert figures["sent"] == figures["planned"] == 0


def _groups(model: torch.nn.Module) -> list[dict[str, Any]]:
    return param_groups(model, lr=0.1, weight_decay=0.0)


def _bare() -> tuple[list[dict[str, Any]], dict[str, Any]]:
    return [{"params": [Parameter(torch.zeros(3, 4))], "kind": "matrix", "lr": 0.1}], {}


def _unknown_kind() -> tuple[list[dict[str, Any]], dict[str, Any]]:
    return [{"params": list(Small({"down": LAYOUTS["down"]}).parameters()), "lr": 0.1}], {}


def _other_kind() -> tuple[list[dict[str, Any]], dict[str, Any]]:
    return [{"params": list(Small({"norm": LAYOUTS["norm"]}).parameters()), "kind": "matrix", "lr": 0.1}], {}


def _other_shape() -> tuple[list[dict[str, Any]], dict[str, Any]]:
    model = Small(LAYOUTS)
    model.down.data = model.down.data[: HIDDEN // 2]
    return _groups(model), {"model": model}


def _padded() -> tuple[list[dict[str, Any]], dict[str, Any]]:
    stated = ParameterSpec((spec.Part("", "down", (7, 3)),), (8, 3), (spec.Segment(0, 0, 0, 7),), orthogonalize=True)
    return _groups(Small({"w": stated})), {}


def _vector() -> tuple[list[dict[str, Any]], dict[str, Any]]:
    stated = ParameterSpec((spec.Part("", "down", (7,)),), (7,), (spec.Segment(0, 0, 0, 7),), orthogonalize=True)
    return [{"params": list(Small({"w": stated}).parameters()), "kind": "matrix", "lr": 0.1}], {}


def _missing() -> tuple[list[dict[str, Any]], dict[str, Any]]:
    model = Small(LAYOUTS)
    groups = _groups(model)
    groups[0]["params"] = groups[0]["params"][:-1]
    return groups, {"model": model}


def _mixed() -> tuple[list[dict[str, Any]], dict[str, Any]]:
    model = Small(LAYOUTS)
    model.gate_up.data = model.gate_up.data.bfloat16()
    return _groups(model), {"model": model}


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (_bare, ["param_groups[0]['params'][0]", "(3, 4)", "has no spec", "set_spec"]),
        (_unknown_kind, ["param_groups[0]", "None", "megamult.param_groups"]),
        (_other_kind, ["kind undecayed", "kind matrix", "move it"]),
        (_vector, ["orthogonalized", "(7,)", "two dimensions"]),
        (_missing, ["down", "in no group", "never be trained", "requires_grad"]),
        (_mixed, ["gate_up", "torch.bfloat16", "torch.float32", "two groups"]),
        (_other_shape, ["down", "(10, 28)", "(20, 28)", "correct its spec"]),
        (_padded, ["7 of its 8 rows", "add a part"]),
        (lambda: (_groups(Small(LAYOUTS)), {"ns_dtype": torch.int32}), ["ns_dtype is torch.int32", "torch.bfloat16"]),
        (lambda: (_groups(Small(LAYOUTS)), {"exchange_dtype": torch.float16}), ["exchange_dtype is torch.float16"]),
        (lambda: (_groups(Small(LAYOUTS)), {"momentum": 1.0}), ["momentum is 1.0", "[0, 1)"]),
        (lambda: (_groups(Small(LAYOUTS)), {"coefficients": "x"}), ["'x'", "polar_express"]),
        (lambda: (_groups(Small(LAYOUTS)), {"scale": "x"}), ["'x'", "spectral"]),
    ],
    ids=[
        "no spec",
        "no kind",
        "other kind",
        "vector",
        "missing",
        "mixed dtypes",
        "other shape",
        "padded",
        "ns_dtype",
        "exchange_dtype",
        "momentum",
        "coefficients",
        "scale",
    ],
)
def test_a_mistake_is_an_error_at_construction(make, said: list[str]) -> None:
    with pytest.raises(ValueError) as error:
        groups, settings = make()
        DistributedMuon(groups, **settings)
    assert all(words in str(error.value) for words in said), error.value


def test_a_deepspeed_class_that_we_do_not_know_is_refused_with_its_version() -> None:
    from types import SimpleNamespace

    from megamult.zero.attach import attach

    model = Small(LAYOUTS)
    engine = SimpleNamespace(module=model, optimizer=object())
    with pytest.raises(ValueError, match=r"DeepSpeed 0\.\d+.* wraps the optimizer in object.*Zero"):
        attach(engine, DistributedMuon(_groups(model)))
