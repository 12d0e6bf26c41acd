"""Corpora and checkpoints that a run must refuse."""

from __future__ import annotations

import dataclasses
import shutil
import struct
from pathlib import Path

import numpy as np
import torch

from megamult.checkpoint import saved
from megamult.checkpoint.chunks import Chunk
from megamult.checkpoint.info import CheckpointInfo
from megamult.config import Config
from megamult.models.llama.config import ModelConfig
from megamult.optim.config import OptimizerConfig
from megamult.train.config import TrainConfig
from tests.train.command import VOCAB


def make_long(prefix: Path) -> None:
    """A corpus without a stamp, with a token outside the vocabulary between the samples that a start looks at."""
    lengths = np.full(300, 1000, "<i4")
    ids = np.ones(300_000, "<u2")
    ids[5000] = VOCAB
    prefix.with_suffix(".bin").write_bytes(ids.tobytes())
    pointers, bounds = np.arange(300, dtype="<i8") * 2000, np.arange(301, dtype="<i8")
    header = b"MMIDIDX\0\0" + struct.pack("<QBQQ", 1, 8, 300, 301)
    prefix.with_suffix(".idx").write_bytes(header + lengths.tobytes() + pointers.tobytes() + bounds.tobytes())


def make_checkpoints(folder: Path) -> None:
    """One of another run; one that fits, but for its tensors, and damaged copies of it."""
    theirs = Config(
        model=ModelConfig(num_layers=3, hidden_size=128, num_query_groups=4, seq_length=32, tie_embeddings=True),
        optimizer=OptimizerConfig(name="muon"),
        train=TrainConfig(seed=7),
    )
    info = CheckpointInfo(
        step=1,
        samples=16,
        config=dataclasses.asdict(theirs),
        vocab_size=500,
        tokenizer_sha256="0" * 64,
        optimizer={"name": "muon", "updates": 1, "skipped_steps": 0},
    )
    chunks = [Chunk.whole("model.x", torch.arange(1000.0))]
    saved.write(folder / "saved/whole", chunks, info, {})
    ours = Config(model=ModelConfig(seq_length=32))
    fits = CheckpointInfo(
        step=1,
        samples=16,
        config=dataclasses.asdict(ours),
        vocab_size=VOCAB,
        optimizer={"name": "adamw", "updates": 1, "skipped_steps": 0},
    )
    saved.write(folder / "saved/fits", chunks, fits, {})
    # Imports of a model without a sentencepiece model, by this version and by one that kept no digest of such.
    ids = {"hf_tokenizer/tokenizer.json": b"{}"}
    kept = {"tokenizer_files": "hf_tokenizer/tokenizer.json", "tokenizer_sha256": "0" * 64}
    for name, known in (("imported", kept), ("imported_before", {})):
        begun = dataclasses.replace(fits, step=0, samples=0, optimizer=None, **known)
        saved.write(folder / "saved" / name, chunks, begun, ids)
    shard = "shard_00000_0000.safetensors"
    for name in ("cut", "flipped", "lost", "unlisted"):
        shutil.copytree(folder / "saved/fits", folder / "saved" / name)
    (folder / "saved/cut" / shard).write_bytes((folder / "saved/cut" / shard).read_bytes()[:-1])
    description = bytearray((folder / "saved/flipped/checkpoint.json").read_bytes())
    description[description.index(b"16") + 1] ^= 1  # 17: still JSON
    (folder / "saved/flipped/checkpoint.json").write_bytes(description)
    (folder / "saved/lost" / shard).unlink()
    (folder / "saved/unlisted/SHA256SUMS").unlink()
    for step, name in ((1, "cut"), (2, "lost")):
        shutil.copytree(folder / "saved" / name, folder / f"broken/checkpoints/step_{step}")
