"""megamult's model and optimizer in your own DeepSpeed training loop.

    deepspeed --num_gpus 2 examples/own_loop.py

Every parameter must have a spec. The modules of megamult.layers and megamult.models state the specs of their
parameters. For your own module, state the specs with `megamult.parameters.stated.set_spec`.
"""

import megamult  # before the others: it keeps off the screen what they say and nobody can act on

# isort: split
import deepspeed
import torch

from megamult.distributed import device, start
from megamult.models.llama.config import ModelConfig
from megamult.models.llama.model import GPT
from megamult.zero.attach import attach

VOCAB = 1000

mesh = start.initialize(tensor=1)
model = GPT(ModelConfig(num_layers=2, seq_length=64), VOCAB, seed=1).to(device.local_device())

# Muon for the blocks' matrices, AdamW for everything else; megamult.TwoPhaseAdamW takes the same groups.
groups = megamult.param_groups(model, lr=1e-3, weight_decay=0.1)
optimizer = megamult.DistributedMuon(groups, clip_grad_norm=1.0, model=model)
settings = {
    "train_micro_batch_size_per_gpu": 4,
    "zero_optimization": {"stage": 1},
    "zero_allow_untested_optimizer": True,
    "gradient_clipping": 0.0,  # DeepSpeed's default is 1.0, but here the optimizer clips
}
with optimizer.paused():  # DeepSpeed may call step() while the engine is constructed
    engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=settings, mpu=mesh.mpu)
attach(engine, optimizer)  # now engine.step() first clips gradients, by one norm over all groups but multipliers

ranks = torch.distributed.get_world_size()
torch.manual_seed(1 + torch.distributed.get_rank())  # other data on each rank, and the same in each start
text = torch.randint(0, VOCAB, (4, 65)).to(device.local_device())  # drawn on the CPU, so that a GPU gets the same
for step in range(10):
    objective, cross_entropy = engine(text[:, :-1], text[:, 1:].contiguous())
    engine.backward(objective)
    engine.step()
    mean = cross_entropy.detach().clone()
    torch.distributed.all_reduce(mean)
    if torch.distributed.get_rank() == 0:
        print(f"step {step}: cross entropy {mean.item() / ranks:.4f}, gradient norm {optimizer.norms.main:.4f}")
start.destroy()
