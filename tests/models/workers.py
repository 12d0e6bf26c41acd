"""What each rank runs for the tests of the model: loss and whole GPT at tensor parallel 1, 2 and 4 in one launch."""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
from torch import Tensor

from tests.small import SMALL

VOCAB, PADDED = 130, 256  # at tensor parallel 4 rank 2 holds two tokens and rank 3 padding alone
SEQ, BATCH = 6, 3
LOSS_CASES = {"plain": (torch.float32, 0.0), "far from zero": (torch.float32, 300.0), "bf16": (torch.bfloat16, 0.0)}
"""dtype of the logits, offset of all logits."""

MODEL = dataclasses.replace(SMALL, vocab_size=VOCAB, init_std=0.1)
SEED = 7


def loss_inputs(name: str) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """logits [seq, batch, padded], labels [seq, batch], and the weights of the two results in an objective."""
    generator = torch.Generator().manual_seed(3)
    dtype, offset = LOSS_CASES[name]
    logits = (3 * torch.randn(SEQ, BATCH, PADDED, generator=generator) + offset).to(dtype)
    logits[..., VOCAB:] += 1000  # padding must not count, however large its logits
    labels = torch.randint(0, VOCAB, (SEQ, BATCH), generator=generator)
    labels[0] = torch.tensor([0, VOCAB - 1, 127])  # the ends, and the last token before a shard's boundary
    weights = torch.randn(2, SEQ, BATCH, generator=generator)
    return logits, labels, weights[0], weights[1]


def losses(rank: int, tensor: int) -> dict[str, dict[str, Tensor]]:
    """Both results and the local gradient, by case."""
    from megamult.distributed.mesh import current_mesh
    from megamult.models.common.loss import VocabParallelCrossEntropy

    found = {}
    for name in LOSS_CASES:
        logits, labels, of_entropy, of_log_sum_exp = loss_inputs(name)
        local = logits.chunk(tensor, dim=-1)[rank].clone().requires_grad_()
        entropy, log_sum_exp = VocabParallelCrossEntropy.apply(local, labels, VOCAB, current_mesh().groups["tensor"])
        (of_entropy * entropy + of_log_sum_exp * log_sum_exp).sum().backward()
        untouched = torch.equal(local.detach(), logits.chunk(tensor, dim=-1)[rank])
        found[name] = {
            "entropy": entropy.detach(),
            "log_sum_exp": log_sum_exp.detach(),
            "grad": local.grad,
            "untouched": torch.tensor(untouched),
        }
    return found


TIED = dataclasses.replace(MODEL, tie_embeddings=True)
VARIANTS: dict[str, dict[str, Any]] = {
    "none": {"placement": {}},
    "all": {"placement": "all"},
    "scalar": {"placement": "scalar"},
    "all, tied": {"sizes": TIED},
    "none, tied": {"sizes": TIED, "placement": {}},
    "all, recomputed": {"recompute": True},
    "all, sequence parallel": {},
}


def gpt(tensor: int, variant: str, **changes: Any) -> torch.nn.Module:
    """The variant's model."""
    from megamult.models.llama.model import GPT

    sequence = "sequence" in variant and tensor > 1
    arguments = {"sizes": MODEL, "tensor_parallel": tensor, "sequence_parallel": sequence} | VARIANTS[variant]
    return GPT(vocab_size=VOCAB, seed=SEED, **(arguments | changes))


def models(tensor: int) -> dict[str, dict[str, Any]]:
    """Of each variant: initial local parameters with their layouts, both losses, and the local gradients."""
    from megamult.parameters.stated import named_specs

    generator = torch.Generator().manual_seed(5)
    tokens, labels = torch.randint(0, VOCAB, (2, BATCH, MODEL.seq_length), generator=generator)
    found = {}
    for variant in VARIANTS:
        model = gpt(tensor, variant)
        state = {name: (p.detach().clone(), spec) for name, p, spec in named_specs(model)}
        objective, entropy = model(tokens, labels)
        objective.backward()
        found[variant] = {
            "state": state,
            "objective": objective.detach(),
            "entropy": entropy,
            "grads": {name: p.grad.clone() for name, p in model.named_parameters()},
        }
    half = gpt(tensor, "all", dtype=torch.bfloat16)
    found["bf16"] = {
        "inv_freq": half.rotary_pos_emb.inv_freq,
        "dtypes": {p.dtype for p in half.parameters()},
    }
    found["refused"] = {
        "group": refusal(tensor, tensor_parallel=1 if tensor == 2 else 2),
        "sizes": refusal(tensor, sizes=dataclasses.replace(MODEL, ffn_hidden_size=61)),
        "placement": refusal(tensor, placement="some"),
    }
    return found


SYMMETRIES = {"q_k": ("q", "k"), "v_out": ("v", "attention_out"), "up_down": ("up", "down")}
"""Roles of the two matrices of which one pair of multipliers meets only as a product."""


def paired(role: str) -> list[int]:
    """Positions of one pair among a role's multipliers: one rotary pair of Q and K or one feature of V and the output
    projection, in all heads of the second group; one feature of the MLP."""
    heads, groups = MODEL.num_attention_heads, MODEL.query_groups
    dim, shared = MODEL.hidden_size // heads, heads // groups
    of_group = [1] if role in ("k", "v") else range(shared, 2 * shared)
    features = {"q": (1, 1 + dim // 2), "k": (1, 1 + dim // 2), "v": (3,), "attention_out": (3,)}
    return [head * dim + feature for head in of_group for feature in features[role]] if role in features else [5]


@torch.no_grad()
def symmetric_logits() -> dict[str, tuple[Tensor, Tensor]]:
    """By symmetry: logits in float64 with random multipliers, when one pair (a, b) of the last layer has become
    (3 a, b / 3), and when b is back at its old value. "none": without any change, twice."""
    from megamult.parameters.stated import named_specs

    generator = torch.Generator().manual_seed(5)
    tokens = torch.randint(0, VOCAB, (BATCH, MODEL.seq_length), generator=generator)
    model = gpt(1, "all").double()
    multipliers = [(name, parameter, spec) for name, parameter, spec in named_specs(model) if spec.side is not None]
    for _, parameter, _ in multipliers:
        parameter.copy_(torch.randn(parameter.shape, generator=generator, dtype=torch.float64).exp())
    saw: list[Tensor] = []
    model.output_layer.register_forward_hook(lambda module, inputs, output: saw.append(output[0].clone()))

    def scale(role: str, factor: float) -> None:
        side = "col" if role in ("attention_out", "down") else "row"
        for name, parameter, spec in multipliers:
            if f"layers.{MODEL.num_layers - 1}." in name and spec.side == side:
                for segment in spec.segments:
                    held = range(segment.part_start, segment.part_start + segment.length)
                    for position in paired(role) if spec.parts[segment.part].role == role else ():
                        if position in held:
                            parameter[segment.start + held.index(position)] *= factor

    def logits(*factors: tuple[str, float]) -> Tensor:
        for role, factor in factors:
            scale(role, factor)
        model(tokens, tokens)
        return saw[-1]

    found = {"none": (logits(), logits())}
    for symmetry, (a, b) in SYMMETRIES.items():
        found[symmetry] = logits((a, 3.0), (b, 1 / 3)), logits((b, 3.0))
        scale(a, 1 / 3)
    return found


def refusal(tensor: int, **changes: Any) -> str:
    """Why a model with these changes is not built; empty: it is."""
    try:
        gpt(tensor, "all", **changes)
    except ValueError as error:
        return str(error)
    return ""


def run_all() -> dict[int, dict[str, Any]]:
    """By tensor-parallel size; a rank beyond it leaves the size out."""
    from megamult.distributed import start

    results = {}
    for tensor in (1, 2, 4):
        start.initialize(tensor)
        rank = torch.distributed.get_rank()
        if rank < tensor:
            results[tensor] = {"loss": losses(rank, tensor), "gpt": models(tensor)}
            if tensor == 1:
                results[tensor]["symmetric"] = symmetric_logits()
    return results
