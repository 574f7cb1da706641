"""What a worker process does to itself before it meets text or files that nobody vouches for.

Imported by path, in the workers alone: its folder is on their `sys.path` for that one import.
"""

from __future__ import annotations

import resource
import time

SLACK = 2  # seconds of CPU beyond the wall limit of a task


def limits(memory: int, written: int = 0) -> None:
    """Set the limits and look whether they hold; a worker without them does not start. written:
    bytes that may be written to a file."""
    wanted = {
        resource.RLIMIT_AS: memory,
        resource.RLIMIT_FSIZE: written,
        resource.RLIMIT_CORE: 0,
        resource.RLIMIT_NOFILE: 64,
    }
    for kind, value in wanted.items():
        hard = resource.getrlimit(kind)[1]
        value = value if hard == resource.RLIM_INFINITY else min(value, hard)
        resource.setrlimit(kind, (value, value))
        if resource.getrlimit(kind) != (value, value):
            raise SystemExit("a resource limit did not take effect")


def cpu_limit(timeout: float) -> None:
    """Seconds of CPU for the next task."""
    used = int(time.process_time())
    soft, hard = used + int(timeout) + 1 + SLACK, resource.getrlimit(resource.RLIMIT_CPU)[1]
    if hard == resource.RLIM_INFINITY or soft < hard:
        resource.setrlimit(resource.RLIMIT_CPU, (soft, hard))
