"""The small model of the tests, and samples to train it on."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from megamult.models.common.config import DecoderConfig
from megamult.models.falcon_h1.config import FalconH1Config
from megamult.models.llama.config import ModelConfig

VOCAB = 200
"""Not a multiple of 128: the last rows are padding, on the last tensor-parallel rank."""

SMALL = ModelConfig(
    num_layers=2, hidden_size=96, num_attention_heads=12, num_query_groups=2, ffn_hidden_size=132, seq_length=24
)
"""12 heads, 2 groups: tensor parallel 4 cuts through a query group. No size is a power of two."""

_ATTENTION: dict[str, Any] = {
    "hidden_size": 48,
    "head_dim": 6,
    "num_attention_heads": 12,
    "num_query_groups": 2,
    "ffn_hidden_size": 68,
    "seq_length": 24,
    "init_std": 0.15,  # so that B and C have gradients far above the eps of AdamW
    "ssm_state_size": 10,
    "ssm_chunk": 16,
}
MODELS: dict[str, DecoderConfig] = {
    "llama": SMALL,
    # One group: with tensor parallelism all ranks have copies of B and C.
    "falcon_h1": FalconH1Config(**_ATTENTION, num_layers=1, ssm_heads=4, ssm_head_dim=12),
    # Layers of every kind; two groups, and an inner norm over channels of several ranks at tensor parallel 4.
    "hybrid": FalconH1Config(
        **_ATTENTION,
        num_layers=4,
        layers="M-H*",
        ssm_heads=8,
        ssm_head_dim=6,
        ssm_groups=2,
        ssm_kernel=3,
        ssm_norm="after_gate",
    ),
}
"""Small models by name."""


class Samples:
    """Sample i: random tokens. Remembers which ones were asked for.

    Args:
        period: sample i + period is sample i: there is something to learn from few samples. None: all are different.
        offset: the first sample is that of this number; a second set of samples has another one.
        skewed: whether small ids are more frequent: then there is something to learn though all samples differ.
    """

    def __init__(
        self, vocab_size: int, seq_length: int, period: int | None = None, offset: int = 0, skewed: bool = False
    ) -> None:
        self.vocab_size, self.seq_length, self.period, self.offset = vocab_size, seq_length, period, offset
        self.skewed = skewed
        self.seen: list[int] = []

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        self.seen.append(index)
        number = self.offset + (index if self.period is None else index % self.period)
        generator = torch.Generator().manual_seed(number)
        text = torch.randint(0, self.vocab_size, (self.seq_length + 1,), generator=generator)
        if self.skewed:
            text = text**2 // self.vocab_size
        return {"tokens": text[:-1], "labels": text[1:]}

    def prepare(self, first: int, last: int, barrier: Callable[[], None], end: int) -> None:
        """Nothing to open."""

    def state_dict(self) -> dict[str, Any]:
        """None is needed."""
        return {}

    def load_state_dict(self, state: dict[str, Any], samples: int) -> list[str]:
        """None is needed."""
        return []


class ValidSamples(Samples):
    """A validation set of `count` samples, which count alike."""

    def __init__(self, count: int, vocab_size: int, seq_length: int, offset: int = 0) -> None:
        super().__init__(vocab_size, seq_length, offset=offset)
        self.count = count

    def __len__(self) -> int:
        return self.count

    def weight(self, index: int) -> float:
        """Weight of a sample in the loss; 0 for those that only fill a micro-batch."""
        return 1 / self.count if index < self.count else 0.0

    def prepare(self, barrier: Callable[[], None]) -> None:  # type: ignore[override]
        """Nothing to open."""
