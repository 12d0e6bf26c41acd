"""What the processes of test_two_phase.py do: train a small GPT, with one step whose gradient is not finite."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from megamult.config import Config
from megamult.distributed.mesh import current_mesh
from megamult.optim.config import OptimizerConfig
from tests.invariance import Case
from tests.small import VOCAB

BATCH = 16
THRESHOLD = 0.25  # below the first norms of both kinds, so that clipping happens


@dataclass(frozen=True)
class StepCase(Case):
    """A run of one layer without warm-up, and how its second step's gradient goes bad (on the last rank)."""

    poison: str = "objective"
    """objective: its loss is NaN; gradient: one element of one reduced gradient that this rank holds is infinite."""

    def config(self) -> Config:
        """The configuration."""
        config = super().config()
        config.model = replace(config.model, num_layers=1)
        config.optimizer = OptimizerConfig(name=self.optimizer, lr=1e-2, clip_grad_norm=THRESHOLD)  # type: ignore[arg-type]
        return config


def _batch(step: int, config: Config) -> tuple[Tensor, Tensor]:
    """This data-parallel rank's rows of the global batch of `step`."""
    from megamult.distributed.mesh import current_mesh

    text = torch.randint(0, VOCAB, (BATCH, config.model.seq_length + 1), generator=torch.Generator().manual_seed(step))
    size, rank = config.train.micro_batch_size, current_mesh().groups["data"].rank()
    rows = text[rank * size : (rank + 1) * size]
    return rows[:, :-1].contiguous(), rows[:, 1:].contiguous()


def _step(engine: Any, config: Config, batch: int, poison: str | None = None) -> None:
    objective, _ = engine.deepspeed(*_batch(batch, config))
    last_rank = torch.distributed.get_rank() == torch.distributed.get_world_size() - 1
    if poison == "objective" and last_rank:
        objective = objective * float("nan")
    engine.deepspeed.backward(objective)
    if poison == "gradient" and last_rank:
        pieces = zip(engine.partition.slices, engine.partition.gradients(), strict=True)
        next(g for piece, g in pieces if piece.spec.dim_over("tensor") is not None)[-1] = float("inf")
    engine.deepspeed.step()


def _values(engine: Any) -> list[Tensor]:
    return [t.clone() for piece in engine.partition.slices for t in (piece.master, piece.source)]


def adam_counts(optimizer: Any) -> set[float]:
    """The step counts in AdamW's state."""
    return {float(state["step"]) for state in optimizer.state.values() if "step" in state}


def _same(a: list[Tensor], b: list[Tensor]) -> bool:
    return all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


def run_case(case: StepCase) -> dict[str, Any]:
    """Steps on batch 0, a bad one, batch 1; and, in a second engine, batch 0 and batch 1 alone."""
    from megamult.distributed import start
    from megamult.train.deepspeed_engine import build

    config = case.config()
    mesh = start.initialize(case.tensor)
    result: dict[str, Any] = {}
    engine = build(config, VOCAB, mesh)
    fresh = _values(engine)
    result["counts when fresh"] = adam_counts(engine.optimizer)
    _step(engine, config, 0)
    result["norms"] = engine.optimizer.norms
    result["counts after one step"] = adam_counts(engine.optimizer)
    before = _values(engine)
    result["moved"] = not _same(fresh, before)
    _step(engine, config, 7, case.poison)
    result["unchanged"] = _same(before, _values(engine))
    result["bad norms finite"] = engine.optimizer.norms.finite
    result["skipped"] = engine.optimizer.skipped_steps
    result["counts after the bad step"] = adam_counts(engine.optimizer)
    _step(engine, config, 1)
    result["counts at the end"] = adam_counts(engine.optimizer)
    result["skipped at the end"] = engine.optimizer.skipped_steps
    with_bad_step = _values(engine)
    engine.deepspeed.destroy()
    engine = build(config, VOCAB, mesh)
    result["fresh again"] = _same(fresh, _values(engine))
    _step(engine, config, 0)
    _step(engine, config, 1)
    result["as if it had not been"] = _same(with_bad_step, _values(engine))
    engine.deepspeed.destroy()
    return result


def run_cases(cases: list[StepCase]) -> list[dict[str, Any]]:
    """All of them in one launch."""
    return [run_case(case) for case in cases]


def one_process(cases: list[StepCase]) -> dict[str, Any]:
    """References, and what needs one process alone."""
    from megamult.distributed import start

    results = {"cases": run_cases(cases)}
    start.initialize(1)
    results["autograd norms"] = autograd_norms()
    results["unfused"] = unfused_start()
    results["against torch"] = {clip: against_torch(clip) for clip in (False, True, "joint")}
    results["unprepared"] = unprepared()
    return results


def autograd_norms() -> tuple[float, float]:
    """Norms of the gradient of batch 0 (all but multipliers, multipliers) from autograd alone."""
    from megamult.parameters.stated import named_specs
    from megamult.train.model import build_model

    config = StepCase().config()
    model = build_model(config, VOCAB, config.train.seed)
    model(*_batch(0, config))[0].backward()
    squares = [0.0, 0.0]
    for _, parameter, spec in named_specs(model):
        assert parameter.grad is not None
        squares[spec.kind == "multiplier"] += float(parameter.grad.double().square().sum())
    return squares[0] ** 0.5, squares[1] ** 0.5


def unfused_start() -> dict[str, Any]:
    """ZeRO 0 in bf16: masters of a fresh engine against the initial weights, drawn once more."""
    from megamult.distributed import start
    from megamult.train.deepspeed_engine import build
    from megamult.train.model import build_model

    config = StepCase(dtype="bf16").config()
    engine = build(config, VOCAB, start.initialize(1))
    initial = dict(build_model(config, VOCAB, config.train.seed).named_parameters())
    equal = [
        torch.equal(piece.master, initial[piece.name].detach().float().view(-1)) for piece in engine.partition.slices
    ]
    kind = type(engine.deepspeed.optimizer).__name__
    engine.deepspeed.destroy()
    return {"class": kind, "masters": len(equal), "equal": all(equal), "parameters": len(initial)}


class Small(torch.nn.Module):
    """One parameter of each kind."""

    def __init__(self) -> None:
        from megamult.multipliers import specs
        from megamult.parameters import megatron
        from megamult.parameters.stated import set_spec

        super().__init__()
        generator = torch.Generator().manual_seed(3)
        weight = megatron.single_matrix("down", 6, 5, None)
        for name, stated in {
            "matrix": weight,
            "embedding": megatron.vocabulary("embedding", 7, 8, 5),
            "head": megatron.vocabulary("head", 7, 8, 5),
            "norm": megatron.norm(5, False),
            "row_multiplier": specs.row_multiplier(weight, [0], False),
            "col_multiplier": specs.col_multiplier(weight, [0], False),
        }.items():
            parameter = torch.nn.Parameter(torch.randn(stated.shape, generator=generator))
            set_spec(parameter, stated)
            self.register_parameter(name, parameter)


def against_torch(clip_multipliers: Any) -> dict[str, float]:
    """Largest relative difference per parameter from torch's AdamW and clip_grad_norm_ after five steps."""
    from megamult import param_groups
    from megamult.optim.two_phase_adamw import TwoPhaseAdamW
    from megamult.parameters.stated import names_of
    from megamult.zero.whole import WholePartition

    ours, theirs = Small(), Small()
    settings: dict[str, Any] = {"lr": 0.02, "weight_decay": 0.1}
    multiplier: dict[str, Any] = {"lr": 0.05, "weight_decay": 2e-3}
    optimizer = TwoPhaseAdamW(
        param_groups(ours, **settings, multiplier_lr=0.05),
        betas=(0.8, 0.9),
        eps=1e-3,  # large beside some gradients: scaling them then shows in the update
        clip_grad_norm=0.5,
        clip_multipliers=clip_multipliers,
    )
    partition = WholePartition(optimizer.param_groups, names_of(ours), current_mesh())
    multipliers = [theirs.row_multiplier, theirs.col_multiplier]
    others = [theirs.matrix, theirs.embedding, theirs.head, theirs.norm]
    reference = torch.optim.AdamW(
        [
            {"params": others[:3], **settings},
            {"params": others[3:], **settings | {"weight_decay": 0.0}},
            {"params": multipliers, **multiplier},
        ],
        betas=(0.8, 0.9),
        eps=1e-3,
    )
    generator = torch.Generator().manual_seed(4)
    for size in (1.0, 1e-3, 3.0, 1e-2, 0.3):  # some gradients above the threshold, some below
        for p, q in zip(ours.parameters(), theirs.parameters(), strict=True):
            p.grad = size * torch.randn(p.shape, generator=generator)
            q.grad = p.grad.clone()
        if clip_multipliers == "joint":
            torch.nn.utils.clip_grad_norm_(others + multipliers, 0.5)
        else:
            torch.nn.utils.clip_grad_norm_(others, 0.5)
        if clip_multipliers is True:
            torch.nn.utils.clip_grad_norm_(multipliers, 0.5)
        reference.step()
        optimizer.prepare(partition)
        optimizer.step()
        optimizer.finish()
    names = [name for name, _ in ours.named_parameters()]
    pairs = zip(names, ours.parameters(), theirs.parameters(), strict=True)
    return {name: float((p - q).norm() / q.norm()) for name, p, q in pairs}


def unprepared() -> str:
    """The message of a step that nothing prepared, after one that was."""
    from megamult import param_groups
    from megamult.optim.two_phase_adamw import TwoPhaseAdamW
    from megamult.parameters.stated import names_of
    from megamult.zero.whole import WholePartition

    model = Small()
    optimizer = TwoPhaseAdamW(param_groups(model, lr=0.1, weight_decay=0.0))
    partition = WholePartition(optimizer.param_groups, names_of(model), current_mesh())
    optimizer.bind(partition)
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    optimizer.prepare(partition)
    optimizer.step()
    optimizer.finish()
    try:
        optimizer.step()
    except RuntimeError as error:
        return str(error)
    return ""
