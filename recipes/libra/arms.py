"""The arms of measure.py: what they run and what is compared with what."""

from __future__ import annotations

import json

OPTIONS = {"terms": 3, "ops": "+-*", "mod": 7, "low": 0, "high": 6, "style": "compact"}
TASK = f"task_options={json.dumps(OPTIONS)}"
SMALL = "model_options={width: 64, layers: 2, heads: 2}"
OTHER = "model_options={width: 96, layers: 3, heads: 3}"
PROBLEMS = 500  # held-out problems of the policy
COLD = ["cold_start_steps=600", "cold_start.batch=32", "cold_start.learning_rate=3e-3", "steps=0"]
OTHER_COLD = [
    "steps=0",
    "cold_start_steps=500",
    "cold_start.batch=32",
    "cold_start.learning_rate=2e-3",
]
GOLD = ["steps=220", "eval.at_start=false", "prompts_per_step=32", "learning_rate=3e-3"]
LONG = ["steps=800", *GOLD[1:]]
SFT = ["steps=300", "eval.at_start=false", "prompts_per_step=32", "learning_rate=1e-3"]
RL = ["steps=80", "eval.at_start=false", "learning_rate=1e-4", "log.completions_every=0"]
FREE = ["algo.l_exp=null", "algo.l_max=null"]  # RL has 32 and 48
DEAR = ["algo.l_exp=8", "algo.l_max=32"]
DPO = ["steps=60", "prompts_per_step=16", "learning_rate=1e-4", "eval_problems=0"]
ONLINE = ["cold_start_steps=0", "steps=40", "prompts_per_step=16", "learning_rate=3e-4"]
ONLINE += ["algo.votes=2", "eval.at_start=false", "log.completions_every=0"]
# arm: (stage, the arm it starts from, its own words); "mix" is the seed's file of other reasoning,
# "other" and "pool" the judged answers that it learns from in place of the policy's own
ARMS = {
    "gold": ("gold", "base", GOLD),
    "sft": ("sft", "gold", ["--mix", "mix", *SFT]),
    "rl": ("rl", "sft", RL),
    "plain": ("gold", "base", ["--no-thinking", *GOLD]),
    "long": ("gold", "base", LONG),
    "plain_long": ("gold", "base", ["--no-thinking", *LONG]),
    "no_sft": ("rl", "gold", RL),
    "no_rejection": ("sft", "gold", ["--mix", "mix", "--no-rejection", *SFT]),
    "no_mix": ("sft", "gold", SFT),
    "wordy": ("forms", "long", SFT),
    "wordy_free": ("rl", "wordy", [*RL, *FREE]),
    "wordy_rl": ("rl", "wordy", RL),
    "wordy_dear": ("rl", "wordy", [*RL, *DEAR]),
    "long_other": ("gold", "base", ["other", *LONG]),
    "long_pool": ("gold", "base", ["pool", *LONG]),
}
CROSS = ("long", "long_other", "long_pool")  # asked about the answers of both models
# what a policy learns: (how, the judge)
USES = {"dpo": ("dpo", "long"), "online": ("online", "long")}
USES |= {f"{how}_{j}": (how, j) for j in ("gold", "sft", "plain_long") for how in USES}
# what is compared with what, in the table
PAIRS = [
    ("sft", "gold", "rejection sampling"),
    ("rl", "gold", "both stages"),
    ("rl", "sft", "RL after it"),
    ("gold", "plain", "thinking over none, 220 steps by rule"),
    ("long", "plain_long", "thinking over none, 800 steps by rule"),
    ("long", "gold", "800 steps by rule over 220"),
    ("rl", "no_sft", "RL with SFT before it over RL alone"),
    ("sft", "no_rejection", "keeping the agreeing judgements over keeping all"),
    ("sft", "no_mix", "other reasoning mixed in over none"),
    ("wordy_free", "wordy", "RL without a price from a judge of three lengths"),
    ("wordy_rl", "wordy_free", "there, a price from 32 to 48 tokens over none"),
    ("wordy_dear", "wordy_free", "there, a price from 8 to 32 tokens over none"),
    ("dpo", "base", "DPO on the judge's pairs over the policy"),
    ("online", "base", "train libra with the judge over the policy"),
]
PAIRS += [(use, "base", f"the same, judge {by}") for use, (_, by) in USES.items() if by != "long"]
LENGTHS = ("wordy", "wordy_free", "wordy_rl", "wordy_dear")
