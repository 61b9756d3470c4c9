"""What the demo prints: numbered chapters, short sentences, one table per result."""

import time
from collections.abc import Iterable, Sequence

from rich.console import Console
from rich.table import Table


class Story:
    """Writes to one console and keeps the time since the beginning."""

    def __init__(self, console: Console | None = None):
        self._console = console or Console(width=110, highlight=False)
        self._started = time.monotonic()
        self._chapter = 0

    def chapter(self, title: str) -> None:
        """Begin a numbered chapter."""
        self._chapter += 1
        self._console.print()
        self._console.rule(f"[bold]{self._chapter}. {title}[/]  {self.elapsed:.0f} s", align="left")

    def say(self, text: str) -> None:
        """One sentence or two."""
        self._console.print(text, soft_wrap=False, markup=False)

    def verbatim(self, text: str) -> None:
        """Something to be copied: never broken into lines."""
        self._console.print(text, soft_wrap=True, markup=False, highlight=False)

    def quote(self, who: str, text: str) -> None:
        """What somebody asked or was answered."""
        self._console.print(f"  {who + ':':<10} {' '.join(text.split())}", markup=False)

    def table(self, title: str, columns: Sequence[str], rows: Iterable[Sequence[str]]) -> None:
        """A table whose first column is text and whose others are figures."""
        self._console.print(title, style="bold", markup=False)
        table = Table()
        for index, column in enumerate(columns):
            table.add_column(column, justify="left" if index == 0 else "right")
        for row in rows:
            table.add_row(*row)
        self._console.print(table)

    @property
    def elapsed(self) -> float:
        """Seconds since the story began."""
        return time.monotonic() - self._started
