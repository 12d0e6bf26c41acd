"""Modules that a rank needs, imported once for all of them: `tests/processes.py` forks ranks from a server that has
imported this one. It must start no thread and no process group, which a fork would not survive."""

# ruff: noqa: F401

from __future__ import annotations

import atexit
import gc
import os

import deepspeed.runtime.engine
import jsonargparse
import megatron.core.models.gpt
import pytest
import torch._inductor.compile_fx
import torch.utils.tensorboard

import megamult.distributed.rendezvous
import megamult.optim.muon.rule
import megamult.train.deepspeed_engine
import megamult.train.pretrain
import megamult.train.run
from megamult.models.common import draw

SERVER = os.getpid()
"""Process that has imported these modules; in a rank, its parent."""

draw._coefficients()  # takes most of a second, once per process

# What the collector touches after a fork is copied.
gc.collect()
gc.freeze()
# Leave without the interpreter's clean-up, in which Triton's bindings print what they have leaked.
atexit.register(os._exit, 0)
