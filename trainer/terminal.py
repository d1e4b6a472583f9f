"""The terminal: what data, models, paths and recipes say is shown there as plain text, never as markup or control."""

import io
import sys
from collections.abc import Collection, Iterable, Iterator, Sequence
from contextlib import contextmanager, redirect_stderr
from typing import TextIO

from rich.console import Console, HighlighterType, JustifyMethod, OverflowMethod
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    ProgressColumn,
    Task,
    TaskProgressColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.style import Style
from rich.table import Column, Table
from rich.text import Text
from rich.theme import Theme

from llava_llama31.trainer.redaction import plain, shown


_WIDEST = 100_000  # columns of a pipe or a file


class _PlainConsole(Console):
    """Reads no string as markup or emoji code, and escapes the control characters in it, cells of tables included."""

    def on_broken_pipe(self) -> None:
        raise  # called while the error is handled; by itself rich would end the process here

    def render_str(
        self,
        text: str,
        *,
        style: str | Style = "",
        justify: JustifyMethod | None = None,
        overflow: OverflowMethod | None = None,
        emoji: bool | None = None,
        markup: bool | None = None,
        highlight: bool | None = None,
        highlighter: HighlighterType | None = None,
    ) -> Text:
        return Text(shown(text), style=style, justify=justify, overflow=overflow)


class _WithoutBars(io.StringIO):
    """A stream without the states of a bar of tqdm, which begin with a carriage return, and without its line end."""

    def __init__(self, stream: TextIO):
        super().__init__()
        self._stream, self._in_bar = stream, False

    def write(self, text: str, /) -> int:
        ends_bar = self._in_bar and text == "\n"
        self._in_bar = text.startswith("\r")
        return len(text) if self._in_bar or ends_bar else self._stream.write(text)

    def flush(self) -> None:
        self._stream.flush()


@contextmanager
def without_bars() -> Iterator[None]:
    """Context for calls of libraries that draw bars on stderr and have no option against it."""
    with redirect_stderr(_WithoutBars(sys.stderr)):
        yield


class Terminal:
    """Prints lines and tables on stdout or stderr; the only class in the product that holds a rich console.

    Lines are never cut: the terminal wraps them, and in a pipe each stays one line, as does each row of a table.

    Args:
        stderr: print there instead of on stdout.
        quiet: print nothing.
    """

    def __init__(self, *, stderr: bool = False, quiet: bool = False):
        self._console = _PlainConsole(
            stderr=stderr,
            quiet=quiet,
            markup=False,
            emoji=False,
            highlight=False,
            theme=Theme({"rule.text": "bold"}),
        )

    @property
    def is_terminal(self) -> bool:
        """Whether someone looks, rather than a pipe or a file."""
        return self._console.is_terminal

    def print(self, content: str | Text = "", *, style: str = "") -> None:
        """Print lines, or text of `styled`."""
        self._console.print(content, style=style or None, soft_wrap=True)

    def table(
        self,
        columns: Sequence[str],
        rows: Iterable[Sequence[str]],
        *,
        numbers: Collection[str] = (),
        header: bool = True,
    ) -> None:
        """Print a table without lines: on a terminal within its width, with cells wrapped at words.

        Args:
            columns: their names.
            rows: a cell for each column.
            numbers: names of the columns whose cells are numbers, which end below each other.
            header: print the names.
        """
        table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), show_header=header)
        for name in columns:
            # by itself rich cuts what does not fit
            table.add_column(name, justify="right" if name in numbers else "left", overflow="fold")
        for row in rows:
            table.add_row(*row)
        if self.is_terminal:
            self._console.print(table)
            return
        wide = _PlainConsole(file=io.StringIO(), width=_WIDEST, markup=False, emoji=False, highlight=False)
        with wide.capture() as printed:
            wide.print(table)
        for line in printed.get().splitlines():
            self.print(Text(line.rstrip()))

    def rule(self, title: str) -> None:
        """Print a line across the terminal with a title in it."""
        self._console.rule(plain(title))

    def progress(self, *, visible: bool = True, counted: bool = False) -> Progress:
        """Bars on a terminal that vanish when done; with `counted` they show numbers and elapsed time too."""
        counts = (MofNCompleteColumn(), TimeElapsedColumn()) if counted else ()
        columns = (_Description(), BarColumn(), TaskProgressColumn(), *counts, TimeRemainingColumn())
        return Progress(*columns, console=self._console, transient=True, disable=not (visible and self.is_terminal))


class _Description(ProgressColumn):
    """The description of a task, which may name a source of the data."""

    def __init__(self) -> None:
        super().__init__(table_column=Column(no_wrap=True))

    def render(self, task: Task) -> Text:
        return Text(plain(task.description), style="progress.description")


def styled(*parts: tuple[str, str]) -> Text:
    """One text of (words, style) pairs; no words are read as markup."""
    return Text.assemble(*((shown(words), style) for words, style in parts))


def shown_size(size: float) -> str:
    """Bytes in three digits."""
    units = ["B", "kB", "MB", "GB", "TB"]
    while size >= 999.5:
        size, units = size / 1000, units[1:]
    return f"{size:.3g} {units[0]}"
