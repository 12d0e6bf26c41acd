"""Factors by which muP changes a Llama model's configuration with its width, so that one tuning fits all widths.

The factors apply to the settings that were tuned at the base width. Let m be a matrix's number of columns, divided by
its number of columns at the base width. The matrices of the blocks get

- initial weights with a standard deviation divided by sqrt(m),
- with AdamW, a learning rate divided by m and a weight decay multiplied by m, so that their product is kept, as the
  package `mup` does,
- with Muon, a learning rate divided by x and a weight decay multiplied by x. Let e be the spectral norm of the update,
  divided by the norm that the spectral condition asks for, sqrt(rows / columns). Then x is e at this width, divided
  by e at the base width.

The output layer (role `head`) gets a constant factor of 1 / m in the forward pass. The settings of the embedding, the
norms and the biases are kept. If the size of an attention head differs from that at the base width, attention logits
are divided by this size instead of its square root (up to a constant).

Sources: Yang et al., arXiv 2203.03466, table 8 (Adam); Yang, Simon and Bernstein, arXiv 2310.17813 (spectral
condition). The module does no communication.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from megamult.models.common.config import DecoderConfig
from megamult.models.llama.config import ModelConfig
from megamult.multipliers.config import MultipliersConfig
from megamult.multipliers.parametrization import relative_step
from megamult.optim.config import OptimizerConfig
from megamult.parameters.spec import Role, Side


@dataclass(frozen=True)
class Mup:
    """Factors by role. A role that is absent has the factor 1."""

    init_std: Mapping[Role, float] = field(default_factory=dict)
    lr: Mapping[Role, float] = field(default_factory=dict)
    weight_decay: Mapping[Role, float] = field(default_factory=dict)
    forward: Mapping[Role, float] = field(default_factory=dict)
    """Constant factors of the matrices in the forward pass."""

    def overrides(
        self, model: ModelConfig, optimizer: OptimizerConfig, multipliers: MultipliersConfig, learned: bool = False
    ) -> dict[str, dict[str, Any]]:
        """Return the keys of a run's configuration, by section, that put muP's factors into effect.

        If the run has its own factors in these keys, the result is the product of its own factors and muP's.

        Args:
            model, optimizer, multipliers: sections of the run's configuration.
            learned: whether the factors of the forward pass are trained. If so, they are initial values of multipliers,
                and the learning rates of these multipliers are set so that the multipliers change, relative to their
                values, as fast as without muP. If not, the factors are constants.

        Raises:
            ValueError: the run has initial multipliers and divides the weights by them. muP's factors of the forward
                pass become initial multipliers too, but the weights must not be divided by muP's factors.
        """
        if multipliers.initial and multipliers.divide_weights and self.forward:
            raise ValueError(
                "multipliers.divide_weights is true and multipliers.initial is given: muP's factors become initial "
                "multipliers too, and dividing the weights by them would undo muP. Set multipliers.divide_weights to "
                "false, and divide each role's entry of model.init_std_factors by its value in multipliers.initial"
            )
        decay = {} if multipliers.norm == "fixed" else self.weight_decay
        found: dict[str, dict[str, Any]] = {
            "model": {"init_std_factors": _product(model.init_std_factors, self.init_std)},
            "optimizer": {
                "lr_factors": _product(optimizer.lr_factors, self.lr),
                "weight_decay_factors": _product(optimizer.weight_decay_factors, decay),
            },
        }
        if self.forward:
            sides = {role: set(given) for role, given in multipliers.sides(model.roles).items()}
            initial, rates = multipliers.by_side("initial"), multipliers.by_side("lr_factors")
            for role, factor in self.forward.items():
                sides.setdefault(role, set()).add("scalar")
                own = initial.get((role, "scalar"), 1.0)
                initial[role, "scalar"] = factor * own
                # At this learning rate an update changes the multiplier, relative to its value, as much as without muP.
                kind = multipliers.parametrization
                slower = relative_step(kind, own) / relative_step(kind, factor * own)
                rates[role, "scalar"] = slower * rates.get((role, "scalar"), 1.0) if learned else 0.0
            found["multipliers"] = {
                "implementation": "layer" if multipliers.implementation == "none" else multipliers.implementation,
                "placement": {role: sorted(given) for role, given in sides.items()},
                "divide_weights": False,
                "initial": _nested(initial),
                "lr_factors": _nested(rates),
            }
        return found


def _product(own: Mapping[Role, float], factors: Mapping[Role, float]) -> dict[Role, float]:
    """Return the product of two mappings of factors. A factor that is absent is 1."""
    return {role: own.get(role, 1.0) * factors.get(role, 1.0) for role in {**factors, **own}}


def _nested(values: Mapping[tuple[Role, Side], float]) -> dict[Role, dict[Side, float]]:
    """Convert a mapping from (role, side) to the form of the configuration, {role: {side: number}}."""
    found: dict[Role, dict[Side, float]] = {}
    for (role, side), value in values.items():
        found.setdefault(role, {})[side] = value
    return found


def mup(sizes: ModelConfig, base: ModelConfig, update_norm: Callable[[int, int], float] | None = None) -> Mup:
    """Return muP's factors for a model, relative to a model of the base width.

    Args:
        sizes: sizes of the model. Its embedding and head are not tied.
        base: sizes of the model whose settings were tuned.
        update_norm: function from the shape (rows, columns) of a matrix to the spectral norm of its update at learning
            rate 1, up to a constant (:func:`megamult.optim.build.update_norm`). It is known for Muon and NorMuon. None
            for AdamW, whose updates have no known norm.

    Raises:
        ValueError: the model is no Llama model; the embedding is tied to the head, whose factor would reach the
            embedding too; or the models have heads of different sizes, and QK-norm or biases of Q and K.
    """
    _check(sizes)
    if sizes.tie_embeddings:
        raise ValueError(
            "model.tie_embeddings is true: muP gives the head a factor that the embedding must not have; set it to "
            "false"
        )
    now, then = _shapes(sizes), _shapes(base)
    ratio = {role: now[role][1] / then[role][1] for role in now}
    if update_norm is None:
        excess = ratio
    else:
        excess = {role: _excess(update_norm, *now[role]) / _excess(update_norm, *then[role]) for role in now}
    forward: dict[Role, float] = {"head": base.hidden_size / sizes.hidden_size}
    heads = sizes.head_size, base.head_size
    if heads[0] != heads[1]:
        if "q_k" in sizes.broken_symmetries:
            raise ValueError(
                f"the size of a head is {heads[0]}, and {heads[1]} at the base width: muP's factor of the attention "
                "logits is a multiplier of Q, which does not scale the logits with model.qk_norm or "
                "model.attention_bias; give both models the same model.head_dim"
            )
        forward["q"] = math.sqrt(heads[1] / heads[0])
    return Mup(
        init_std={role: 1 / math.sqrt(m) for role, m in ratio.items()},
        lr={role: 1 / x for role, x in excess.items()},
        weight_decay=dict(excess),
        forward=forward,
    )


def at_width(sizes: ModelConfig, base_hidden_size: int) -> ModelConfig:
    """Return the sizes of a model of the base width: all widths in proportion, with heads of the same size.

    Args:
        sizes: sizes of the model.
        base_hidden_size: hidden_size of the model of the base width.

    Raises:
        ValueError: the model is no Llama model, or a width that is scaled in proportion is not a whole number.
    """
    _check(sizes)
    widths = {
        "num_attention_heads": sizes.num_attention_heads,
        "num_query_groups": sizes.query_groups,
        "ffn_hidden_size": sizes.ffn_hidden_size,
    }
    names = {f"model.{key} {size}": size * base_hidden_size % sizes.hidden_size for key, size in widths.items()}
    wrong = [name for name, rest in names.items() if rest]
    if base_hidden_size < 1 or wrong:
        raise ValueError(
            f"base_hidden_size is {base_hidden_size} with model.hidden_size {sizes.hidden_size}: base_hidden_size must "
            f"be positive, and {' and '.join(wrong or names)}, multiplied by base_hidden_size / model.hidden_size, "
            "must give whole numbers"
        )
    heads, groups, ffn = (size * base_hidden_size // sizes.hidden_size for size in widths.values())
    return replace(
        sizes,
        hidden_size=base_hidden_size,
        num_attention_heads=heads,
        num_query_groups=groups,
        ffn_hidden_size=ffn,
    )


def _check(sizes: DecoderConfig) -> None:
    """Check that a model is one whose muP factors are known.

    Raises:
        ValueError: it has another architecture, or is none.
    """
    if not isinstance(sizes, ModelConfig):
        raise ValueError(
            f"model.architecture is {sizes.architecture!r}: muP's factors are known here for llama only, not for the "
            "matrices and step sizes of a mixer; tune this model at its own width"
        )


def _shapes(sizes: ModelConfig) -> dict[Role, tuple[int, int]]:
    """Return [rows, columns] of the matrices of a block."""
    hidden, ffn = sizes.hidden_size, sizes.ffn_hidden_size
    q, kv = sizes.head_size * sizes.num_attention_heads, sizes.head_size * sizes.query_groups
    return {
        "q": (q, hidden),
        "k": (kv, hidden),
        "v": (kv, hidden),
        "attention_out": (hidden, q),
        "gate": (ffn, hidden),
        "up": (ffn, hidden),
        "down": (hidden, ffn),
    }


def _excess(update_norm: Callable[[int, int], float], rows: int, cols: int) -> float:
    """Return the spectral norm of an update, divided by the norm that the spectral condition asks for, up to a
    constant."""
    return update_norm(rows, cols) / math.sqrt(rows / cols)
