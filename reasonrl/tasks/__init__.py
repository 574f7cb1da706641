"""Tasks: where problems come from and how completions are graded. TASKS is the table."""

from reasonrl.tasks.base import SPLITS, Draws, Task, split_of
from reasonrl.tasks.table import TASKS, make_task

__all__ = ["SPLITS", "TASKS", "Draws", "Task", "make_task", "split_of"]
