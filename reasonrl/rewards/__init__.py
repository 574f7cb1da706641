"""Scorers: text or tokens in, three-state scores out. Each scorer module is imported by its own
path."""

from reasonrl.records import Rewards, Score, infra, scored, unscorable
from reasonrl.rewards.code import verify_code
from reasonrl.rewards.verify import verify_math

__all__ = ["Rewards", "Score", "infra", "scored", "unscorable", "verify_code", "verify_math"]
