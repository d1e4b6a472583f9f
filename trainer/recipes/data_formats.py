"""The formats that a data source's rows may have; imports nothing heavy, so the command line can name them."""

from typing import Literal, get_args


DataFormat = Literal["llava", "sharegpt", "messages", "cauldron"]
FORMATS: tuple[DataFormat, ...] = get_args(DataFormat)
