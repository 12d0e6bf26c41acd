"""Signal and noise of the gradient of every parameter at a checkpoint: |mean| / sd over micro-batches.

    python -m examples.paper.gradient_probe CHECKPOINT --output FILE.json [--batches 64]

One process without DeepSpeed builds the model of the checkpoint's run, loads the weights, and computes the gradient of
each of the micro-batches that the run would have read next. The model's multipliers must be in its layers
(multipliers.implementation layer). The file has quantiles of the ratio by "role/W", "role/row", "role/col" or
"role/scalar", and the ratio of the embedding's row multipliers by how often their token occurs.
"""

from __future__ import annotations

import argparse
import json
from collections import defaultdict
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch
from torch import Tensor

from megamult.checkpoint.saved import SavedCheckpoint
from megamult.config import Config
from megamult.distributed import device, start
from megamult.distributed.mesh import Mesh
from megamult.monitor.names import layer_of
from megamult.parameters.axes import tensor_shard
from megamult.parameters.spec import Part
from megamult.parameters.stated import named_specs
from megamult.train import corpora
from megamult.train.command_line import parse
from megamult.train.model import build_model

MATRIX = "W"
"""Name of the matrices themselves, beside the sides of multipliers."""

FREQUENT, RARE = 0.1, 0.5
"""Shares of the tokens that occur in the probe: the most frequent ones, and the least frequent ones."""


def logical_parts(model: torch.nn.Module, tensors: dict[str, Tensor]) -> Iterator[tuple[str, Part, str, Tensor]]:
    """Yield (logical name, part, side or "W", values) of matrices and multipliers on a model that one process holds.

    Args:
        model: the model.
        tensors: a tensor for each parameter by name, in the parameter's shape. `values` are copies of its rows.
    """
    whole = tensor_shard(0, 1)
    for name, _, spec in named_specs(model):
        if spec.side is None and len(spec.shape) != 2:
            continue  # a norm, or a vector or the convolution of a mixer
        pieces: dict[int, list[tuple[int, Tensor]]] = defaultdict(list)
        for each in spec.local_segments(whole):
            pieces[each.part].append((each.part_start, tensors[name][each.start : each.start + each.length]))
        for index, part in enumerate(spec.parts):
            values = torch.cat([piece for _, piece in sorted(pieces[index], key=lambda item: item[0])])
            yield spec.logical_name(name, part), part, spec.side or MATRIX, values


@torch.no_grad()
def load(model: torch.nn.Module, saved: SavedCheckpoint) -> None:
    """Set the parameters of a model that one process holds to a checkpoint's values.

    Raises:
        KeyError: the checkpoint lacks a parameter.
    """
    for name, parameter, spec in named_specs(model):
        values = {part: saved.read(f"model.{spec.logical_name(name, part)}") for part in spec.parts}
        for each in spec.local_segments(tensor_shard(0, 1)):
            rows = values[spec.parts[each.part]][each.part_start : each.part_start + each.length]
            parameter[each.start : each.start + each.length].copy_(rows)


class Moments:
    """Mean and standard deviation of tensors over samples, in fp64."""

    def __init__(self) -> None:
        self.count = 0
        self._sums: dict[str, Tensor] = {}
        self._squares: dict[str, Tensor] = {}

    def add(self, tensors: dict[str, Tensor]) -> None:
        """Add one sample of every tensor."""
        self.count += 1
        for name, tensor in tensors.items():
            values = tensor.double()
            if name not in self._sums:
                self._sums[name], self._squares[name] = torch.zeros_like(values), torch.zeros_like(values)
            self._sums[name] += values
            self._squares[name].addcmul_(values, values)

    def signal_to_noise(self) -> dict[str, Tensor]:
        """Return |mean| / sd of every element, with the sample deviation; NaN where the samples are all equal."""
        found = {}
        for name, total in self._sums.items():
            mean = total / self.count
            variance = (self._squares[name] - self.count * mean.square()) / (self.count - 1)
            # Rounding leaves a variance of about 1e-16 of the squares where all samples are equal.
            equal = variance <= 1e-12 * self._squares[name] / self.count
            found[name] = (mean.abs() / variance.clamp_min(0).sqrt()).masked_fill(equal, torch.nan)
        return found


def quantiles(values: Tensor) -> dict[str, float | int]:
    """Return count, median, 5th and 95th percentile of the values that are not NaN."""
    known = values[~values.isnan()].flatten().sort().values
    if not len(known):
        return {"count": 0}
    at = {name: known[int(q * (len(known) - 1))].item() for name, q in (("low", 0.05), ("median", 0.5), ("high", 0.95))}
    return {"count": len(known), **at}


def by_frequency(ratios: Tensor, occurrences: Tensor) -> dict[str, dict[str, float | int]]:
    """Return quantiles of the ratios of frequent and of rare tokens, among those that occur.

    Args:
        ratios: [vocabulary] ratio of each token's parameter.
        occurrences: [vocabulary] how often each token occurs in the probe.
    """
    order = occurrences.argsort(descending=True, stable=True)
    order = order[occurrences[order] > 0]
    frequent, rare = order[: max(1, round(FREQUENT * len(order)))], order[-max(1, round(RARE * len(order))) :]
    return {"frequent": quantiles(ratios[frequent]), "rare": quantiles(ratios[rare])}


def probe(checkpoint: Path, batches: int) -> dict[str, object]:
    """Return quantiles of |mean| / sd of the gradient at a checkpoint, over micro-batches of the run's own data.

    Raises:
        ValueError: the run has no multipliers in its layers, or its data is not there.
    """
    saved = SavedCheckpoint(checkpoint)
    run_dir = checkpoint.resolve().parents[1]
    config, _ = parse(["--config", str(run_dir / "config.yaml")])
    if config.multipliers.implementation != "layer" or config.parallel.tensor != 1:
        raise ValueError(f"{run_dir} has no multipliers in its layers, or shards them: probe a run of one process")
    mesh = start.initialize(tensor=1)
    tokenizer, vocab_size = corpora.vocabulary(config)
    model = build_model(config, vocab_size, seed=None, eod=tokenizer.eod).to(device.local_device())
    load(model, saved)
    moments, occurrences = Moments(), torch.zeros(vocab_size, dtype=torch.long)
    samples, valid = corpora.open_datasets(config, tokenizer, run_dir, mesh)
    try:
        assert saved.info.data is not None
        samples.load_state_dict(saved.info.data, saved.info.samples)
        for tokens, labels in _batches(config, samples, saved.info.samples, batches, mesh):
            model.zero_grad(set_to_none=True)
            objective, _ = model(tokens, labels)
            objective.backward()
            moments.add({name: p.grad for name, p, _ in named_specs(model) if p.grad is not None})
            occurrences += torch.bincount(tokens.flatten().cpu(), minlength=vocab_size)
    finally:
        samples.close()
        for each in valid.values():
            each.close()
    return {"step": saved.info.step, "batches": batches, **summarize(model, moments, occurrences)}


def summarize(model: torch.nn.Module, moments: Moments, occurrences: Tensor) -> dict[str, object]:
    """Return quantiles of |mean| / sd.

    Returns:
        by_role: those of each "role/side".
        blocks: those of `matrix` (W), `vector` (row and column multipliers) and `scalar`, each joined over the matrices
            of all blocks. The embedding is left out: few of its rows get a gradient in a micro-batch.
        embedding_rows: those of the embedding's row multipliers, of frequent and of rare tokens.
    """
    kinds = {MATRIX: "matrix", "row": "vector", "col": "vector", "scalar": "scalar"}
    by_role: dict[str, list[Tensor]] = defaultdict(list)
    blocks: dict[str, list[Tensor]] = defaultdict(list)
    frequency: dict[str, dict[str, float | int]] = {}
    for name, part, side, values in logical_parts(model, moments.signal_to_noise()):
        by_role[f"{part.role}/{side}"].append(values.flatten().cpu())
        if layer_of(name) is not None:
            blocks[kinds[side]].append(values.flatten().cpu())
        if part.role == "embedding" and side == "row":
            frequency = by_frequency(values.cpu(), occurrences)
    return {
        "by_role": {key: quantiles(torch.cat(values)) for key, values in by_role.items()},
        "blocks": {key: quantiles(torch.cat(values)) for key, values in blocks.items()},
        "embedding_rows": frequency,
    }


def _batches(
    config: Config, samples: corpora.BlendedDataset, first: int, count: int, mesh: Mesh
) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield (tokens, labels), [micro-batch, seq], of the samples from `first` on."""
    size, where = config.train.micro_batch_size, device.local_device()
    for begin in range(first, first + count * size, size):
        samples.prepare(begin, begin + size, mesh.barrier)
        items = [samples[index] for index in range(begin, begin + size)]
        tokens, labels = (torch.stack([item[key] for item in items]).to(where) for key in ("tokens", "labels"))
        yield tokens, labels


def main(arguments: Sequence[str] | None = None) -> None:
    """Probe a checkpoint and write the file."""
    made = argparse.ArgumentParser(prog="python -m examples.paper.gradient_probe", description=__doc__.split("\n")[0])
    made.add_argument("checkpoint", type=Path)
    made.add_argument("--output", type=Path, required=True)
    made.add_argument("--batches", type=int, default=64, help="number of micro-batches (64)")
    chosen = made.parse_args(arguments)
    found = probe(chosen.checkpoint, chosen.batches)
    partial = chosen.output.with_name(chosen.output.name + ".partial")
    partial.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    partial.replace(chosen.output)
    start.destroy()


if __name__ == "__main__":
    main()
