"""The formats of data rows; cheap to import."""

from typing import Literal, TypeAlias


RowFormat: TypeAlias = Literal["auto", "llava", "sharegpt", "messages", "cauldron"]
