"""Our loss in a plain PyTorch loop: python examples/plain_pytorch.py"""

import common
import torch

model = common.model()
optimizer = torch.optim.AdamW(model.parameters(), lr=common.RATE)
batch = common.batch(model)
for step in range(common.STEPS):
    loss = common.loss(model, batch)
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    print(f"step {step} loss {loss.item():.5f}")
