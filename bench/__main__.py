"""`python -m bench NAME [options]` runs one benchmark; without a name all that there are.

Exit status 0, 1 where a gate is red, 2 for wrong usage or a rival that is not installed.
"""

from __future__ import annotations

import importlib
import importlib.util
import sys
from collections.abc import Sequence

# the module bench.<name> has main(arguments) -> exit status
NAMES = ("ops", "builds", "tiles", "step", "prime", "serve", "memory", "trust", "trl", "loop")


def main(arguments: Sequence[str]) -> int:
    present = [name for name in NAMES if importlib.util.find_spec(f"bench.{name}")]
    name, *rest = arguments or [""]
    if name and name not in present:
        print(f"bench: expected one of {', '.join(present)}, got {name!r}", file=sys.stderr)
        return 2
    chosen = [name] if name else present
    return max(importlib.import_module(f"bench.{each}").main(rest) for each in chosen)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
