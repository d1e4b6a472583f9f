"""The formats that a source's rows may have, and the largest image; imports nothing, so `--help` can name them."""

from typing import Literal, get_args


DataFormat = Literal["llava", "sharegpt", "messages", "cauldron"]
FORMATS: tuple[DataFormat, ...] = get_args(DataFormat)

# height x width of an image that is read where nothing else is said
MAX_PIXELS = 40_000_000
