"""Our loss under DeepSpeed ZeRO-3: python examples/deepspeed_zero3.py, or the deepspeed launcher

The head is gathered inside its own module, as for any layer. On a CPU set DS_ACCELERATOR=cpu.
"""

import importlib
import os

import common
import deepspeed
import torch
import torch.distributed as dist

if not torch.cuda.is_available():  # spare a minute: DeepSpeed would compile a reduction for CPUs
    importlib.import_module("deepspeed.comm.torch").build_shm_op = lambda: None
if not dist.is_torchelastic_launched():
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
os.environ.setdefault("LOCAL_RANK", "0")
deepspeed.init_distributed(auto_mpi_discovery=False)
model = common.model()
batch = common.batch(model, dist.get_rank())
settings = {
    "train_micro_batch_size_per_gpu": common.GROUP,
    "zero_optimization": {"stage": 3},
    "zero_allow_untested_optimizer": True,
    "zero_force_ds_cpu_optimizer": False,
}
optimizer = torch.optim.AdamW(model.parameters(), lr=common.RATE)
engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=settings)
tokens = batch["mask"].sum().float()
dist.all_reduce(tokens)
for step in range(common.STEPS):
    loss = common.loss(engine, batch, denominator=tokens / dist.get_world_size())
    engine.backward(loss)
    engine.step()
    print(f"step {step} loss {loss.item():.5f}")
dist.destroy_process_group()
