"""Learnable multipliers for a Hugging Face model: three lines in a DeepSpeed script, no change to the model.

    deepspeed --num_gpus 2 examples/fold_huggingface.py
    deepspeed --num_gpus 2 examples/fold_huggingface.py --stage 3
    python examples/fold_huggingface.py                      # one process

A small LlamaForCausalLM with random weights learns one random batch. With --stage 3 the model is built under
`deepspeed.zero.Init`, so no process ever holds the whole model. The example needs `transformers`: pip install
megamult[export].
"""

import argparse

import megamult  # before the others: it keeps off the screen what they say and nobody can act on

# isort: split
import deepspeed
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from megamult import noise
from megamult.distributed import environment, start

SEQUENCES, TOKENS, VOCAB = 8, 32, 1000

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("--stage", type=int, default=1, help="ZeRO stage")
parser.add_argument("--local_rank", help="DeepSpeed's launcher adds it")
arguments = parser.parse_args()
environment.set_defaults()  # a process without a launcher is the only rank
with noise.unprinted():  # on CPUs DeepSpeed prints a line in every process
    deepspeed.init_distributed(auto_mpi_discovery=False, verbose=False)
rank, ranks = torch.distributed.get_rank(), torch.distributed.get_world_size()
settings = {
    "train_micro_batch_size_per_gpu": SEQUENCES // ranks,
    "zero_optimization": {"stage": arguments.stage},
    "zero_allow_untested_optimizer": True,
    "gradient_clipping": 0.0,  # DeepSpeed's default is 1.0, but here the optimizer clips
}
torch.manual_seed(1)
with deepspeed.zero.Init(config_dict_or_path=settings, enabled=arguments.stage == 3):
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=VOCAB,
            hidden_size=64,
            intermediate_size=176,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
        )
    )
    if arguments.stage == 3:
        # transformers initialized the weights after ZeRO had partitioned them, so it got empty tensors. Initialize them
        # again: DeepSpeed's `apply` gathers the weights of each module first.
        model.apply(model._init_weights)

optimizer = megamult.fold({"name": "muon", "lr": 5e-3, "clip_grad_norm": 1.0}, model, megamult.LLAMA_RULES)
engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=settings)
megamult.attach(engine, optimizer)  # now engine.step() trains W and multipliers, and writes W_eff to the model

text = torch.randint(0, VOCAB, (SEQUENCES, TOKENS))[rank::ranks].to(engine.device)
for step in range(10):
    loss = engine(input_ids=text, labels=text).loss
    engine.backward(loss)
    engine.step()
    mean = loss.detach().clone()
    torch.distributed.all_reduce(mean)
    values = optimizer.folded.values
    if rank == 0:
        print(f"step {step}: loss {mean / ranks:.4f}, multipliers {values.min():.4f} to {values.max():.4f}")
for vector in optimizer.folded.vectors:
    multipliers = optimizer.folded.values[vector.entries]
    if rank == 0 and "layers." not in vector.name.replace("layers.0.", ""):  # all but those of later layers
        print(f"{vector.name:48} [{len(multipliers):4}]  mean {multipliers.mean():.4f}, spread {multipliers.std():.4f}")
start.destroy()
