"""Muon as an update rule, and an optimizer that updates matrices with Muon and all other parameters with AdamW."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Mapping
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from megamult.distributed import device
from megamult.distributed.mesh import Mesh
from megamult.optim.adamw import AdamW
from megamult.optim.muon import timing
from megamult.optim.muon.coefficients import coefficients as coefficient_set
from megamult.optim.muon.matrices import MatrixRule, check_dtype
from megamult.optim.muon.newton_schulz import Form, Method, fixed_method, flops, orthogonalize_by
from megamult.optim.muon.newton_schulz import scale as scale_factor
from megamult.optim.muon.plan import BUCKET_ELEMENTS, Plan
from megamult.optim.muon.symmetric import has_kernel
from megamult.optim.rule import State
from megamult.optim.two_phase import TwoPhaseOptimizer


class Muon(MatrixRule):
    """Muon (arXiv 2502.16982), which orthogonalizes momentum by Newton-Schulz.

    G is the reduced and accumulated gradient of one logical matrix W[out, in]. Q, K, V, gate and up are separate
    matrices. One step is::

        G <- G min(1, clip / ||gradients of all parameters except multipliers||)
        M <- momentum M + (1 - momentum) G                          elementwise, on this rank's slices
        U <- Newton-Schulz(momentum M + (1 - momentum) G) * scale   whole matrix, on the matrix's owner
        W <- W - lr (weight_decay W + U)                            elementwise, on this rank's slices

    Args:
        momentum: decay rate of M.
        nesterov: if True, orthogonalize momentum M + (1 - momentum) G, as above; if False, orthogonalize M.
        ns_steps: number of Newton-Schulz steps.
        coefficients: name of the polynomials, a key of :data:`megamult.optim.muon.coefficients.COEFFICIENTS`.
        ns_dtype: dtype in which Newton-Schulz computes: fp32, bf16 or fp16. If None, fp32 if the model's matrices are
            fp32, else bf16; or fp32 on a CPU that is clearly faster in it, if `ns_form` is `auto`.
        ns_form: form of Newton-Schulz, `standard` or `gram`, with everything else by a rule; or `auto`: the method that
            is the fastest for a shape on this device (:mod:`megamult.optim.muon.timing`).
        exchange_dtype: dtype in which pieces are sent: fp32 or bf16. If None, fp32 if the model's matrices are fp32,
            else bf16.
        scale: name of the factor of an update, a key of :data:`megamult.optim.muon.newton_schulz.SCALES`.
        bucket_elements: largest number of elements that one rank receives or sends in one exchange, unless one matrix
            has more. It bounds temporary memory.

    Raises:
        ValueError: a name is unknown, or a value is out of its range.
    """

    states: ClassVar[tuple[State, ...]] = (State("momentum", "momentum_buffer"),)

    def __init__(
        self,
        *,
        momentum: float = 0.95,
        nesterov: bool = True,
        ns_steps: int = 5,
        coefficients: str = "simple",
        ns_dtype: torch.dtype | None = None,
        ns_form: Form | Literal["auto"] = "auto",
        exchange_dtype: torch.dtype | None = None,
        scale: str = "match_rms_adamw",
        bucket_elements: int = BUCKET_ELEMENTS,
    ) -> None:
        if not 0 <= momentum < 1:
            raise ValueError(f"momentum is {momentum}: it must be in [0, 1)")
        check_dtype("ns_dtype", ns_dtype, (torch.float32, torch.bfloat16, torch.float16))
        scale_factor(1, 1, scale)
        if ns_form not in ("auto", "standard", "gram"):
            raise ValueError(f"ns_form is {ns_form!r}: use auto, standard or gram")
        super().__init__(exchange_dtype=exchange_dtype, bucket_elements=bucket_elements)
        self.momentum, self.nesterov, self.scale = momentum, nesterov, scale
        self.ns_dtype, self.ns_form = ns_dtype, ns_form
        self._steps = coefficient_set(coefficients, ns_steps)
        self.methods: dict[tuple[int, int], Method] = {}
        """Method of Newton-Schulz for each shape (rows, cols), from :meth:`bind` on."""
        self.watch: Callable[[list[str], Tensor], None] | None = None
        """Function that is called for each batch, with the logical names of its matrices and the results of
        Newton-Schulz, [batch, rows, cols]; None if there is no such function."""

    def choose_methods(self, shapes: set[tuple[int, int]], dtype: torch.dtype, mesh: Mesh) -> Callable[[int, int], int]:
        """Choose the method for each shape, and return the costs: nanoseconds if all were measured, else FLOPs."""
        here = device.local_device()
        kernel = all(mesh.gather_objects(has_kernel(here)))
        if self.ns_form == "auto":
            chosen = self._timed(sorted(shapes), dtype, here, mesh, kernel)
            self.methods = {shape: each.method for shape, each in chosen.items()}
            nanoseconds = {shape: round(1e9 * each.seconds) for shape, each in chosen.items() if each.seconds}
            if nanoseconds.keys() == shapes:
                return lambda rows, cols: max(1, nanoseconds[rows, cols])
        else:
            return self.fixed_costs(shapes, dtype, kernel)
        return self._flops()

    def fixed_costs(self, shapes: set[tuple[int, int]], dtype: torch.dtype, kernel: bool) -> Callable[[int, int], int]:
        """Choose the method for each shape without measuring, and return the costs in FLOPs.

        Args:
            shapes, dtype: the same as for :meth:`choose_methods`.
            kernel: whether the device has the kernel for symmetric products.
        """
        form, wanted = None if self.ns_form == "auto" else self.ns_form, self.ns_dtype or dtype
        self.methods = {shape: fixed_method(*shape, len(self._steps), wanted, kernel, form) for shape in shapes}
        return self._flops()

    def _flops(self) -> Callable[[int, int], int]:
        """Return the function from a shape to the FLOPs of its method."""

        def cost(rows: int, cols: int) -> int:
            method = self.methods[rows, cols]
            return flops(rows, cols, len(self._steps), method.form, method.products)

        return cost

    def _timed(
        self, shapes: list[tuple[int, int]], dtype: torch.dtype, here: torch.device, mesh: Mesh, kernel: bool
    ) -> dict[tuple[int, int], timing.Chosen]:
        """Return the choice of global rank 0 for each shape, and keep it for checkpoints.

        Raises:
            RuntimeError: rank 0 could not choose.
        """
        dtypes = [self.ns_dtype or dtype]
        if self.ns_dtype is None and dtype == torch.bfloat16 and here.type == "cpu":
            dtypes.append(torch.float32)  # some CPUs only emulate bf16
        told: list[Any] = [None, None]
        if mesh.rank == 0:
            try:
                told[0] = timing.choose(shapes, self._steps, dtypes, here, kernel=kernel, known=self.choices)
            except Exception as error:  # all ranks must know, because they wait
                told[1] = f"{type(error).__name__}: {error}"
        mesh.broadcast_objects(told)
        chosen: dict[tuple[int, int], timing.Chosen] | None = told[0]
        if chosen is None:
            raise RuntimeError(
                f"rank 0 could not time Newton-Schulz ({told[1]}): set optimizer.muon.ns_form to standard or gram, "
                "with which nothing is timed"
            )
        self.choices = timing.plain(chosen, self._steps, dtypes)
        return chosen

    def accumulate(self, gradients: list[Tensor], state: Mapping[str, list[Tensor]]) -> list[Tensor]:
        """Update the momentum M in place. Return M or, if `nesterov` is set, momentum * M + (1 - momentum) * G."""
        torch._foreach_lerp_(state["momentum"], gradients, 1 - self.momentum)
        if not self.nesterov:
            return state["momentum"]
        torch._foreach_lerp_(gradients, state["momentum"], self.momentum)
        return gradients

    def update(self, matrices: list[Tensor], state: Mapping[str, Tensor]) -> Tensor:
        """Return the matrices that :meth:`accumulate` gave, orthogonalized and scaled: [batch, rows, cols]."""
        rows, cols = matrices[0].shape
        return self.orthogonalized(matrices).mul_(scale_factor(rows, cols, self.scale))

    def orthogonalized(self, matrices: list[Tensor]) -> Tensor:
        """Return the matrices, orthogonalized by the method of their shape: [batch, rows, cols]."""
        rows, cols = matrices[0].shape
        result = orthogonalize_by(matrices, self._steps, self.methods[rows, cols])
        if self.watch is not None:
            self.watch(self.updating, result)
        return result

    def apply(
        self,
        group: Mapping[str, Any],
        parameters: list[Tensor],
        gradients: list[Tensor],
        state: Mapping[str, list[Tensor]],
    ) -> None:
        """Decay the tensors of one param group, and subtract lr times the updates, which are in `gradients`."""
        torch._foreach_mul_(parameters, 1 - group["lr"] * group["weight_decay"])
        torch._foreach_add_(parameters, gradients, alpha=-group["lr"])


class DistributedMuon(TwoPhaseOptimizer):
    """Optimizer that uses :class:`Muon` for groups of kind `matrix`, and AdamW for all others.

    Args:
        groups: param groups, made by :func:`megamult.param_groups`.
        betas, eps: arguments of :class:`megamult.optim.adamw.AdamW`.
        settings: keyword arguments of :class:`Muon` and of :class:`megamult.optim.two_phase.TwoPhaseOptimizer`.

    Attributes:
        muon: the update rule of the matrices.

    Raises:
        ValueError: see :class:`Muon` and :class:`megamult.optim.two_phase.TwoPhaseOptimizer`.
    """

    def __init__(
        self,
        groups: Iterable[dict[str, Any]],
        *,
        betas: tuple[float, float] = (0.9, 0.95),
        eps: float = 1e-8,
        **settings: Any,
    ) -> None:
        of_muon = inspect.signature(Muon).parameters.keys() & settings
        self.muon = Muon(**{key: settings.pop(key) for key in of_muon})
        super().__init__(groups, AdamW(betas, eps), {"matrix": self.muon}, **settings)

    @property
    def plan(self) -> Plan | None:
        """Owners and buckets of the matrices; None before the first step or :func:`megamult.attach`."""
        return self.muon.plan

    @property
    def bytes_sent(self) -> int:
        """Number of bytes that this rank has sent to others for Muon's updates since the partition was bound."""
        return self.muon.bytes_sent
