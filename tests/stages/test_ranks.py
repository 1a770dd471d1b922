"""Several ranks on CPUs: they compute what one process computes, and end as one."""

import os
import signal
import socket
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file

from tests.cli import (
    LIMIT_SECONDS,
    pipeline_from,
    read,
    read_lines,
    rlt,
    rlt_command,
    rlt_environment,
    stage,
    weights,
)
from tests.stages.same import scalars

TWO = "hardware.devices=2"
SHARDED = (TWO, "hardware.strategy=fsdp")
TIME_LIMIT = {"RLT_RANK_TIME_LIMIT": "10"}
# Each padded part of a batch has its own padding.
OF_THE_CUT = ("padding_fraction", "resources/", "time/")


def assert_close(one: Path, other: Path, weights_within: float = 1e-5) -> None:
    """Curves and weights of two runs of training agree."""
    a, b = scalars(one), scalars(other)
    assert a.keys() == b.keys() and a
    for name in a:
        if not any(part in name for part in OF_THE_CUT):
            values = [[value for _, value in curve[name]] for curve in (a, b)]
            assert values[0] == pytest.approx(values[1], abs=2e-4, rel=2e-4), name
    (file,) = (one / "model").glob("*.safetensors")
    mine, theirs = load_file(file), load_file(other / "model" / file.name)
    assert mine.keys() == theirs.keys()
    assert max(float((mine[k] - theirs[k]).abs().max()) for k in mine) < weights_within


@pytest.fixture(scope="module")
def ranked(base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The pipeline of the fixture `piped`, on two ranks."""
    folder = tmp_path_factory.mktemp("ranked")
    (folder / "output.txt").write_text(
        rlt(pipeline_from(base, "output_dir=first", TWO), folder).stdout
    )
    return folder


@pytest.mark.parametrize("step", ["warm_up", "teacher", "student"])
def test_training_is_that_of_one_process(piped: Path, ranked: Path, step: str) -> None:
    """AdamW divides a gradient by its size, and so makes rounding larger where that is small."""
    one, two = (folder / "first" / "steps" / step for folder in (piped, ranked))
    assert_close(one, two, weights_within=1e-4)


def test_rows_are_those_of_one_process(piped: Path, ranked: Path) -> None:
    """The same questions in the same order; texts may differ where two tokens were all but tied."""
    for step, file, column in (
        ("traces", "traces.jsonl", "explanation"),
        ("base_accuracy", "answers.jsonl", "text"),
    ):
        one, two = (read_lines(f / "first" / "steps" / step / file) for f in (piped, ranked))
        assert [row["problem_id"] for row in one] == [row["problem_id"] for row in two]
        same = [a[column] == b[column] for a, b in zip(one, two, strict=True)]
        assert sum(same) >= 0.9 * len(same), step


def test_everything_is_said_and_written_once(piped: Path, ranked: Path) -> None:
    output = (ranked / "output.txt").read_text()
    assert output.count("report:") == 1
    first, second = (sorted(p.name for p in (f / "first").iterdir()) for f in (piped, ranked))
    assert [n for n in first if "tfevents" not in n] == [n for n in second if "tfevents" not in n]
    assert read(ranked / "first" / "manifest.json")["status"] == "finished"


def free_port() -> int:
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        return int(one.getsockname()[1])


def ranks_of(environments: list[dict[str, str]], arguments: list[str], cwd: Path) -> list[Any]:
    """Processes as a launcher of the user's starts them, run to their ends."""
    processes = [
        subprocess.Popen(
            rlt_command(arguments), cwd=cwd, env=rlt_environment() | own, text=True,
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
        )
        for own in environments
    ]  # fmt: skip
    outputs = [process.communicate(timeout=LIMIT_SECONDS)[0] for process in processes]
    assert [process.returncode for process in processes] == [0] * len(processes), outputs
    return outputs


def under_torchrun() -> list[dict[str, str]]:
    shared = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port()), "WORLD_SIZE": "2"}
    return [shared | {"RANK": n, "LOCAL_RANK": n} for n in "01"]


def under_srun() -> list[dict[str, str]]:
    shared = {
        "SLURM_NTASKS": "2", "SLURM_JOB_ID": "4711", "SLURM_JOB_NAME": "rlt",
        "SLURM_JOB_NODELIST": "localhost", "SLURM_NODELIST": "localhost", "SLURM_NODEID": "0",
        "SLURM_NTASKS_PER_NODE": "2", "SLURM_NNODES": "1", "MASTER_PORT": str(free_port()),
    }  # fmt: skip
    return [shared | {"SLURM_PROCID": n, "SLURM_LOCALID": n} for n in "01"]


SFT = stage("teacher_sft", "callbacks.checkpoint.every_steps=2", TWO)


@pytest.mark.slow
@pytest.mark.parametrize("launcher", [under_torchrun, under_srun])
def test_ranks_that_another_launcher_started(launcher: Any, chain: Path, tmp_path: Path) -> None:
    """The folder is named after the time, once."""
    model = f"teacher_path={chain}/pretrain/model"
    outputs = ranks_of(launcher(), [*SFT, model, "seed=0"], tmp_path)
    (run,) = (tmp_path / "outputs" / "teacher_sft").iterdir()
    assert_close(run, chain / "teacher_sft")
    assert sum("report:" in output for output in outputs) == 1


def rank_processes(launcher: int) -> list[int]:
    """Process ids of the ranks that a process has started, by rank."""
    found = {}
    for folder in Path("/proc").iterdir():
        try:
            parent = (folder / "stat").read_text().rpartition(")")[2].split()[1]
            variables = (folder / "environ").read_bytes().split(b"\0")
        except (OSError, IndexError):
            continue
        if parent == str(launcher):
            for variable in variables:
                if variable.startswith(b"RANK="):
                    found[int(variable[5:])] = int(folder.name)
    return [found[rank] for rank in sorted(found)]


@pytest.fixture
def running(chain: Path, tmp_path: Path) -> Iterator[subprocess.Popen[str]]:
    """Teacher RL on two ranks, which has written a checkpoint and goes on."""
    arguments = stage(
        "teacher_rl", f"teacher_path={chain}/teacher_sft/model", "datamodule.steps=400",
        "output_dir=run", TWO,
    )  # fmt: skip
    process = subprocess.Popen(
        rlt_command(arguments), cwd=tmp_path, env=rlt_environment() | TIME_LIMIT, text=True,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
    )  # fmt: skip
    end = time.monotonic() + LIMIT_SECONDS
    written = tmp_path / "run" / "checkpoints"
    while not list(written.glob("step=*.ckpt")) and process.poll() is None:
        assert time.monotonic() < end
        time.sleep(0.1)
    yield process
    for pid in rank_processes(process.pid):
        os.kill(pid, signal.SIGKILL)
    process.kill()
    process.communicate()


def test_a_killed_rank_ends_the_run(
    running: subprocess.Popen[str], chain: Path, tmp_path: Path
) -> None:
    """At once and told; the run goes on from its checkpoint, on one device too."""
    os.kill(rank_processes(running.pid)[1], signal.SIGKILL)
    output, _ = running.communicate(timeout=60)
    assert running.returncode == 2, output
    assert "RanksFailedError: rank 1 ended with signal 9" in output
    assert "Traceback" not in output
    done = read(tmp_path / "run" / "checkpoints" / "manifest.json")[-1]["step"]
    resume = ["resume", "run", "hardware.devices=1", f"datamodule.steps={done + 2}"]
    told = rlt(resume, tmp_path)
    assert "hardware.devices: 2 before, 1 now" in told.stderr + told.stdout
    assert len(scalars(tmp_path / "run")["train/reward"]) == done + 2


@pytest.mark.slow
@pytest.mark.parametrize("how", [signal.SIGTERM, signal.SIGINT])
def test_all_ranks_stop_together(
    running: subprocess.Popen[str], tmp_path: Path, how: signal.Signals
) -> None:
    running.send_signal(how)
    output, _ = running.communicate(timeout=60)
    assert running.returncode == 128 + how, output
    assert "Traceback" not in output


@pytest.mark.slow
def test_a_rank_that_hangs_is_named(running: subprocess.Popen[str], tmp_path: Path) -> None:
    os.kill(rank_processes(running.pid)[1], signal.SIGSTOP)
    output, _ = running.communicate(timeout=120)
    assert running.returncode == 2, output
    assert "rank 0 waits for the others while" in output and "Ranks 1 failed" in output
    assert "Traceback" not in output


@pytest.mark.slow
@pytest.mark.parametrize(
    "options",
    [
        *(f"algorithm={name}" for name in ("bnpo", "cispo", "dapo", "dr_grpo", "gspo")),
        "credit=token credit.exact=true", "adapter=lora optim=sgd optim.lr=1e-2",
        "algorithm.minibatches=3 algorithm.num_iterations=2", "datamodule.batch_size=3",
        "datamodule.batch_size=1 data.max_validation=3", "stage=student_rl",
        "rollout.linear_dtype=bfloat16 algorithm.correction=tis",
    ],
)  # fmt: skip
def test_ten_steps_are_those_of_one_process(options: str, chain: Path, tmp_path: Path) -> None:
    common = stage("teacher_rl", "datamodule.steps=10", "optim.lr=1e-4", *options.split())
    role = "student" if "student_rl" in options else "teacher"
    common.append(f"{role}_path={chain}/pretrain/model")
    for name, devices in {"one": 1, "two": 2}.items():
        rlt([*common, f"output_dir={name}", f"hardware.devices={devices}"], tmp_path)
    assert_close(tmp_path / "one", tmp_path / "two")


def test_shards_train_as_one_process_does(chain: Path, tmp_path: Path) -> None:
    """They are saved as a plain model."""
    model = f"teacher_path={chain}/pretrain/model"
    rlt([*SFT, model, "output_dir=run", SHARDED[1]], tmp_path)
    assert_close(tmp_path / "run", chain / "teacher_sft")


@pytest.mark.slow
def test_shards_go_on_from_their_checkpoint(chain: Path, tmp_path: Path) -> None:
    """Bitwise on as many ranks, and correctly on one device."""
    recipe = [*SFT, f"teacher_path={chain}/pretrain/model", "schedule=constant", SHARDED[1]]
    rlt([*recipe, "output_dir=whole"], tmp_path)
    for name, devices in (("part", TWO), ("alone", "hardware.devices=1")):
        rlt([*recipe, f"output_dir={name}", "datamodule.steps=2"], tmp_path)
        rlt(["resume", name, "datamodule.steps=4", devices], tmp_path)
    assert weights(tmp_path / "whole") == weights(tmp_path / "part")
    assert_close(tmp_path / "part", tmp_path / "alone")


@pytest.mark.slow
@pytest.mark.parametrize(
    "options",
    [
        "credit=token credit.exact=true", "adapter=lora optim=sgd optim.lr=1e-2",
        "algorithm.beta=0.04 algorithm.reference_update_every_steps=2 algorithm.minibatches=3",
        "hardware.gradient_checkpointing=true datamodule.batch_size=3",
        "datamodule.batch_size=1 data.max_validation=3", "stage=student_rl",
    ],
)  # fmt: skip
def test_ten_steps_of_shards_are_those_of_one_process(
    options: str, chain: Path, tmp_path: Path
) -> None:
    common = stage("teacher_rl", "datamodule.steps=10", "optim.lr=1e-4", *options.split())
    role = "student" if "student_rl" in options else "teacher"
    common += [f"{role}_path={chain}/pretrain/model", "hardware.tokens_per_micro_batch=256"]
    rlt([*common, "output_dir=one"], tmp_path)
    rlt([*common, "output_dir=two", *SHARDED], tmp_path)
    assert_close(tmp_path / "one", tmp_path / "two")


@pytest.mark.slow
def test_shards_of_tied_embeddings(tmp_path: Path) -> None:
    common = stage("pretrain", "datamodule.steps=10", "optim.lr=1e-3")
    common.append("student.tie_embeddings=true")
    rlt([*common, "output_dir=one"], tmp_path)
    rlt([*common, "output_dir=two", *SHARDED], tmp_path)
    assert_close(tmp_path / "one", tmp_path / "two")


@pytest.mark.slow
def test_resumed_on_as_many_ranks_it_goes_on_bitwise(chain: Path, tmp_path: Path) -> None:
    model = f"teacher_path={chain}/pretrain/model"
    recipe = [*SFT, model, "schedule=constant"]  # others depend on the number of steps
    rlt([*recipe, "output_dir=whole"], tmp_path)
    rlt([*recipe, "output_dir=part", "datamodule.steps=2"], tmp_path)
    rlt([*recipe, "output_dir=part"], tmp_path)
    assert weights(tmp_path / "whole") == weights(tmp_path / "part")
