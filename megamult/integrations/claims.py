"""Names of a model's parameters, and the rule of :func:`megamult.fold` that finds each name."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence

import torch
from torch.nn import Parameter

from megamult.integrations.rules import IfPresent, Rule


def all_names_of(model: torch.nn.Module) -> dict[Parameter, list[str]]:
    """Return all names of each parameter. A parameter that modules share has several."""
    names: dict[Parameter, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        names.setdefault(parameter, []).append(name)
    for path, module in model.named_modules():
        # Megatron's tied head has no weight of its own: each forward pass gives it the embedding's weight. So
        # named_parameters does not list the head.
        if getattr(module, "share_embeddings_and_output_weights", False):
            shared = module.shared_embedding_or_output_weight()
            head = f"{path}.output_layer.weight" if path else "output_layer.weight"
            if shared in names and head not in names[shared]:
                names[shared].append(head)
    return names


def claims(names: Sequence[str], rules: Mapping[str, Rule]) -> dict[str, str]:
    """Return {parameter name: expression of the rule that finds the name}. Names that no rule finds are left out.

    Raises:
        ValueError: a rule is no regular expression, a rule that is not :class:`IfPresent` finds no name, or two rules
            find the same name.
    """
    found_by: dict[str, str] = {}
    for expression, rule in rules.items():
        try:
            found = [name for name in names if re.search(expression, name)]
        except re.error as error:
            raise ValueError(f"the rule {expression!r} is no regular expression ({error}): correct it") from None
        if not found and not isinstance(rule, IfPresent):
            raise ValueError(
                f"the rule {expression!r} matches no parameter of the model, whose names are like {names[0]}: correct "
                "or remove it"
            )
        for name in found:
            if name in found_by:
                raise ValueError(
                    f"{name} is claimed by two rules, {found_by[name]!r} and {expression!r}: make one of them narrower"
                )
            found_by[name] = expression
    return found_by
