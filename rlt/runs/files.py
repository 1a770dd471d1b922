"""Files of a run are written completely or not at all."""

import json
import os
from pathlib import Path
from typing import Any

from rlt.runs import ranks


def write_text(path: Path, text: str) -> None:
    """Write a file atomically: a reader sees either the old file or the complete new one.

    Of several ranks, the first writes.
    """
    if not ranks.is_main():
        return
    temporary = path.with_name(path.name + ".tmp")
    with temporary.open("w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(path)


def write_json(path: Path, content: Any) -> None:
    """Write JSON atomically; values that JSON lacks become strings."""
    write_text(path, json.dumps(content, indent=2, default=str) + "\n")


def read_json(path: Path) -> Any:
    """Return the content of a JSON file.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the file does not hold JSON.
    """
    return json.loads(path.read_text(encoding="utf-8"))
