"""Our loss under FSDP2: python examples/fsdp2.py, or torchrun --nproc-per-node 2 examples/fsdp2.py

The head is called inside the model's forward, where FSDP2 has gathered it; its gradient is reduced
to the shards like any other.
"""

import common
import torch
import torch.distributed as dist
from torch.distributed.fsdp import fully_shard

if dist.is_torchelastic_launched():
    dist.init_process_group()
else:
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
model = common.model()
batch = common.batch(model, dist.get_rank())
for layer in model.model.layers:
    fully_shard(layer)
fully_shard(model)
optimizer = torch.optim.AdamW(model.parameters(), lr=common.RATE)
tokens = batch["mask"].sum().float()
dist.all_reduce(tokens)
for step in range(common.STEPS):
    loss = common.loss(model, batch, denominator=tokens / dist.get_world_size())
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    print(f"step {step} loss {loss.item():.5f}")
dist.destroy_process_group()
