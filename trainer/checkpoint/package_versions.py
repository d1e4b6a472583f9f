"""Versions of installed packages."""

from functools import cache


@cache
def package_version(name: str) -> str:
    """An installed package's version; its metadata is parsed once.

    Raises:
        PackageNotFoundError: it is not installed.
    """
    from importlib import metadata  # a sixth of what every command imports before it answers `--help`

    return metadata.version(name)
