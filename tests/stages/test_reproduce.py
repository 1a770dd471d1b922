"""`rlt reproduce` and `rlt diff`: a run made again from its folder, and two runs side by side."""

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file

from tests.cli import here, interrupt, pipeline_from, read, read_lines, results, rlt, stage, weights
from tests.report.report_runs import write_events


def copy(run: Path, name: str) -> Path:
    return Path(shutil.copytree(run, run.with_name(name)))


def test_teacher_rl_is_made_again_bit_for_bit(
    chain: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    run, again = chain / "teacher_rl", chain / "teacher_rl-reproduced"
    output = rlt(["reproduce", "teacher_rl"], chain).stdout
    assert "changed since" not in output
    last = output.splitlines()[-1]
    assert re.fullmatch(r"equal: \d+ metrics, \d+ scalars in \d+ tags, 28 rows, .*1 model", last)
    assert results(again) == results(run)
    assert weights(again) == weights(run)
    assert read(again / "manifest.json")["key"] == read(run / "manifest.json")["key"]
    here(["diff", "teacher_rl", "teacher_rl-reproduced"], chain, monkeypatch)
    assert capsys.readouterr().out.splitlines()[2:] == [last]
    (chain / "lr=1,seed=0").symlink_to("teacher_rl")  # as a sweep names its jobs
    here(["diff", "lr=1,seed=0", "teacher_rl"], chain, monkeypatch)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["pretrain", "collect", "distill", "evaluate"])
def test_stages_are_made_again_bit_for_bit(
    chain: Path, name: str, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    here(["reproduce", name], chain, monkeypatch)
    output = capfd.readouterr().out
    assert "changed since" not in output
    assert output.splitlines()[-1].startswith("equal: ")
    assert results(chain / f"{name}-reproduced") == results(chain / name)


@pytest.mark.slow
def test_a_pipeline_makes_every_step_again(
    base: Path, piped: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    here(["reproduce", "first"], piped, monkeypatch)
    output = capfd.readouterr().out
    assert "changed since" not in output
    assert output.splitlines()[-1].endswith("weights of 3 models")
    for step in read(piped / "first-reproduced" / "steps.json"):
        assert not step["reused"]
        assert Path(step["dir"]).is_relative_to(piped / "first-reproduced" / "store")
    # One step by itself, from the folder in which the pipeline keeps it.
    here(["reproduce", "first/steps/student"], piped, monkeypatch)
    # Only what went before the change is the same.
    rlt(pipeline_from(base, "output_dir=other", "teacher_rl.optim.lr=2e-3"), piped)
    here(["diff", "first", "other"], piped, monkeypatch, status=1)
    output = capfd.readouterr().out
    assert "differs first at step teacher, " in output.splitlines()[-1]
    assert "step warm_up" not in output


@pytest.mark.slow
def test_the_number_of_threads_is_the_runs_own(
    chain: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Left to torch, which would take another number where the run is made again."""
    monkeypatch.setenv("OMP_NUM_THREADS", "3")
    monkeypatch.setenv("MKL_DYNAMIC", "FALSE")
    threads = ["hardware.threads=null", "output_dir=threads"]
    rlt(stage("teacher_sft", "teacher_path=pretrain/model", *threads), chain)
    monkeypatch.delenv("MKL_DYNAMIC")
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    here(["reproduce", "threads"], chain, monkeypatch)
    for run in ("threads", "threads-reproduced"):
        assert read(chain / run / "manifest.json")["hardware"]["torch_threads"] == 3
    here(["diff", "threads", "teacher_sft"], chain, monkeypatch, status=1)


def test_changed_data_are_told_before_and_where_they_show_after(
    chain: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    file = chain / "problems.jsonl"
    traces = read_lines(chain / "collect" / "traces.jsonl")
    rows = [{k: row[k] for k in ("question", "solution")} for row in traces]

    def write(explanation: str) -> None:
        file.write_text("".join(json.dumps(r | {"explanation": explanation}) + "\n" for r in rows))

    write("so then")
    data = ["data=jsonl", "data.source.files=problems.jsonl"]
    data += ["data.source.columns.explanation=explanation", "data.max_validation=4"]
    knobs = [knob for knob in stage("teacher_sft") if not knob.startswith("data.")]
    here([*knobs, *data, "teacher_path=pretrain/model", "output_dir=files"], chain, monkeypatch)
    write("so now")
    capfd.readouterr()
    here(["reproduce", "files"], chain, monkeypatch, status=1)
    output = capfd.readouterr().out
    told = [line for line in output.splitlines() if line.startswith("changed since: ")]
    assert len(told) == 1
    assert re.fullmatch(
        r"changed since: inputs\.data\.source\.fingerprint: was \w{16}, now \w{16}", told[0]
    )
    assert output.splitlines()[-1].startswith("differs first at metrics.json: start/validation/")
    assert "train/loss, step 0" in output
    # Without the file there is nothing to run.
    file.unlink()
    here(["reproduce", "files"], chain, monkeypatch, status=2)
    assert "problems.jsonl" in capfd.readouterr().err
    assert not (chain / "files-reproduced-2").exists()


@pytest.mark.slow
def test_an_edited_config_is_told(
    chain: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    run = copy(chain / "evaluate", "edited")
    config = (run / "config.yaml").read_text()
    (run / "config.yaml").write_text(config.replace("seed: 0", "seed: 1", 1))
    here(["reproduce", "edited"], chain, monkeypatch, status=1)
    output = capfd.readouterr().out
    assert "changed since: config.yaml: its key was " in output
    assert "differs first at answers.jsonl, row 1: " in output.splitlines()[-1]


def last_line_of_diff(
    a: str, b: str, cwd: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> str:
    here(["diff", a, b], cwd, monkeypatch, status=1)
    return capsys.readouterr().out.splitlines()[-1]


def test_a_tampered_result_is_found(
    chain: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    run = copy(chain / "distill", "tampered")

    def found() -> str:
        line = last_line_of_diff("distill", "tampered", chain, monkeypatch, capsys)
        return line.removeprefix("differs first at ")

    metrics = read(run / "metrics.json")
    (run / "metrics.json").write_text(json.dumps(metrics | {"validation/loss": 0.0}))
    assert found() == f"metrics.json: validation/loss: {metrics['validation/loss']} and 0.0"
    file = run / "model" / "model.safetensors"
    tensors = load_file(file)
    name = min(tensors)
    tensors[name].view(-1)[0] += 1
    save_file(tensors, file)
    assert re.match(
        rf"model, {re.escape(name)} \(1 of \d+ tensors\), largest difference 1", found()
    )
    write_events(run, {"train/loss": [(1, 0.5)]})
    assert re.fullmatch(r"train/loss, step 1: [\d.]+ and 0.5", found())


def test_runs_of_other_configs_side_by_side(
    chain: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    line = last_line_of_diff("teacher_sft", "teacher_rl", chain, monkeypatch, capsys)
    assert line.startswith("differs first at ")
    here(["diff", "teacher_sft", "teacher_rl"], chain, monkeypatch, status=1)
    output = capsys.readouterr().out
    assert all(len(line) <= 80 for line in output.splitlines()[2:-1])
    assert "│ stage " in output
    assert "│ inputs.teacher_path " in output
    assert "│ train/reward " in output
    tables = ["config", "ran on", "metrics"]
    assert [line.strip() for line in output.splitlines() if line.strip() in tables] == tables
    assert re.search(r"^results, earliest step first \(and \d+ more\) *$", output, re.MULTILINE)


@pytest.mark.parametrize("command", ["reproduce {}", "diff evaluate {}"])
def test_folders_that_hold_no_run(
    chain: Path, tmp_path: Path, command: str, refuse: Callable[..., str]
) -> None:
    assert "nowhere: no such folder" in refuse(*command.format("nowhere").split(), cwd=chain)
    (tmp_path / "config.yaml").write_text("stage: evaluate\n")
    message = refuse(*command.format(tmp_path).split(), cwd=chain)
    assert f"{tmp_path} holds no run: manifest.json not found" in message


def test_an_unfinished_run_is_not_reproduced(
    chain: Path, tmp_path: Path, refuse: Callable[..., str]
) -> None:
    run = Path(shutil.copytree(chain / "evaluate", tmp_path / "run"))
    manifest = read(run / "manifest.json")
    (run / "manifest.json").write_text(json.dumps(manifest | {"status": "interrupted"}))
    assert "the run is interrupted, not finished" in refuse("reproduce", "run")
    (run / "manifest.json").write_text(json.dumps(manifest))
    config = (run / "config.yaml").read_text()
    (run / "config.yaml").write_text(config + "learning_rate: 1\n")
    assert "learning_rate: no such key" in refuse("reproduce", "run")
    assert not (tmp_path / "run-reproduced").exists()


@pytest.mark.slow
def test_ctrl_c_ends_the_new_run_too(chain: Path) -> None:
    run = Path(shutil.copytree(chain / "teacher_rl", chain / "cut"))
    again = chain / "cut-reproduced"
    output = interrupt(["reproduce", str(run)], chain, (again / "samples.jsonl").is_file)
    assert f"not reproduced: the run in {again} ended with exit status 130" in output
    assert read(again / "manifest.json")["status"] == "interrupted"
