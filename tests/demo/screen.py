"""What the demo prints: steps, tables and bars; plain lines where there is no terminal."""

from __future__ import annotations

import contextlib
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

from rich.console import Console
from rich.live import Live
from rich.table import Table
from rich.text import Text

_WIDTH = 110
_BAR = 24


class Failed(Exception):
    """A step did not show what it should; the message says what it showed."""


def check(holds: bool, message: str) -> None:
    """Fail the step unless something holds."""
    if not holds:
        raise Failed(message)


@dataclass(slots=True)
class Outcome:
    """How a step went. ``said``: its result in a line."""

    title: str
    said: str = ""
    error: str = ""
    took_s: float = 0.0


@dataclass(slots=True)
class Screen:
    """Prints steps one after the other and remembers how they went."""

    console: Console = field(default_factory=lambda: Console(highlight=False))
    outcomes: list[Outcome] = field(default_factory=list)

    def __post_init__(self) -> None:
        if not self.console.is_terminal:
            self.console = Console(highlight=False, width=_WIDTH, color_system=None)

    @contextlib.contextmanager
    def step(self, title: str) -> Iterator[Outcome]:
        """Show a step; what goes wrong in it is shown and remembered, and the next step follows."""
        outcome = Outcome(title)
        self.outcomes.append(outcome)
        self.console.print(f"\n[bold cyan]{len(self.outcomes)}. {title}[/]")
        started = time.monotonic()
        try:
            yield outcome
        except Exception as error:  # noqa: BLE001 - shown, and the exit status says so
            outcome.error = f"{type(error).__name__}: {error}" if not isinstance(error, Failed) else str(error)
            self.console.print(Text(f"   FAILED: {outcome.error}", style="bold red"))
        except BaseException:
            outcome.error = "interrupted"
            raise
        else:
            self.console.print(Text(f"   ok: {outcome.said}", style="green"))
        finally:
            outcome.took_s = time.monotonic() - started

    def say(self, text: str | Text) -> None:
        """Print a line of a step."""
        self.console.print(Text("   ").append(text))

    def table(self, columns: Sequence[str], rows: Sequence[Sequence[object]]) -> None:
        """Print rows under headings."""
        self.console.print(_table(columns, rows))

    @contextlib.contextmanager
    def live(self) -> Iterator[Live]:
        """A line that changes while something goes on, on a terminal; it is gone at the end."""
        with Live(console=self.console, refresh_per_second=20, transient=True) as shown:
            yield shown

    def summary(self) -> bool:
        """Print how every step went; returns whether all went well."""
        rows = [
            (number, o.title, Text("FAILED", "bold red") if o.error else Text("ok", "green"), o.error or o.said)
            for number, o in enumerate(self.outcomes, start=1)
        ]
        self.console.print()
        self.console.print(_table(("", "step", "", "result"), rows))
        return not any(outcome.error for outcome in self.outcomes)


def _table(columns: Sequence[str], rows: Sequence[Sequence[object]]) -> Table:
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0))
    for number, column in enumerate(columns):
        table.add_column(Text(f"   {column}" if number == 0 else column, "dim"), overflow="fold")
    for first, *rest in rows:
        cells = [Text(f"   {first}"), *(cell if isinstance(cell, Text) else Text(str(cell)) for cell in rest)]
        table.add_row(*cells)
    return table


def bars(spread: Counter[str], names: Sequence[str]) -> Text:
    """Draw the shares of each name in a spread."""
    total = max(1, spread.total())
    text = Text()
    for name in names:
        width = round(_BAR * spread[name] / total)
        text.append(f"{name} ").append("█" * width, "cyan").append(f" {spread[name]}  ")
    return text
