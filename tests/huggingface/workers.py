"""Models of every placement with random weights and multipliers: their checkpoints, logits and greedy text."""

from __future__ import annotations

import dataclasses
import json
import random
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megamult.config import Config
from megamult.distributed.config import ParallelConfig
from megamult.distributed.mesh import current_mesh
from megamult.models.llama.config import ModelConfig
from megamult.multipliers.config import MultipliersConfig
from tests.huggingface.corpus import VOCAB
from tests.small import SMALL

TOKENS, PROMPT, GREEDY = 256, 8, 64
EOS = 2
GREEDY_CASES = ("all", "all, tied")


@dataclass(frozen=True)
class SavedModel:
    """A model, and how many processes it was spread over when it was saved."""

    tensor: int
    placement: Any
    tied: bool = False
    implementation: str = "layer"
    norms: str = "vector"
    final_norm: str = "vector"

    @property
    def config(self) -> Config:
        """The small model; no number is a default of transformers', so that a field that is lost shows."""
        model = replace(SMALL, seq_length=TOKENS, rotary_base=500.0, norm_eps=1e-3, tie_embeddings=self.tied)
        model = replace(model, norms=self.norms, final_norm=self.final_norm)
        multipliers = MultipliersConfig(self.implementation, self.placement)  # type: ignore[arg-type]
        return Config(model=model, multipliers=multipliers, parallel=ParallelConfig(tensor=self.tensor))


# At tensor parallel 2 each process holds half of the vocabulary's 512 padded rows: 400 leaves padding on the second.
CASES = {
    "all": SavedModel(2, "all"),
    "all, tied": SavedModel(1, "all", tied=True),
    "all, folded": SavedModel(2, "all", implementation="folded"),
    "symmetry_free, tied": SavedModel(2, "symmetry_free", tied=True),
    "scalar": SavedModel(1, "scalar"),
    "mapping, tied": SavedModel(
        1, {"q": "row", "k": ["row", "scalar"], "v": "col", "up": "row", "down": "scalar"}, tied=True
    ),
    "none": SavedModel(2, "all", implementation="none"),
    "head, scalar norms": SavedModel(2, {"head": "col", "v": "row"}, norms="scalar", final_norm="frozen"),
    "head, folded, frozen norms": SavedModel(
        2, {"head": ["row", "col", "scalar"]}, implementation="folded", norms="frozen", final_norm="scalar"
    ),
}


def value_of(name: str, shape: tuple[int, ...]) -> Tensor:
    """The whole tensor of a name in a checkpoint: random, the same on every process and for every layout."""
    generator = torch.Generator().manual_seed(random.Random(name).getrandbits(32))
    noise = torch.randn(shape, generator=generator)
    if name.endswith("multiplier"):
        values = 1 + 0.4 * noise
        values[::5] *= -1
        values[1::7] *= 1e-4
        return values
    if name.endswith("dt_bias"):
        return 0.3 * noise - 1.5  # steps of a mixer near 0.2, which leave something of the state
    if name.endswith("conv_weight"):
        return 0.5 * noise
    if len(shape) == 1:
        return 1 + 0.3 * noise
    # Small queries and keys: where attention is sharp, the rounding of rotary angles, which is 4e-6 at position 256 in
    # any fp32 program, shows in the logits. The rest large enough for the text not to repeat its last token.
    return (0.03 if ".q." in name or ".k." in name else 0.1) * noise


def tokens() -> Tensor:
    """[1, TOKENS] random ids."""
    return torch.randint(3, VOCAB, (1, TOKENS), generator=torch.Generator().manual_seed(11))


@torch.no_grad()
def logits_of(model: Any, ids: Tensor) -> Tensor:
    """[seq, vocabulary] of the training model, whole on every rank."""
    from megatron.core.models.gpt import GPTModel

    from megamult.distributed.mesh import current_mesh

    local = GPTModel.forward(model, ids, None, None)
    shards = [torch.empty_like(local) for _ in range(current_mesh().groups["tensor"].size())]
    torch.distributed.all_gather(shards, local.contiguous(), group=current_mesh().groups["tensor"])
    return torch.cat(shards, dim=-1)[0, :, : model.exact_vocab_size]


def greedy(model: Any, prompt: Tensor) -> list[int]:
    """The most likely continuation of `prompt` [1, seq], token by token, up to the end of the text."""
    ids = prompt
    for _ in range(GREEDY):
        ids = torch.cat([ids, logits_of(model, ids)[-1].argmax().view(1, 1)], dim=1)
        if ids[0, -1] == EOS:
            break
    return ids[0, prompt.shape[1] :].tolist()


def _build(config: Config) -> tuple[Any, Any, Any]:
    """Model, optimizer and partition, without DeepSpeed."""
    from megamult.distributed import start
    from megamult.optim.build import make_optimizer
    from megamult.parameters.stated import names_of
    from megamult.train.model import build_model
    from megamult.zero.whole import WholePartition

    start.initialize(config.parallel.tensor)
    model = build_model(config, VOCAB, seed=1)
    optimizer = make_optimizer(model, config.optimizer, config.multipliers)
    partition = WholePartition(optimizer.param_groups, names_of(model), current_mesh())
    optimizer.bind(partition)
    return model, optimizer, partition


def save_all(folder: Path, tokenizer: bytes, cases: Mapping[str, SavedModel] = CASES) -> dict[str, dict[str, Any]]:
    """Build every case, save it in `folder`/NAME, and return its logits, greedy text and tensors' shapes."""
    from megamult.checkpoint.info import CheckpointInfo
    from megamult.checkpoint.saved import write
    from megamult.checkpoint.state import held, owned

    found = {}
    for name, case in cases.items():
        config = case.config
        model, optimizer, partition = _build(config)
        chunks = [chunk for chunk in held(partition, optimizer) if chunk.name.startswith("model.")]
        for chunk in chunks:
            where = tuple(slice(o, o + s) for o, s in zip(chunk.offsets, chunk.sizes, strict=True))
            chunk.load().copy_(value_of(chunk.name, chunk.shape)[where])
        optimizer.restored(partition, 0, 0)
        info = CheckpointInfo(
            step=7,
            samples=224,
            config=json.loads(json.dumps(dataclasses.asdict(config))),
            vocab_size=VOCAB,
            figures={"tokens": 57344.0, "loss": 2.34567, "valid_loss": 2.5},
        )
        files = {"tokenizer.model": tokenizer} if tokenizer else {}
        group = torch.distributed.new_group(backend="gloo")
        write(folder / name, owned(partition, optimizer), info, files, group=group)
        found[name] = {
            "logits": logits_of(model, tokens()),
            "greedy": greedy(model, tokens()[:, :PROMPT]) if name in GREEDY_CASES else None,
            "shapes": {chunk.name: chunk.shape for chunk in chunks},
        }
    return found


def run_all(folder: Path, tokenizer: bytes, imported: Path) -> dict[str, dict[str, Any]]:
    """:func:`save_all`, and under "imported" the logits of what a checkpoint that was imported makes, at TP 2."""
    from megamult.checkpoint.saved import SavedCheckpoint
    from megamult.checkpoint.state import held

    found = save_all(folder, tokenizer)
    saved = SavedCheckpoint(imported)
    model, optimizer, partition = _build(
        Config(
            model=ModelConfig(**saved.info.config["model"]),
            multipliers=MultipliersConfig(**saved.info.config["multipliers"]),
            parallel=ParallelConfig(tensor=2),
        )
    )
    saved.load([chunk for chunk in held(partition, optimizer) if chunk.name.startswith("model.")])
    optimizer.restored(partition, 0, 0)
    found["imported"] = {"logits": logits_of(model, tokens())}
    return found
