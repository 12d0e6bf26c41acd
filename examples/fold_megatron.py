"""Learnable multipliers for Megatron-Core's own GPTModel: three lines in a DeepSpeed script, no change to the model.

    deepspeed --num_gpus 2 examples/fold_megatron.py --tensor 2
    python examples/fold_megatron.py                         # one process

A small GPTModel with Megatron's local layer spec learns one random batch. Embedding and head are padded to 1,024
tokens. `start.initialize` sets up Megatron's process groups and, if there is no GPU, lets its modules run on a CPU.
"""

import argparse

import megamult  # before the others: it keeps off the screen what they say and nobody can act on

# isort: split
import deepspeed
import torch
from megatron.core.models.gpt import GPTModel
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
from megatron.core.transformer import TransformerConfig

from megamult.distributed import device, start
from megamult.distributed.mesh import current_mesh

SEQUENCES, TOKENS, VOCAB = 8, 32, 1000

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("--tensor", type=int, default=1, help="tensor-parallel size")
parser.add_argument("--local_rank", help="DeepSpeed's launcher adds it")
arguments = parser.parse_args()
mesh = start.initialize(tensor=arguments.tensor)
torch.manual_seed(1)  # use_cpu_initialization draws whole weights and slices them: they are the same for any --tensor
config = TransformerConfig(
    num_layers=2,
    hidden_size=64,
    num_attention_heads=4,
    num_query_groups=2,
    ffn_hidden_size=176,
    tensor_model_parallel_size=arguments.tensor,
    gated_linear_unit=True,
    activation_func=torch.nn.functional.silu,
    normalization="RMSNorm",
    add_bias_linear=False,
    hidden_dropout=0.0,
    attention_dropout=0.0,
    use_cpu_initialization=True,
    gradient_accumulation_fusion=False,
)
model = GPTModel(
    config,
    get_gpt_layer_local_spec(normalization="RMSNorm"),
    vocab_size=1024,
    max_sequence_length=TOKENS,
    position_embedding_type="rope",
    share_embeddings_and_output_weights=False,
)
rank, ranks = current_mesh().groups["data"].rank(), current_mesh().groups["data"].size()
settings = {
    "train_micro_batch_size_per_gpu": SEQUENCES // ranks,
    "zero_optimization": {"stage": 1},
    "zero_allow_untested_optimizer": True,
    "gradient_clipping": 0.0,  # DeepSpeed's default is 1.0, but here the optimizer clips
}

rules = megamult.megatron_rules(config, VOCAB)
optimizer = megamult.fold({"name": "muon", "lr": 5e-3, "clip_grad_norm": 1.0}, model, rules)
engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=settings, mpu=mesh.mpu)
megamult.attach(engine, optimizer)  # now engine.step() trains W and multipliers, and writes W_eff to the model

here = device.local_device()
torch.manual_seed(2)
text = torch.randint(0, VOCAB, (SEQUENCES, TOKENS + 1))[rank::ranks].to(here)
positions = torch.arange(TOKENS, device=here).expand(len(text), -1)
# Causal mask: True marks positions that must not be seen. Megatron can make the mask itself, but only on a GPU.
future = torch.ones(1, 1, TOKENS, TOKENS, dtype=torch.bool, device=here).triu(1)
for step in range(10):
    loss = engine(text[:, :-1], positions, future, labels=text[:, 1:].contiguous()).mean()
    engine.backward(loss)
    engine.step()
    mean = loss.detach().clone()
    torch.distributed.all_reduce(mean, group=current_mesh().groups["data"])
    values = optimizer.folded.values
    if torch.distributed.get_rank() == 0:
        print(f"step {step}: loss {mean / ranks:.4f}, multipliers {values.min():.4f} to {values.max():.4f}")
for vector in optimizer.folded.vectors:
    multipliers = optimizer.folded.values[vector.entries]
    if torch.distributed.get_rank() == 0 and ".layers.1." not in vector.name:
        print(f"{vector.name:52} [{len(multipliers):4}]  mean {multipliers.mean():.4f}, spread {multipliers.std():.4f}")
start.destroy()
