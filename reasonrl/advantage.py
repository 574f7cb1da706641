"""Rewards to advantages: groups, process returns, steps, whitening. Pure, and without gradient to a
reward.

The functions live behind the door (`reasonrl.ops`), which picks an implementation; here is their
home in the house. GRPO (arXiv 2402.03300), leave-one-out (2402.14740), Dr. GRPO (2503.20783), PRIME
(2502.01456 eq. 5, 7, 8).
"""

from reasonrl.ops import (
    group_advantage,
    prime_advantage,
    returns,
    step_expand,
    step_reduce,
    whiten,
)

__all__ = [
    "group_advantage",
    "prime_advantage",
    "returns",
    "step_expand",
    "step_reduce",
    "whiten",
]
