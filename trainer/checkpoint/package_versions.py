"""Versions of installed packages."""

from functools import cache
from importlib import metadata


@cache
def package_version(name: str) -> str:
    """An installed package's version; its metadata is parsed once.

    Raises:
        PackageNotFoundError: it is not installed.
    """
    return metadata.version(name)
