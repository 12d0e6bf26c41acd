"""Differences between the configuration in a checkpoint and that of the run that resumes from the checkpoint.

They reveal overrides that the user has forgotten to repeat.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from megamult.config import Config
from megamult.settings import differences, run_settings, shown

_NOT_COMPARED = ("checkpoint.load",)
"""Keys that are not compared. A run always prints which checkpoint it resumes from, whatever `checkpoint.load` is."""


def changes(before: Mapping[str, Any], config: Config) -> str | None:
    """Return a heading, then one line "key  old -> new" for each key whose value differs, or None if no value differs.

    A key that the checkpoint's configuration does not have counts as having its default value there.

    Args:
        before: the configuration in the checkpoint, as nested mappings.
        config: the configuration of the run.
    """
    now, old = run_settings(dataclasses.asdict(config)), run_settings(before)
    old = {key: value for key, value in run_settings(dataclasses.asdict(Config())).items() if key in now} | old
    found = [each for each in differences(now, old) if each.key not in _NOT_COMPARED]
    if not found:
        return None
    width = max(len(each.key) for each in found)
    lines = [f"  {each.key:<{width}}  {shown(each.its)} -> {shown(each.mine)}" for each in found]
    return "\n".join(["configuration changed since the checkpoint (old -> new):", *lines])
