"""What a run that goes on from a checkpoint changes of its configuration: an override that was left out is seen."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from megamult.config import Config
from megamult.settings import differences, run_settings, shown

_NOT_COMPARED = ("checkpoint.load",)
"""Keys that are left out: where the run resumes from has been said already."""


def changes(before: Mapping[str, Any], config: Config) -> str | None:
    """Return one aligned line for every key that differs, old -> new; None: none does.

    A key that the checkpoint's version did not have counts as its default then.

    Args:
        before: the checkpoint's configuration, as it holds it: nested mappings.
        config: the run's.
    """
    now, old = run_settings(dataclasses.asdict(config)), run_settings(before)
    old = {key: value for key, value in run_settings(dataclasses.asdict(Config())).items() if key in now} | old
    found = [each for each in differences(now, old) if each.key not in _NOT_COMPARED]
    if not found:
        return None
    width = max(len(each.key) for each in found)
    lines = [f"  {each.key:<{width}}  {shown(each.its)} -> {shown(each.mine)}" for each in found]
    return "\n".join(["configuration changed since the checkpoint (old -> new):", *lines])
