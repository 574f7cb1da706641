"""What a process that learns on a CPU does with the memory it frees: it keeps it.

A step frees gigabytes and asks for them again. glibc gives large pieces back at once, and fresh
pages cost a fault each: without them an update of SmolLM2-135M takes a sixth (8 prompts) to a
quarter (2) less time on a virtual machine, and no more memory, since rollouts and updates take
turns in the same heap. Other processes get that memory only when this one ends.
"""

from __future__ import annotations

import ctypes
import os

NEVER = {-1: -1, -4: 0}  # M_TRIM_THRESHOLD: none given back; M_MMAP_MAX: no piece stands alone
OWN = ("MALLOC_", "GLIBC_TUNABLES")  # of somebody who has decided it already


def keep() -> bool:
    """From now on in this process; False where the C library is another, or the environment says
    how its heap behaves."""
    if any(name.startswith(OWN) for name in os.environ):
        return False
    try:
        option = ctypes.CDLL(None).mallopt
    except (AttributeError, OSError):
        return False
    return all([option(what, value) == 1 for what, value in NEVER.items()])
