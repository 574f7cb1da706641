"""Our loss under accelerate: python examples/accelerate_ddp.py, or accelerate launch on many ranks

Ranks are averaged, so each divides its sum by its share of the tokens of all: then any number of
ranks and micro-batches gives the gradient of one.
"""

import common
import torch
from accelerate import Accelerator

accelerator = Accelerator(cpu=not torch.cuda.is_available())
model = common.model()
batch = common.batch(model, accelerator.process_index)
optimizer = torch.optim.AdamW(model.parameters(), lr=common.RATE)
model, optimizer = accelerator.prepare(model, optimizer)
batch = {name: value.to(accelerator.device) for name, value in batch.items()}
tokens = accelerator.reduce(batch["mask"].sum().float(), "sum")
for step in range(common.STEPS):
    loss = common.loss(model, batch, denominator=tokens / accelerator.num_processes)
    accelerator.backward(loss)
    optimizer.step()
    optimizer.zero_grad()
    shown = accelerator.reduce(loss.detach(), "mean").item()
    accelerator.print(f"step {step} loss {shown:.5f}")
