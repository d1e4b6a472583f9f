"""Answer and question tables as evaluators write them."""

from pathlib import Path
from typing import Any

import openpyxl


def write_xlsx(path: Path, rows: list[dict[str, Any]]) -> str:
    book = openpyxl.Workbook()
    book.active.append(list(rows[0]))
    for row in rows:
        book.active.append(list(row.values()))
    book.save(path)
    return str(path)
