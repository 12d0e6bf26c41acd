"""Functions that state a spec on a parameter, and functions that read the specs of parameters."""

from __future__ import annotations

from collections.abc import Container, Iterable

import torch
from torch.nn import Parameter

from megamult.parameters.spec import ParameterSpec

_ATTRIBUTE = "parameter_spec"


def set_spec(parameter: Parameter, spec: ParameterSpec) -> None:
    """State `spec` on `parameter`. Also set `tensor_model_parallel`, `partition_dim` and `partition_stride`, which
    Megatron and DeepSpeed read."""
    setattr(parameter, _ATTRIBUTE, spec)
    sharding = next((each for each in spec.shardings if each.axis == "tensor"), None)
    parameter.tensor_model_parallel = sharding is not None  # type: ignore[attr-defined]
    parameter.partition_dim = -1 if sharding is None else sharding.dim  # type: ignore[attr-defined]
    parameter.partition_stride = 1 if sharding is None else len(sharding.blocks)  # type: ignore[attr-defined]


def spec_of(parameter: Parameter, name: str = "a parameter") -> ParameterSpec:
    """Return the spec stated on `parameter`.

    Raises:
        ValueError: no spec was stated on the parameter.
    """
    spec = getattr(parameter, _ATTRIBUTE, None)
    if spec is None:
        raise ValueError(
            f"{name} of shape {stored_shape(parameter)} has no spec: build its layer from megamult.layers, or call "
            "megamult.parameters.stated.set_spec(parameter, spec)"
        )
    return spec


def has_spec(tensor: torch.Tensor) -> bool:
    """Return whether a spec was stated on the tensor."""
    return hasattr(tensor, _ATTRIBUTE)


def stored_shape(parameter: torch.Tensor) -> tuple[int, ...]:
    """Return the shape of this process's tensor-parallel shard, even if ZeRO 3 has emptied the parameter."""
    return tuple(getattr(parameter, "ds_shape", parameter.shape))


def named_specs(module: torch.nn.Module) -> Iterable[tuple[str, Parameter, ParameterSpec]]:
    """Yield (name, parameter, spec) of every trainable parameter once, in the module's order.

    Raises:
        ValueError: a parameter has no spec.
    """
    for name, parameter in module.named_parameters():
        if parameter.requires_grad:
            yield name, parameter, spec_of(parameter, name)


def names_of(module: torch.nn.Module) -> dict[Parameter, str]:
    """Return the name of each trainable parameter."""
    return {parameter: name for name, parameter in module.named_parameters() if parameter.requires_grad}


def check_complete(held: Container[str], names: Iterable[str]) -> None:
    """Check that the param groups hold every trainable parameter.

    Args:
        held: names of the parameters that the param groups hold.
        names: names of the trainable parameters.

    Raises:
        ValueError: a trainable parameter is in no param group.
    """
    missing = [name for name in names if name not in held]
    if missing:
        raise ValueError(
            f"{len(missing)} trainable parameters are in no group, for example {missing[0]}: they would never be "
            "trained; add them to a group, or set their requires_grad to False"
        )
