"""Which version of a host is installed, and a word about one that nobody has tried."""

from __future__ import annotations

import warnings
from functools import cache
from importlib import metadata


@cache
def host_version(package: str, tested: str) -> str | None:
    """The installed version of a host, None without it; another one than tested warns once."""
    try:
        version = metadata.version(package)
    except metadata.PackageNotFoundError:
        return None
    if not f"{version}.".startswith(f"{tested}."):
        warnings.warn(f"reasonrl: tested with {package} {tested}, found {version}", stacklevel=3)
    return version
