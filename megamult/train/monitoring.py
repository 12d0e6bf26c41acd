"""The monitor of a run: figures of weights, multipliers, update and activations every `monitor.every` steps."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import torch
from torch.utils.hooks import RemovableHandle

from megamult.config import Config
from megamult.distributed import device
from megamult.models.architectures import architecture_of
from megamult.models.common.activations import Activations
from megamult.models.common.readers import norms_and_readers
from megamult.monitor.equilibrium import Trajectory, equilibrium_rms, gain
from megamult.monitor.imbalance import Imbalance
from megamult.monitor.names import by_place, key
from megamult.monitor.orthogonality import Orthogonality
from megamult.monitor.squares import rms
from megamult.monitor.vectors import Vectors
from megamult.monitor.weights import Weights
from megamult.optim.two_phase import TwoPhaseOptimizer
from megamult.train.schedule import Schedule
from megamult.zero.partition import Partition


class RunMonitor:
    """Figures of a run. Every rank calls every method together, and gets the same figures.

    Only monitored steps are measured: hooks are on the model only in the first micro-batch of a monitored step, and on
    the optimizer only in that step.

    Args:
        config: configuration of the run.
        model, partition, optimizer: the model, its partition, and the optimizer that is bound to the partition.
        vocab_size: exact number of tokens.
        drawn: whether the run began with weights that it drew itself. If it began with imported weights, there is no
            figure `predicted_rms`, because a :class:`megamult.monitor.equilibrium.Trajectory` starts from the RMS of
            drawn weights.
    """

    def __init__(
        self,
        config: Config,
        model: torch.nn.Module,
        partition: Partition,
        optimizer: TwoPhaseOptimizer,
        vocab_size: int,
        *,
        drawn: bool = True,
    ) -> None:
        self._config, self._optimizer, self._mesh = config, optimizer, partition.mesh
        self._vectors = Vectors(partition, optimizer)
        self._weights = Weights(partition, optimizer, self._vectors.entries)
        transformer: Any = model.config
        self._imbalance = Imbalance(
            self._weights.matrices, transformer.kv_channels, norms_and_readers(model), config.model.broken_symmetries
        )
        self._orthogonality = Orthogonality(partition, optimizer)
        self._activations = Activations(model, vocab_size)
        self._copying: RemovableHandle | None = None
        self._equilibria, self._trajectories = self._references(partition, drawn)

    def due(self, step: int) -> bool:
        """Return whether `step`, counted from 1, is a monitored step."""
        every = self._config.monitor.every
        return every > 0 and step % every == 0

    def begin(self) -> None:
        """Add the hooks that measure the next step. Call this before the first forward pass of that step."""
        self._activations.arm()
        self._orthogonality.arm()
        if self._config.monitor.updates:
            # Copy the weights only when the optimizer begins its step, because the activations have been freed by then.
            self._copying = self._optimizer.register_step_pre_hook(lambda *_: self._weights.remember())

    def figures(self, step: int) -> dict[str, float]:
        """Return the figures of the step that followed :meth:`begin`. Collective over all ranks.

        Args:
            step: number of that step, counted from 1.
        """
        if self._copying is not None:
            self._copying.remove()
            self._copying = None
        vectors = self._vectors.gathered()
        return {
            **self._of_optimizer(),
            **self._weights.figures(vectors),
            **self._vectors.figures(vectors),
            **self._imbalance.figures(vectors),
            **self._orthogonality.figures(),
            **self._of_activations(),
            **{key("equilibrium_rms", role): v for role, v in self._equilibria.items() if math.isfinite(v)},
            **{key("predicted_rms", role): line.after(step) for role, line in self._trajectories.items()},
        }

    def _of_optimizer(self) -> dict[str, float]:
        """Return gradient norms and clip factors of the last step."""
        optimizer, norms = self._optimizer, self._optimizer.norms
        found: dict[str, float] = {}
        if norms is not None:
            factors = optimizer.clipping.factors(norms)
            for subject, norm, factor in zip(
                ("main", "multipliers"), (norms.main, norms.multipliers), factors, strict=True
            ):
                found[key("grad_norm", subject)] = norm
                found[key("clip_factor", subject)] = factor
        return found

    def _of_activations(self) -> dict[str, float]:
        """Return the RMS of activations and the largest attention logits, over the first micro-batches of all ranks.

        Tensor-parallel ranks that hold copies of an activation all count it, which does not change a mean.
        """
        measured, here = self._activations, device.local_device()
        measured.disarm()
        places = [(metric, layer) for metric in measured.metrics for layer in measured.layers] + [("logits_rms", None)]
        nothing = (torch.zeros((), dtype=torch.float64, device=here), 0)
        pairs = [measured.sums.get(place, nothing) for place in places]
        counts = torch.tensor([float(count) for _, count in pairs], dtype=torch.float64, device=here)
        sums = self._mesh.sum_over(torch.stack([torch.stack([total for total, _ in pairs]), counts])).tolist()
        none = torch.full((), -torch.inf, device=here)
        scores = torch.stack([measured.largest.get(layer, none) for layer in measured.layers] or [none])
        largest = self._mesh.max_over(scores).tolist()
        found: dict[str, float] = {}
        for (metric, layer), total, count in zip(places, *sums, strict=True):
            if count:
                found[key(metric, layer=layer)] = rms(total, count)
        each = [
            (None, layer, value)
            for layer, value in zip(measured.layers, largest, strict=False)
            if layer in measured.largest
        ]
        return found | by_place("attention_logit_max", each, max)

    def _references(self, partition: Partition, drawn: bool) -> tuple[dict[str, float], dict[str, Trajectory]]:
        """Return two references for the RMS of matrices, both by role: the equilibrium RMS, at which gradient noise and
        weight decay balance, and the predicted trajectory of the RMS from its initial value. If `drawn` is
        False, the run did not draw its initial weights, so there are no trajectories."""
        config, schedule = self._config.optimizer, Schedule(self._config)
        groups = {group["kind"]: group for group in self._optimizer.param_groups}
        initial = architecture_of(self._config.model).standard_deviations(self._config.model) if drawn else {}
        start = self._config.multipliers.initial_values()
        sides = self._config.multipliers.sides(self._config.model.roles)
        equilibria: dict[str, float] = {}
        trajectories: dict[str, Trajectory] = {}
        for cut in partition.cuts:
            for part in cut.spec.parts if len(cut.spec.shape) > 1 else ():
                group = groups.get(cut.spec.kind)
                size = gain(config, cut.spec.kind, part.rows, cut.spec.cols)
                rate = self._optimizer.rates.of(cut.spec, part)
                fixed = self._optimizer.fixed is not None and cut.spec.kind == "matrix"
                if group is None or size is None or part.role in equilibria or fixed or rate.lr == 0:
                    continue
                peak, decay = group["peak_lr"] * rate.lr, group["weight_decay"] * rate.weight_decay
                equilibria[part.role] = equilibrium_rms(peak, decay, size)
                if part.role in initial:
                    rates = _rates(peak, schedule)
                    drawn_rms = initial[part.role] * start.weight_factor(part.role, sides)
                    trajectories[part.role] = Trajectory(drawn_rms, rates, decay, size)
        return equilibria, trajectories


def _rates(peak: float, schedule: Schedule) -> Iterator[float]:
    """Return the learning rates of all steps from the run's first one on."""
    return (peak * factor for factor in schedule.lr_factors())
