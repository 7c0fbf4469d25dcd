"""`pycm info`."""

from __future__ import annotations

import json
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from pycm import backend_info


def run_info(*, as_json: bool) -> None:
    """Print `pycm.backend_info()`."""
    facts = backend_info()
    if as_json:
        print(json.dumps(facts, indent=2, ensure_ascii=False, default=str))
        return
    console = Console(highlight=False)
    console.print(Text(f"pycm {facts.get('version', '')}", style="bold"))
    missing = facts.get("missing") or []
    for section, content in facts.items():
        if section in ("version", "missing"):
            continue
        table = Table.grid(padding=(0, 2))
        table.add_column(style="dim", min_width=34)
        table.add_column(overflow="fold")
        for name, value in content.items() if isinstance(content, dict) else [("", content)]:
            table.add_row(Text("  " + str(name).replace("_", " ")), Text(readable(value)))
        console.print()
        console.print(Text(section, style="bold"))
        console.print(table)
    console.print()
    console.print(Text("missing", style="bold"))
    for line in missing:
        console.print(Text(f"  {line}"), soft_wrap=True)
    if not missing:
        console.print("  nothing")


def readable(value: Any) -> str:
    """A value of `backend_info` as text."""
    if value is None or value == [] or value == "":
        return "none"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, (list, tuple)):
        return ", ".join(readable(item) for item in value)
    if isinstance(value, dict):
        return ", ".join(f"{name} {readable(item)}" for name, item in value.items())
    return str(value)
