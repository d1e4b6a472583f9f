"""Where a user's caches are."""

import os
from pathlib import Path


def user_cache(name: str) -> Path:
    """The folder `llava-llama31/NAME` under the user's cache folder."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "llava-llama31" / name
