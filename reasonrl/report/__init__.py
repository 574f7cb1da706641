"""The run page: what a run's files say, as one HTML file that needs nothing else."""

from reasonrl.report.page import write
from reasonrl.report.serve import serve

__all__ = ["serve", "write"]
