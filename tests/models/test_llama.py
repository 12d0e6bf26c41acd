"""One seed gives one model at every tensor-parallel size, and multipliers at 1 leave it as it is."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from megatron.core.transformer.enums import AttnMaskType
from torch import Tensor

from megamult.models.common.attention import SdpaAttention
from megamult.parameters.axes import tensor_shard
from tests.models.conftest import Ranks
from tests.models.workers import MODEL, PADDED, SYMMETRIES, VARIANTS, VOCAB

every_size = pytest.mark.parametrize("tensor", [1, 2, 4])


def gathered(states: list[dict[str, Any]]) -> dict[str, Tensor]:
    """Logical tensors by name from each rank's local ones; NaN where no rank holds an entry."""
    full: dict[str, Tensor] = {}
    size = len(states)
    for rank, state in enumerate(states):
        for name, (local, spec) in state.items():
            for index, part in enumerate(spec.parts):
                target = full.setdefault(spec.logical_name(name, part), torch.full(part.shape, math.nan))
                if local.dim() == 2:
                    first, columns = spec.local_cols(tensor_shard(rank, size))
                    target = target[:, first : first + columns]
                for run in spec.local_segments(tensor_shard(rank, size)):
                    if run.part == index:
                        held = local[run.start : run.start + run.length]
                        target[run.part_start : run.part_start + run.length] = held
    return full


@pytest.mark.parametrize("tensor", [2, 4])
@pytest.mark.parametrize("variant", ["all", "none", "scalar", "all, tied", "all, sequence parallel"])
def test_every_tensor_parallel_size_starts_from_the_same_model_bitwise(ranks: Ranks, tensor: int, variant: str) -> None:
    alone = gathered([outcome[variant]["state"] for outcome in ranks(1, "gpt")])
    spread = gathered([outcome[variant]["state"] for outcome in ranks(tensor, "gpt")])
    assert alone.keys() == spread.keys()
    assert all(torch.equal(alone[name], spread[name]) for name in alone)


def test_the_head_and_the_embedding_differ_unless_they_are_tied(ranks: Ranks) -> None:
    untied, tied = (gathered([ranks(1, "gpt")[0][variant]["state"]]) for variant in ("all", "all, tied"))
    assert not torch.equal(untied["embedding.word_embeddings.weight"], untied["output_layer.weight"])
    assert "output_layer.weight" not in tied


@every_size
def test_padded_rows_of_embedding_and_head_are_zero_and_get_no_gradient(ranks: Ranks, tensor: int) -> None:
    outcomes = [outcome["all"] for outcome in ranks(tensor, "gpt")]
    for name in ("embedding.word_embeddings.weight", "output_layer.weight"):
        weight = torch.cat([outcome["state"][name][0] for outcome in outcomes])
        grad = torch.cat([outcome["grads"][name] for outcome in outcomes])
        assert weight.shape == (PADDED, MODEL.hidden_size)
        assert (weight[VOCAB:] == 0).all()
        assert (grad[VOCAB:] == 0).all()
        assert (weight[:VOCAB] != 0).any(dim=1).all()
        assert (grad[:VOCAB] != 0).any()


@every_size
@pytest.mark.parametrize(("fresh", "plain"), [("all", "none"), ("scalar", "none"), ("all, tied", "none, tied")])
def test_fresh_multipliers_leave_losses_and_weight_gradients_bitwise_unchanged(
    ranks: Ranks, tensor: int, fresh: str, plain: str
) -> None:
    for outcome in ranks(tensor, "gpt"):
        got, want = outcome[fresh], outcome[plain]
        assert torch.equal(got["objective"], want["objective"])
        assert torch.equal(got["entropy"], want["entropy"])
        assert all(torch.equal(got["grads"][name], grad) for name, grad in want["grads"].items())
        assert set(got["grads"]) - set(want["grads"]), "there are no multipliers to compare"


@every_size
def test_every_matrix_of_a_block_and_the_embedding_have_multipliers_and_the_head_has_none(
    ranks: Ranks, tensor: int
) -> None:
    state = ranks(tensor, "gpt")[0]["all"]["state"]
    logical = {spec.logical_name(name, part) for name, (_, spec) in state.items() for part in spec.parts}
    found = {name for name in logical if name.endswith("_multiplier")}
    block = [f"self_attention.linear_{m}" for m in ("qkv.q", "qkv.k", "qkv.v", "proj")]
    block += [f"mlp.linear_{m}" for m in ("fc1.gate", "fc1.up", "fc2")]
    modules = [f"decoder.layers.{i}.{matrix}" for i in range(MODEL.num_layers) for matrix in block]
    modules.append("embedding.word_embeddings")
    assert found == {f"{module}.{side}_multiplier" for module in modules for side in ("row", "col")}


@pytest.mark.parametrize("symmetry", SYMMETRIES)
def test_the_logits_do_not_change_along_a_symmetry_of_multipliers(ranks: Ranks, symmetry: str) -> None:
    """Part (i) of E6 (examples/paper/e06_product_symmetry.py), in float64."""
    (found,) = ranks(1, "symmetric")
    before, _ = found["none"]
    both, half = found[symmetry]
    assert before.dtype == torch.float64 and before[..., :VOCAB].abs().min() > 0
    # A few roundings of sums of terms that are at most 100 times the result.
    torch.testing.assert_close(both, before, rtol=1e-12, atol=1e-13)
    # Only one of the two factors changes the function, so the pair is one that the logits depend on.
    assert (half - before).abs().max() > 1e-4 * before.abs().max()


@every_size
def test_every_rank_reports_the_loss_of_one_process(ranks: Ranks, tensor: int) -> None:
    want = ranks(1, "gpt")[0]["all"]["objective"]
    for outcome in ranks(tensor, "gpt"):
        for variant in ("all", "all, recomputed", "all, sequence parallel"):
            # fp32 sums in another order: about 1e-7 of the loss for each of two layers and the head.
            torch.testing.assert_close(outcome[variant]["objective"], want, rtol=1e-6, atol=0)


@every_size
def test_recomputing_activations_changes_no_bit(ranks: Ranks, tensor: int) -> None:
    for outcome in ranks(tensor, "gpt"):
        once, again = outcome["all"], outcome["all, recomputed"]
        assert torch.equal(once["objective"], again["objective"])
        assert once["grads"].keys() == again["grads"].keys()
        assert all(torch.equal(once["grads"][name], again["grads"][name]) for name in once["grads"])


def test_the_objective_is_above_the_cross_entropy_by_the_z_loss_alone(ranks: Ranks) -> None:
    for variant in VARIANTS:
        outcome = ranks(1, "gpt")[0][variant]
        penalty = (outcome["objective"] - outcome["entropy"]).item()
        # A random model's log-sum-exp is near log(130) = 4.9: its square is in [10, 60] for any of these variants.
        assert 10 * MODEL.z_loss < penalty < 60 * MODEL.z_loss, variant


@every_size
def test_rotary_frequencies_stay_fp32_in_a_bf16_model(ranks: Ranks, tensor: int) -> None:
    dim = MODEL.hidden_size // MODEL.num_attention_heads
    want = MODEL.rotary_base ** (-torch.arange(0, dim, 2, dtype=torch.float64) / dim)
    for outcome in ranks(tensor, "gpt"):
        half = outcome["bf16"]
        assert half["dtypes"] == {torch.bfloat16}
        assert half["inv_freq"].dtype == torch.float32
        # One rounding to fp32 of the quotient and one of its divisor.
        torch.testing.assert_close(half["inv_freq"].double(), want, rtol=2**-23, atol=0)


@every_size
def test_a_model_that_the_ranks_cannot_hold_is_refused(ranks: Ranks, tensor: int) -> None:
    other = 1 if tensor == 2 else 2
    for outcome in ranks(tensor, "gpt"):
        refused = outcome["refused"]
        assert f"tensor_parallel is {other} and the tensor-parallel group has {tensor} ranks: give" in refused["group"]
        too_odd = f"ffn_hidden_size is 61: it must be a multiple of parallel.tensor ({tensor})"
        assert (too_odd in refused["sizes"]) == (tensor > 1)
        assert "placement is 'some': use one of all" in refused["placement"]


@pytest.mark.parametrize("groups", [12, 2, 1])
@pytest.mark.parametrize("scale", [None, 0.3])
def test_attention_is_dense_causal_grouped_query_attention(groups: int, scale: float | None) -> None:
    torch.manual_seed(0)
    seq, batch, heads, dim = 9, 2, 12, 8
    q, k, v = (torch.randn(seq, batch, n, dim, requires_grad=True) for n in (heads, groups, groups))
    attention = SdpaAttention(None, 1, AttnMaskType.causal, "self", softmax_scale=scale)  # type: ignore[arg-type]
    upstream = torch.randn(seq, batch, heads * dim)
    got = attention(q, k, v)
    grads = torch.autograd.grad(got, (q, k, v), upstream)

    exact = [t.detach().double().requires_grad_() for t in (q, k, v)]
    expanded = [exact[0], *(t.repeat_interleave(heads // groups, dim=2) for t in exact[1:])]
    scores = torch.einsum("ibhd,jbhd->bhij", expanded[0], expanded[1]) * (dim**-0.5 if scale is None else scale)
    future = torch.ones(seq, seq, dtype=torch.bool).triu(1)
    weights = scores.masked_fill(future, -math.inf).softmax(-1)
    want = torch.einsum("bhij,jbhd->ibhd", weights, expanded[2]).reshape(seq, batch, heads * dim)
    # Averages of 9 values of order one with weights from exponentials of scores up to 10: about 10 * 2^-24 each.
    torch.testing.assert_close(got.double(), want, rtol=0, atol=5e-6)
    for mine, theirs in zip(grads, torch.autograd.grad(want, exact, upstream.double()), strict=True):
        # Gradients of keys and values add up to 9 * 12 such terms.
        torch.testing.assert_close(mine.double(), theirs, rtol=0, atol=2e-5)


@pytest.mark.parametrize(("mask", "kind"), [(AttnMaskType.padding, "self"), (AttnMaskType.causal, "cross")])
def test_attention_that_is_not_causal_self_attention_is_refused(mask: AttnMaskType, kind: str) -> None:
    with pytest.raises(ValueError, match="SdpaAttention does causal self-attention only"):
        SdpaAttention(None, 1, mask, kind)  # type: ignore[arg-type]
