"""How every command prints: a table for people, JSON for programs."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

_PIPE_WIDTH = 200


def print_json(value: Any) -> None:
    """Print one JSON document."""
    json.dump(value, sys.stdout, indent=2)
    sys.stdout.write("\n")


def print_table(columns: Sequence[str], rows: Sequence[Sequence[object]], title: str = "") -> None:
    """Print rows under headings, unadorned enough for grep; cells are never cut."""
    table = Table(box=None, title=title or None, title_justify="left", pad_edge=False)
    for column in columns:
        table.add_column(column.upper(), overflow="fold")
    for row in rows:
        table.add_row(*(Text(str(cell)) for cell in row))
    console().print(table)


def console() -> Console:
    """Make a console as wide as the terminal, or wide enough for a line where there is none."""
    return Console() if sys.stdout.isatty() else Console(width=_PIPE_WIDTH, color_system=None)
