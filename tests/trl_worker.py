"""One of two gloo ranks that hold half a group each: what Trust-GRPO pays there.

RANK=0 WORLD_SIZE=2 MASTER_ADDR=127.0.0.1 MASTER_PORT=... python trl_worker.py OUT
"""

import os
import sys
from pathlib import Path

import torch
from test_trl_trust import OUTCOME, THINKING, Known, scored_batch
from trl_tiny import trainer

from reasonrl.integrations.trl import Trust

out, rank = Path(sys.argv[1]), int(os.environ["RANK"])
known = Known()
t = trainer(
    out / f"rank-{rank}",
    per_device_train_batch_size=4,
    num_generations=8,
    reward_funcs=known.outcome,
    thinking=known,
)
t.state.global_step, t.state.max_steps = 749, 1500
half = slice(4 * rank, 4 * rank + 4)
output = scored_batch(t, OUTCOME[half], THINKING[half])
found = {
    "advantages": output["advantages"],
    "table": list(t._logs["advantages"]),
    "thinking": list(t._logs["extra"]["thinking"]),
    "asked": known.asked,
    "metrics": {k: v[-1] for k, v in t._metrics["train"].items()},
}
known.asked = []
t.thinking.trust = Trust(anneal=False, score_wrong=False)
found["released"] = scored_batch(t, OUTCOME[half], THINKING[half])["advantages"]
found["released asked"] = list(known.asked)
known.problems, t.num_generations, t.thinking.trust = [], 4, Trust()
scored_batch(t, [1.0, 0.0] * 3, [0.5] * 6, first=6 * rank)  # a group and a half each
found["problems"] = known.problems
torch.save(found, out / f"{rank}.pt")
# everything is written; a rank has died by SIGABRT after that, as in heads_worker.py
sys.stdout.flush()
sys.stderr.flush()
os._exit(0)
