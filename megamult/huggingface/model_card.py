"""The README.md of an exported model: what it is, how it was trained, how to use it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from megamult.checkpoint.info import CheckpointInfo

_CARD = """\
---
library_name: transformers
pipeline_tag: text-generation
tags:
- {model_type}
- megamult
---

# A {architecture} trained with megamult

{parameters:,} parameters, {dtype}, {origin}.

```python
from transformers import AutoModelForCausalLM, AutoTokenizer

tokenizer = AutoTokenizer.from_pretrained("path/to/this/directory")
model = AutoModelForCausalLM.from_pretrained("path/to/this/directory", dtype="auto")
inputs = tokenizer("Once upon a time", return_tensors="pt")
print(tokenizer.decode(model.generate(**inputs, max_new_tokens=64)[0]))
```

{multipliers}

## Model

{model}

## Training

{training}

## Versions

{versions}
"""

_MERGED = """\
This model was trained with learnable row and column multipliers \
([arXiv 2601.04890](https://arxiv.org/abs/2601.04890)), placement `{placement}`. \
They are merged into the weights here: W_eff = s diag(r) W diag(c), with row multipliers r, column multipliers c and \
scalar multiplier s."""

_KEPT = """ \
One is not merged: the embedding's scalar is `embedding_multiplier` in config.json, because the head has the \
embedding's matrix and not its multiplier."""

_MODEL = {
    "vocab_size": "vocabulary",
    "num_hidden_layers": "layers",
    "hidden_size": "hidden size",
    "intermediate_size": "MLP size",
    "num_attention_heads": "query heads",
    "num_key_value_heads": "key-value heads",
    "max_position_embeddings": "tokens per sequence",
    "rope_theta": "rotary base",
    "tie_word_embeddings": "embedding and head tied",
    "mamba_n_heads": "mixer heads",
    "mamba_d_head": "channels of a mixer head",
    "mamba_d_state": "mixer state size",
    "mamba_n_groups": "mixer groups",
    "mamba_d_conv": "tokens of the mixer's convolution",
    "mamba_conv_bias": "bias of the mixer's convolution",
    "mamba_rms_norm": "norm inside the mixer",
}
"""Maps a field of config.json to its name in the table. Not every class has all of them."""


def render(info: CheckpointInfo, exported: Mapping[str, Any], parameters: int, multipliers: bool) -> str:
    """Return the text of the README.md.

    Args:
        info: information on the checkpoint.
        exported: content of the exported config.json.
        parameters: number of parameters in the exported model.
        multipliers: whether the checkpoint has multipliers, which were merged into the weights.
    """
    config = info.config
    imported = info.step == 0
    training: dict[str, Any] = {"optimizer steps": info.step, "sequences": info.samples}
    if not imported:
        optimizer = config["optimizer"]
        training |= {
            "sequences per step": _batch(config["train"]),
            "optimizer": optimizer["name"],
            "peak learning rate": optimizer["lr"],
            "weight decay": optimizer["weight_decay"],
            "computed in": config["train"]["dtype"],
            "seed": str(config["train"]["seed"]),
        }
    training |= {name.replace("_", " "): value for name, value in info.figures.items()}
    merged = _MERGED.format(placement=config["multipliers"]["placement"]) if multipliers else "No multipliers."
    if exported.get("embedding_multiplier", 1.0) != 1.0:
        merged += _KEPT
    return _CARD.format(
        model_type=exported["model_type"],
        architecture=exported["architectures"][0],
        parameters=parameters,
        dtype=exported["dtype"],
        origin="imported, not trained further" if imported else f"after {info.step:,} optimizer steps",
        multipliers=merged,
        model=_table({name: exported[field] for field, name in _MODEL.items() if field in exported}),
        training=_table(training),
        versions=_table(info.versions),
    )


def _batch(train: Mapping[str, Any]) -> Any:
    """Return the batch size, and how it grew at the beginning, if it did.

    Older checkpoints do not have `batch_ramp`, because the batch size could not grow yet.
    """
    ramp, full = train.get("batch_ramp", {}), train["global_batch_size"]
    if not ramp.get("start"):
        return full
    return f"{ramp['start']:,}, growing by {ramp['increment']:,} to {full:,} over {ramp['samples']:,} sequences"


def _table(rows: Mapping[str, Any]) -> str:
    return "\n".join(["| | |", "|---|---|", *(f"| {name} | {_text(value)} |" for name, value in rows.items())])


def _text(value: Any) -> str:
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, float) and value.is_integer() and abs(value) < 1e15:
        value = int(value)
    if isinstance(value, int):
        return f"{value:,}"
    return f"{value:.6g}" if isinstance(value, float) else str(value)
