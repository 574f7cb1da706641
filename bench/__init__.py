"""Benchmarks against named rivals, each behind a correctness gate: `python -m bench [NAME]`."""
