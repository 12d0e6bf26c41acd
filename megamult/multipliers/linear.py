"""Megatron's column-parallel and row-parallel layers with learnable multipliers.

The classes can replace Megatron's. Without multipliers they compute what Megatron's layers compute, and so does a new
layer, whose multipliers are 1. A layer scales its *local weight*, W_eff = s diag(r) W diag(c), and passes W_eff to
Megatron's own forward pass, which overlaps communication and computation in the same way as without multipliers::

                 column-parallel, rank p                row-parallel, rank p
          c (replicated, one per matrix)                  c_p (sharded)
            .------------------.                           .--------.
      r_p   |    W_p rows      |                      r    |  W_p   |
  (sharded) |  [out/tp, in]    |            (replicated)   | columns|  [out, in/tp]
            '------------------'                           '--------'

Scaling the weight is cheaper than scaling the activations if a rank's micro-batch has more than in * out / (in + out)
tokens. It also lets every matrix of a fused projection have its own column multipliers. W_eff is not saved for
backward, but computed again from the weight. A bias is added after the scaling, y = W_eff x + b, and is not scaled.

Source: arXiv 2601.04890.
"""

from __future__ import annotations

from typing import Any

import torch
from megatron.core.tensor_parallel import ColumnParallelLinear, RowParallelLinear
from torch import Tensor
from torch.nn import Parameter

from megamult.multipliers.layer_scaling import LayerScaling
from megamult.multipliers.parameters import (
    GradSync,
    SumOverTensorParallel,
    full_precision,
    multipliers_of,
    register_multipliers,
)
from megamult.multipliers.sharded_state import multiplier_sharded_tensors
from megamult.multipliers.wrapped import effective_weight
from megamult.parameters import megatron
from megamult.parameters.axes import tensor_shard
from megamult.parameters.roles import Placement, resolve
from megamult.parameters.spec import ParameterSpec, Role
from megamult.parameters.stated import set_spec, spec_of


class _MultiplierLinear:
    """Code that the column- and the row-parallel layer share. Each inherits from this class first, then from Megatron's
    layer."""

    weight: Parameter
    bias: Parameter | None
    tp_group: torch.distributed.ProcessGroup

    def _setup_multipliers(
        self, spec: ParameterSpec, placement: Placement | None, grad_sync: GradSync, shared_columns: bool = False
    ) -> None:
        """State the specs of weight and bias, and create the multipliers."""
        module: Any = self
        chosen = resolve("all", {part.role for part in spec.parts}) if placement is None else placement
        coordinates = tensor_shard(self.tp_group.rank(), self.tp_group.size())
        tp_size = self.tp_group.size()
        set_spec(self.weight, spec)
        expected = spec.local_shape(coordinates.grid)
        actual = tuple(getattr(self.weight, "ds_shape", self.weight.shape))
        if expected != actual:
            raise ValueError(
                f"the spec of {type(self).__name__} describes a local weight {expected} at tensor-parallel "
                f"size {tp_size}, but Megatron made {actual}: pass a spec of the global weight; the global shape in "
                f"this spec is {spec.shape}"
            )
        if spec.reduce_over and grad_sync == "backward":
            raise ValueError(
                f"the spec of {type(self).__name__} leaves sums over {', '.join(spec.reduce_over)} to the optimizer "
                "step, and grad_sync is 'backward': give grad_sync='step', and train with an optimizer of megamult"
            )
        if self.bias is not None:
            # A row-parallel layer adds its replicated bias to its part of the sequence, if it has only a part of it.
            split = spec.dim_over("tensor") == 1 and module.config.sequence_parallel
            set_spec(self.bias, megatron.bias_of(spec, partial=split))
        partial = tp_size > 1 and grad_sync == "step"
        register_multipliers(module, self.weight, spec, chosen, coordinates.grid, partial, shared_columns)
        self._scaling = LayerScaling(spec, chosen, coordinates, shared_columns)
        self._has_multipliers = any(p is not None for p in self._multipliers())
        self._sum_in_backward = tp_size > 1 and grad_sync == "backward"
        if self._has_multipliers and module.config.gradient_accumulation_fusion:
            raise ValueError(
                "gradient_accumulation_fusion is True: autograd then does not get the gradient of the effective "
                "weight, which multipliers need; set it to False"
            )

    def _multipliers(self) -> tuple[Parameter | None, ...]:
        module: Any = self
        return tuple(multipliers_of(module).values())

    def _completed(self) -> list[Tensor | None]:
        """Return the row, column and scalar multipliers. None stands for a side on which the layer has none.

        If a multiplier has an fp32 value (:func:`full_precision`), that value is returned instead of the parameter.

        If `grad_sync` is "backward", the backward pass sums the gradients of replicated multipliers over
        tensor-parallel ranks.
        """
        tensors: list[Tensor | None] = [None if p is None else full_precision(p) for p in self._multipliers()]
        if self._sum_in_backward:
            replicated = [
                i for i, p in enumerate(self._multipliers()) if p is not None and spec_of(p).dim_over("tensor") is None
            ]
            if replicated:
                summed = SumOverTensorParallel.apply(self.tp_group, *(tensors[i] for i in replicated))
                for i, tensor in zip(replicated, summed, strict=True):
                    tensors[i] = tensor
        return tensors

    def forward(self, input_: Tensor, *args: Any, **kwargs: Any) -> Any:
        """Compute what Megatron's layer computes, with the effective weight in place of the weight."""
        parent: Any = super()
        if not self._has_multipliers:
            return parent.forward(input_, *args, **kwargs)
        given = args[0] if args else kwargs.get("weight")
        module: Any = self
        with effective_weight(
            module, self.weight if given is None else given, self._completed(), self._scaling
        ) as scaled:
            if given is not None:
                args, kwargs = (scaled, *args[1:]) if args else args, kwargs if args else {**kwargs, "weight": scaled}
            return parent.forward(input_, *args, **kwargs)

    def sharded_state_dict(
        self, prefix: str = "", sharded_offsets: tuple[Any, ...] = (), metadata: dict[str, Any] | None = None
    ) -> dict[str, Any]:
        """Return Megatron's sharded state dict with the multipliers added. Each logical vector of multipliers has its
        own key and global shape.

        `metadata` must hold `dp_cp_group`, which Megatron's own layers need too.
        """
        assert metadata is not None
        parent: Any = super()
        sharded = parent.sharded_state_dict(prefix, sharded_offsets, metadata)
        multiplier_sharded_tensors(self, sharded, prefix, sharded_offsets, self.tp_group, metadata)  # type: ignore[arg-type]
        return sharded


class MultiplierColumnParallelLinear(_MultiplierLinear, ColumnParallelLinear):
    """Y = X W_eff^T with W_eff = s diag(r) W diag(c), whose rows are sharded over tensor-parallel ranks.

    Arguments that are not listed are those of Megatron's `ColumnParallelLinear`.

    Args:
        input_size, output_size: global sizes.
        spec: spec of the weight. For a weight that consists of several matrices, functions such as
            :func:`megamult.parameters.megatron.fused_qkv` and :func:`~megamult.parameters.megatron.fused_gate_up` make
            it. Default: the spec of one matrix, of role `role`.
        role: role of the matrix if `spec` is not given; otherwise not used.
        placement: sides that have multipliers, by role; default: row and column multipliers on every matrix.
        grad_sync: when the gradients of replicated multipliers are summed over tensor-parallel ranks
            (:mod:`megamult.multipliers.parameters`).
        shared_columns: whether all logical matrices of the weight have the same column multipliers. Each still has its
            own copy in `col_multiplier`.
        own_bias: whether the layer has a bias, which it adds itself. None leaves this to Megatron's arguments `bias`
            and `skip_bias_add`.

    Shapes: x: [seq, batch, in]; y: [seq, batch, out/tp]; `row_multiplier`: [out/tp]; `col_multiplier`:
    [matrices * in]; `scalar_multiplier`: [matrices].
    """

    def __init__(
        self,
        input_size: int,
        output_size: int,
        *,
        spec: ParameterSpec | None = None,
        role: Role = "up",
        placement: Placement | None = None,
        grad_sync: GradSync = "backward",
        shared_columns: bool = False,
        own_bias: bool | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(input_size, output_size, **_with_bias(kwargs, own_bias))
        if self.weight is None:
            raise ValueError("skip_weight_param_allocation is True: a layer with multipliers needs a weight of its own")
        stated = spec or megatron.single_matrix(role, output_size, input_size, 0)
        self._setup_multipliers(stated, placement, grad_sync, shared_columns)


class MultiplierRowParallelLinear(_MultiplierLinear, RowParallelLinear):
    """Y = X W_eff^T with W_eff = s diag(r) W diag(c), whose columns are sharded over tensor-parallel ranks.

    `spec`, `role`, `placement`, `grad_sync` and `own_bias` are the same as for :class:`MultiplierColumnParallelLinear`.
    All other arguments are those of Megatron's `RowParallelLinear`. Every rank has the whole bias, which is added once,
    to the sum over the ranks.

    Shapes: x: [seq, batch, in/tp]; y: [seq, batch, out]; `row_multiplier`: [out]; `col_multiplier`: [in/tp].
    """

    def __init__(
        self,
        input_size: int,
        output_size: int,
        *,
        spec: ParameterSpec | None = None,
        role: Role = "down",
        placement: Placement | None = None,
        grad_sync: GradSync = "backward",
        own_bias: bool | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(input_size, output_size, **_with_bias(kwargs, own_bias))
        self._setup_multipliers(spec or megatron.single_matrix(role, output_size, input_size, 1), placement, grad_sync)


def _with_bias(arguments: dict[str, Any], own: bool | None) -> dict[str, Any]:
    """Return the arguments of Megatron's layer with a bias that the layer adds itself, or with none, as `own` says.

    A bias that the layer returns for its caller to add would be empty under ZeRO 3 when the caller adds it.
    """
    return arguments if own is None else {**arguments, "bias": own, "skip_bias_add": False}
