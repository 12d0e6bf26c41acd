"""Speed of Falcon-H1: our mixer over transformers' in pure torch, and a training step over that of a Llama.

    python examples/benchmarks/falcon_h1.py                    # both comparisons
    python examples/benchmarks/falcon_h1.py --compare mixer    # only one

Mixer: forward and backward of one mixer, ours and transformers' FalconH1Mixer (its fallback where no kernels are
installed), in turn; the time is the median over --repeat turns. Memory is what autograd keeps of one forward pass, in
bytes of distinct tensors, weights included. Step: optimizer steps of a small Falcon-H1 and of a Llama of the same
width, depth and number of parameters, both without multipliers, in turn.
"""

from __future__ import annotations

import argparse
import math
import statistics
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor
from turns import in_turn

from megamult.config import Config
from megamult.distributed import device, start
from megamult.models.architectures import architecture_of
from megamult.models.common.config import DecoderConfig
from megamult.models.common.mamba2.sizes import MixerSizes
from megamult.models.falcon_h1.config import FalconH1Config
from megamult.models.llama.config import ModelConfig
from megamult.multipliers.config import MultipliersConfig
from megamult.train.config import TrainConfig
from megamult.train.deepspeed_engine import DeepSpeedEngine, build

VOCAB = 4096


def medians(calls: dict[str, Callable[[], object]], repeat: int) -> dict[str, float]:
    """Return the median time in seconds of each call. One of each comes first and is not timed."""
    return {name: statistics.median(each) for name, each in in_turn(calls, 1, repeat).items()}


def kept_bytes(forward: Callable[[], Tensor]) -> int:
    """Return the bytes of all tensors that autograd keeps of a forward pass; those that share memory count once."""
    seen: dict[int, int] = {}

    def keep(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        seen[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        output = forward()
    del output
    return sum(seen.values())


def mixers(arguments: argparse.Namespace) -> dict[str, Callable[[], Tensor]]:
    """Return the forward pass of one mixer of each kind, with sizes of the arguments."""
    from megatron.core.process_groups_config import ProcessGroupCollection
    from transformers.models.falcon_h1.configuration_falcon_h1 import FalconH1Config as TheirConfig
    from transformers.models.falcon_h1.modeling_falcon_h1 import FalconH1Mixer

    from megamult.models.common.decoder import transformer_config
    from megamult.models.common.mamba2.mixer import Mixer

    here = device.local_device()
    sizes = MixerSizes(arguments.heads, arguments.head_dim, arguments.state, 1, chunk=arguments.chunk)
    common = {"hidden_size": arguments.hidden, "num_attention_heads": 2}
    transformer = transformer_config(FalconH1Config(**common), torch.float32, 1, False)
    group = ProcessGroupCollection.use_mpu_process_groups().tp
    ours = Mixer(transformer, sizes, {}, group)
    theirs = FalconH1Mixer(
        TheirConfig(
            hidden_size=arguments.hidden,
            mamba_d_ssm=sizes.inner,
            mamba_n_heads=sizes.heads,
            mamba_d_head=sizes.head_dim,
            mamba_d_state=sizes.state,
            mamba_n_groups=1,
            mamba_chunk_size=sizes.chunk,
            mamba_rms_norm=False,
            num_hidden_layers=1,
        ),
        layer_idx=0,
    )
    theirs.register_buffer("mup_vector", torch.ones(1, 1, sum(sizes.rows)))  # which transformers' layer makes for it
    theirs.to(here)
    with torch.no_grad():
        for parameter in (*ours.parameters(), *theirs.parameters()):
            torch.nn.init.uniform_(parameter, -0.02, 0.02)
    x = torch.randn(arguments.batch, arguments.seq, arguments.hidden, device=here, requires_grad=True)
    return {
        "megamult": lambda: ours(x.transpose(0, 1)),
        "transformers": lambda: theirs(x),
    }


def compare_mixers(arguments: argparse.Namespace) -> None:
    """Print times and memory of both mixers."""
    forward = mixers(arguments)
    times = medians(
        {name: lambda each=each: each().sum().backward() for name, each in forward.items()}, arguments.repeat
    )
    ratio = times["transformers"] / times["megamult"]
    for name, each in forward.items():
        kept = kept_bytes(each) / 1e6
        print(f"mixer, {name}: {times[name]:.3f} s forward and backward, {kept:.1f} MB kept for backward")
    print(f"mixer: {ratio:.2f} times as fast as transformers' (medians of {arguments.repeat})")


def number_of(sizes: DecoderConfig) -> int:
    """Return the number of a model's parameters."""
    return sum(math.prod(weight.shape) for weight in architecture_of(sizes).weights(sizes, VOCAB))


def pair(arguments: argparse.Namespace) -> dict[str, DecoderConfig]:
    """Return a small Falcon-H1, and a Llama with an MLP so wide that it has as many parameters."""
    common: dict[str, Any] = {
        "num_layers": arguments.layers,
        "hidden_size": arguments.hidden,
        "num_attention_heads": 6,
        "num_query_groups": 2,
        "seq_length": arguments.seq,
    }
    hybrid = FalconH1Config(
        **common,
        ffn_hidden_size=2 * arguments.hidden,
        ssm_heads=arguments.heads,
        ssm_head_dim=arguments.head_dim,
        ssm_state_size=arguments.state,
        ssm_chunk=arguments.chunk,
    )
    llama = ModelConfig(**common, ffn_hidden_size=2 * arguments.hidden)
    missing = (number_of(hybrid) - number_of(llama)) / (arguments.layers * 3 * arguments.hidden)
    return {"falcon_h1": hybrid, "llama": replace(llama, ffn_hidden_size=llama.ffn_hidden_size + round(missing))}


def engine_of(sizes: DecoderConfig, batch: int) -> DeepSpeedEngine:
    """Return an engine that trains a model without multipliers in one process."""
    train = TrainConfig(global_batch_size=batch, micro_batch_size=batch, dtype="fp32")
    config = Config(model=sizes, multipliers=MultipliersConfig("none"), train=train)
    return build(config, VOCAB, start.initialize(1))


def optimizer_step(engine: DeepSpeedEngine, tokens: Tensor, labels: Tensor) -> None:
    """Take one optimizer step with one micro-batch."""
    objective, _ = engine.deepspeed(tokens, labels)
    engine.deepspeed.backward(objective)
    engine.deepspeed.step()


def compare_steps(arguments: argparse.Namespace) -> None:
    """Print the times of a step of both models."""
    sizes = pair(arguments)
    engines = {name: engine_of(each, arguments.batch) for name, each in sizes.items()}
    text = torch.randint(0, VOCAB, (arguments.batch, arguments.seq + 1), device=device.local_device())
    tokens, labels = text[:, :-1].contiguous(), text[:, 1:].contiguous()
    calls = {name: partial(optimizer_step, engine, tokens, labels) for name, engine in engines.items()}
    times = medians(calls, arguments.repeat)
    for name, each in sizes.items():
        print(f"step, {name}: {times[name]:.3f} s, {number_of(each):,} parameters")
    ratio = times["falcon_h1"] / times["llama"]
    print(f"step: {ratio:.2f} times as long as a Llama's (medians of {arguments.repeat})")


def main() -> None:
    """Run the comparisons."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--compare", choices=["mixer", "step", "both"], default="both")
    for name, default in (
        ("batch", 16),
        ("seq", 128),
        ("hidden", 192),
        ("layers", 4),
        ("heads", 6),
        ("head_dim", 32),
        ("state", 64),
        ("chunk", 64),
        ("repeat", 5),
    ):
        parser.add_argument(f"--{name}", type=int, default=default, help=f"default {default}")
    arguments = parser.parse_args()
    start.initialize(1)
    print(
        f"{arguments.seq} x {arguments.batch} tokens, hidden {arguments.hidden}, {arguments.heads} heads of "
        f"{arguments.head_dim}, state {arguments.state}, fp32, {device.local_device().type}, "
        f"{torch.get_num_threads()} threads"
    )
    if arguments.compare != "step":
        compare_mixers(arguments)
    if arguments.compare != "mixer":
        compare_steps(arguments)


if __name__ == "__main__":
    main()
