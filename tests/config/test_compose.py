"""What would run code before a config is composed is refused."""

import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from rlt.cli import hydra_app
from rlt.config.compose import check_search_path


def test_hydras_rerun_from_a_pickle_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["rlt", "--experimental-rerun=x.pickle"])
    with pytest.raises(ValueError, match="--experimental-rerun: it would unpickle"):
        hydra_app.compose_and_run()


@pytest.mark.parametrize("place", ["pkg://hostile_package", "pkg://hostile_package/conf"])
@pytest.mark.parametrize("where", ["command line", "added", "primary config", "config path"])
def test_a_package_is_not_imported_for_its_configs(
    place: str,
    where: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    allow: Callable[[str], None],
) -> None:
    (tmp_path / "hostile_package" / "conf").mkdir(parents=True)
    (tmp_path / "hostile_package" / "__init__.py").touch()
    (tmp_path / "mine.yaml").write_text(f"defaults: [config]\nhydra: {{searchpath: ['{place}']}}")
    monkeypatch.syspath_prepend(tmp_path)
    arguments = {
        "command line": [f"hydra.searchpath=[{place}]"],
        "added": [f"+hydra.searchpath=[{place}]"],
        "primary config": [f"--config-dir={tmp_path}", "--config-name=mine"],
        "config path": [f"--config-path={place}"],
    }[where]
    monkeypatch.setattr(sys, "argv", ["rlt", *arguments])
    with pytest.raises(ValueError, match="give the folder, file:///path/to/configs, or set RLT_A"):
        hydra_app.compose_and_run()
    assert "hostile_package" not in sys.modules
    allow("hostile_package.*")
    check_search_path([place, f"file://{tmp_path}"])
