"""Files of a run that were replaced by ones that would run code: they are read as data alone."""

import hashlib
import json
import pickle
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from omegaconf import DictConfig

from rlt.config.build import build_stage
from rlt.evaluation.sandbox import Sandbox
from rlt.preflight.probe import measure
from tests.cli import here, refused, stage


class Hostile:
    """Unpickled, it makes a file."""

    def __init__(self, file: Path) -> None:
        self.file = file

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (self.file,)


def test_a_checkpoint_that_is_a_hostile_pickle_does_not_run(
    base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copytree(base.parent, tmp_path / "pretrain")
    run, mark = tmp_path / "pretrain", tmp_path / "ran"
    manifest = json.loads((run / "manifest.json").read_text())
    (run / "manifest.json").write_text(json.dumps(manifest | {"status": "interrupted"}))
    (run / "metrics.json").unlink()
    listed = run / "checkpoints" / "manifest.json"
    checkpoints = sorted((run / "checkpoints").glob("step=*.ckpt"))
    rows = json.loads(listed.read_text())
    assert len(rows) == len(checkpoints) > 0
    for row, file in zip(rows, checkpoints, strict=True):
        torch.save({"state_dict": Hostile(mark)}, file)
        content = file.read_bytes()  # listed as what it is, so that it is read at all
        row |= {"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}
    listed.write_text(json.dumps(rows))
    # How the run says so is not this test's business.
    with pytest.raises((SystemExit, pickle.UnpicklingError)) as refused:
        here(stage("pretrain", "output_dir=pretrain"), tmp_path, monkeypatch)
    assert not isinstance(refused.value, SystemExit) or refused.value.code not in (0, None)
    assert not mark.exists() and not (run / "metrics.json").exists()
    torch.load(checkpoints[0], weights_only=False)
    assert mark.exists()  # it would have run


def test_a_grading_worker_takes_no_module_from_where_it_is_started(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    mark = tmp_path / "ran"
    for name in ("rlt", "math_verify"):
        (tmp_path / f"{name}.py").write_text(f"open({str(mark)!r}, 'w').close()")
    monkeypatch.chdir(tmp_path)
    sandbox = Sandbox("maths")
    sandbox._start()
    sandbox.close()
    assert not mark.exists()


def test_a_probe_takes_no_module_from_where_it_is_started(
    composed: Callable[..., DictConfig], monkeypatch: pytest.MonkeyPatch
) -> None:
    commands: list[list[str]] = []

    def ran(command: list[str], **_: Any) -> subprocess.CompletedProcess[str]:
        commands.append(command)
        found = {"medians": {"whole": 2.0}, "peak": 1, "areas": []}
        (Path(command[-1]) / "probe.json").write_text(json.dumps(found))
        return subprocess.CompletedProcess(command, 0, "", "")

    monkeypatch.setattr("rlt.preflight.probe.subprocess.run", ran)
    cfg = composed("stage=pretrain")
    measure(cfg, build_stage(cfg), (), None)
    assert [command[1:3] for command in commands] == [["-P", "-m"]]


EVIL = {"_target_": "joblib.load", "filename": "pickled"}
RUNS_IT = (
    "hydra: {callbacks: {x: '${oc.select:logger.${now:evil}}'}}",
    "hydra: {callbacks: {x: '${oc.select:logger.${hydra.mode}}'}}",
    "hydra: {job_logging: {handlers: {x: {'()': joblib.load, filename: pickled}}}}",
    "hydra: {job_logging: '${oc.select:logger.${now:logging}}'}",
)


@pytest.mark.parametrize("swept", [False, True], ids=["run", "swept"])
@pytest.mark.parametrize("hydra", RUNS_IT)
def test_an_experiment_file_runs_nothing_by_hydras_own_node(
    hydra: str, swept: bool, tmp_path: Path
) -> None:
    (tmp_path / "experiment").mkdir()
    logger = {"evil": EVIL, "RunMode": {"RUN": EVIL, "MULTIRUN": EVIL}}
    logger["logging"] = {"version": 1, "handlers": {"x": {"()": "joblib.load", "filename": "x"}}}
    (tmp_path / "experiment" / "bad.yaml").write_text(
        "# @package _global_\n"
        "defaults: [{override /stage: teacher_rl}]\n"
        f"logger: {json.dumps(logger)}\n{hydra}\n"
    )
    mark = tmp_path / "ran"
    (tmp_path / "pickled").write_bytes(pickle.dumps(Hostile(mark)))
    chosen = ["-m", "experiment=bad,bad"] if swept else ["experiment=bad"]
    told = refused(["--config-dir=.", *chosen, "check=true"], tmp_path)
    assert not mark.exists()
    assert "the config has" in told
    assert "must be written out" in told or "joblib.load: is not allowed" in told


OVERWRITES = {  # by what it would write before it is refused
    "config.yaml": "hydra: {output_subdir: '${hydra.runtime.output_dir}', run: {dir: mine}}",
    "server.log": """
hydra:
  run: {dir: mine}
  job_logging:
    handlers: {x: {class: logging.FileHandler, mode: w,
                   filename: '${hydra.runtime.output_dir}/server.log'}}
    root: {handlers: [x]}
""",
}


@pytest.mark.parametrize("name", OVERWRITES)
def test_an_experiment_file_overwrites_nothing(name: str, tmp_path: Path) -> None:
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / name).write_text("precious")
    told = refused_experiment(OVERWRITES[name], tmp_path)
    assert "must stay null" in told or "a log file is only added to" in told
    assert [file.name for file in (tmp_path / "mine").iterdir()] == [name]
    assert (tmp_path / "mine" / name).read_text() == "precious"


def test_an_experiment_file_writes_no_line_of_a_slurm_script(tmp_path: Path) -> None:
    """Which it might, if it were another when the launcher is built than when it is checked."""
    told = refused_experiment(
        """
logger: {None: {s0: ok, s1: ok}, RunMode: {MULTIRUN: {s0: "x\\ntouch ran\\n: ", s1: ok}}}
hydra:
  sweeper: {params: {seed: '1'}}
  launcher:
    submitit_folder: '${oc.select:logger.${hydra.mode}.s${seed}}/f'
""",
        tmp_path, "-m", defaults="{override /hydra/launcher: slurm}",
    )  # fmt: skip
    assert "hydra.launcher.submitit_folder=" in told and "a shell might act on" in told


def refused_experiment(content: str, folder: Path, *arguments: str, defaults: str = "") -> str:
    """What is said of an experiment file that must be refused."""
    (folder / "experiment").mkdir()
    (folder / "experiment" / "bad.yaml").write_text(
        f"# @package _global_\ndefaults: [{{override /stage: teacher_rl}}, {defaults}]\n{content}\n"
    )
    told = refused([*arguments, "--config-dir=.", "experiment=bad", "check=true"], folder)
    assert "the config has" in told
    return told
