"""docs/architecture.md names files and folders that are there, and every folder of the package."""

import re
from pathlib import Path

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs" / "architecture.md").read_text()


def test_every_path_is_there() -> None:
    paths = re.findall(r"`((?:rlt|conf)/[\w/.]*)`", PAGE)
    assert len(paths) > 30
    assert [path for path in paths if not (ROOT / path).exists()] == []


def test_every_folder_has_its_row() -> None:
    folders = [file.parent.name for file in sorted((ROOT / "rlt").glob("*/__init__.py"))]
    assert [name for name in folders if f"| `rlt/{name}/` |" not in PAGE] == []
