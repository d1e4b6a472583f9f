"""Versions of installed packages."""

from functools import cache


@cache
def package_version(name: str) -> str:
    """An installed package's version; its metadata is parsed once.

    Raises:
        PackageNotFoundError: it is not installed.
    """
    from importlib import metadata  # which imports `email`: a sixth of the time of --help

    return metadata.version(name)
