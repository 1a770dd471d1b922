"""What is misspelt, out of place or out of range fails before anything is loaded, and is named."""

import os
from collections.abc import Callable
from pathlib import Path

import pytest
from omegaconf import DictConfig, OmegaConf

from rlt.cli.run import run
from rlt.config.allowed_targets import ConfigError
from rlt.config.compose import USER_ERRORS
from tests.cli import refused, rlt

Composed = Callable[..., DictConfig]


def test_a_misspelt_stage_in_an_experiment_file(refuse: Callable[..., str], tmp_path: Path) -> None:
    (tmp_path / "experiment").mkdir()
    (tmp_path / "experiment" / "mine.yaml").write_text(
        "# @package _global_\ndefaults: [{override /stage: teacher_rl}]\nstage: teacher_lr\n"
    )
    told = refuse("--config-dir=.", "experiment=mine")
    assert "stage=teacher_lr: the config is one of stage=teacher_rl" in told


def test_an_output_dir_that_is_a_file(tmp_path: Path) -> None:
    (tmp_path / "mine").write_text("precious")
    told = refused(["stage=teacher_rl", "output_dir=mine", "check=true"], tmp_path)
    assert "mine: File exists; choose another output_dir" in told
    assert (tmp_path / "mine").read_text() == "precious"


@pytest.mark.parametrize(
    ("overrides", "name"),
    [
        ("", "job"),
        ("seed=0,reward=rlt", "seed=0,reward=rlt"),
        ("a=x/y", "a=x_y"),
        ("a=####", "a=_-"),
        ("files=d/*.jsonl", "files=d_.jsonl-"),
        ("a=" + "長" * 120, "a=" + "長" * 39 + "-"),
    ],
)
def test_a_job_has_a_folder_of_its_own(overrides: str, name: str) -> None:
    folder = OmegaConf.create({"f": f"${{sweep_folder:'{overrides}'}}"}).f
    assert folder.startswith(name) and len(folder.encode()) < 255
    assert (folder == name) == (not name.endswith("-"))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["stage=teacher_rl", "rewrad=rlt"], "no such key 'rewrad'; did you mean 'reward'?"),
        (["stage=teacher_rl", "seeed=1"], "no such key 'seeed'; did you mean 'seed'"),
        (["stage=teacher_rl", "optim.lrr=1"], "no such key 'optim.lrr'; did you mean 'lr'?"),
        (
            ["stage=teacher_rl", "hardware.presicion=32-true"],
            "no such key 'hardware.presicion'; did you mean 'precision'?",
        ),
        (
            ["teacher_rl.rolout.temperature=1"],
            "no such key 'teacher_rl.rolout'; did you mean 'rollout'?",
        ),
        (["steps.warm_up.stagee=x"], "no such key 'steps.warm_up.stagee'; did you mean 'stage'?"),
        (["stage=teacher_rl", "reward=rtl"], "reward=rtl: no such option; did you mean 'rlt'?"),
        (["-m", "reward=rlt,rtl"], "reward=rtl: no such option; did you mean 'rlt'?"),
        (["stage=teacher_lr"], "stage=teacher_lr: no such option; did you mean 'teacher_rl'"),
        (["stage=distill", "reward=rlt"], "reward: this config has no such part; it has: "),
        (["stage=evaluate", "data=jsonl"], "data: this config has no such part; did you mean"),
        (
            ["stage=collect", "model=micro"],
            "model: this config has no such part; did you mean model@student or model@teacher?",
        ),
        (
            ["optim=sgd"],
            "optim: this config has no such part; did you mean optim@distill.optim or "
            "optim@pretrain.optim or optim@student_rl.optim or optim@teacher_rl.optim or "
            "optim@teacher_sft.optim?",
        ),
        (["seed=0,1"], "Ambiguous value for argument 'seed=0,1'"),
        (
            ["-m", "stage=teacher_rl,distill"],
            "ValueError: stage=teacher_rl,distill: a sweep is of one stage; start one for each",
        ),
        (
            ["-m", "stage=glob(*)"],
            "ValueError: stage=glob(*): a sweep is of one stage; start one for each",
        ),
        (["--hydra-help", "hydra/hydra_logging=x"], "ValueError: --hydra-help takes no overrides"),
    ],
)
def test_composition_errors_in_one_line(
    refuse: Callable[..., str], arguments: list[str], message: str
) -> None:
    written = refuse(*arguments).splitlines()
    assert written[0].startswith(f"rlt: {message}")
    assert written[1:] == ["(HYDRA_FULL_ERROR=1 shows where)"]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("rewrad: {terms: null}", "rewrad: no such key; did you mean 'reward'?"),
        (
            "hardware: {acelerator: gpu}",
            "Hardware has no parameter 'acelerator'; did you mean 'accel",
        ),
        ("teacher_rl: {rewardstudent: student}", "did you mean 'reward_student'"),
        ("steps: {warm_up: {input: {}}}", "did you mean 'inputs'?"),
        (
            "defaults: [override /rewrad: rlt]",
            "rewrad: this config has no such part; did you mean 'reward'?",
        ),
        ("reward: {terms: {thought_kl: {clipp: 1}}}", "ThoughtKL has no parameter 'clipp'; did"),
        ("collect: {rollout: {temprature: 1}}", "HFRollout has no parameter 'temprature'; did"),
        (
            "reward: {terms: {thougt_kl: {estimator: k3}}}",
            "reward.terms.thougt_kl: no such part; did you mean 'thought_kl'?",
        ),
        (
            "distill: {callbacks: {chekpoint: {every_steps: 4}}}",
            "distill.callbacks.chekpoint: no such part; did you mean 'checkpoint'?",
        ),
    ],
)
def test_typos_in_an_experiment_file(
    refuse: Callable[..., str], tmp_path: Path, text: str, message: str
) -> None:
    (tmp_path / "experiment").mkdir()
    (tmp_path / "experiment" / "mine.yaml").write_text(f"# @package _global_\n{text}\n")
    for folder in (f"hydra.searchpath=[file://{tmp_path}]", f"--config-dir={tmp_path}"):
        assert message in refuse(folder, "experiment=mine", "check=true")


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("+typo=1", "typo: no such key"),
        ("+sede=1", "sede: no such key; did you mean 'seed'"),
        ("+hardware.typo=1", "hardware.typo: rlt.llm.device.Hardware has no parameter 'typo'"),
        ("+reward.terms.thought_kl.estimater=k3", "did you mean 'estimator'?"),
        ("+optim.lrr=1", "optim.lrr: torch.optim.AdamW has no parameter 'lrr'"),
        ("+callbacks.x={_target_: os.system, command: ls}", "is not an allowed target"),
    ],
)
def test_keys_added_with_a_plus(
    composed: Composed, tmp_path: Path, override: str, message: str
) -> None:
    with pytest.raises(ConfigError) as caught:
        run(composed("stage=teacher_rl", override), tmp_path)
    assert message in str(caught.value)


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("+teacher_rl.typo=1", r"^the config has 1 error:\n.*TeacherRL has no parameter 'typo'"),
        ("+steps.warm_up.typo=1", r"^steps\.warm_up\.typo: a step has no such key; valid: stage, "),
    ],
)
def test_keys_added_inside_a_pipeline(
    composed: Composed, tmp_path: Path, override: str, message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        run(composed(override), tmp_path)


@pytest.mark.parametrize(
    ("stage", "override", "message"),
    [
        ("teacher_rl", "schedule.name=bogus", "schedule: bogus is not a valid SchedulerType"),
        ("teacher_rl", "module.group_size=1", "group_size=1: advantages compare"),
        ("teacher_sft", "callbacks.checkpoint.every_steps=0", "every_steps=0 must be at least 1"),
        ("teacher_sft", "callbacks.checkpoint.keep=1", "keep=1 must be at least 2"),
        ("teacher_rl", "seed=x", "seed='x': must be a whole number"),
        ("teacher_sft", "hardware.dtype=fp8", "hardware.dtype=fp8: choose float32, bfloat16"),
        ("teacher_sft", "hardware.precision=16-mixed", "float16 needs loss scaling"),
        ("teacher_sft", "hardware.precision=bf16mixed", "did you mean 'bf16-mixed'"),
        ("distill", "optim.lr=high", "optim: a value is of the wrong type"),
        ("collect", "rollout.temperature=hot", "rollout: a value is of the wrong type"),
        ("collect", "rollout.top_p=2", "rollout.top_p=2 must lie in (0, 1]"),
        ("collect", "format=xml", "format=xml: choose jsonl, parquet"),
        ("collect", "best_of=0", "best_of=0: must be a whole number of at least 1"),
        ("evaluate", "samples=0", "samples=0: must be a whole number of at least 1"),
        ("collect", "prompt=r1 prompt.student_system_file=no.txt", "student_system_file=no.txt"),
    ],
)
@pytest.mark.parametrize("check", ["true", "false"])
def test_values_that_no_part_takes(
    refuse: Callable[..., str], stage: str, override: str, message: str, check: str
) -> None:
    """A check and the run itself say the same, before a folder is claimed."""
    given = ["explanations=none"] if stage == "distill" else []
    assert message in refuse(f"stage={stage}", *override.split(), *given, f"check={check}")


def test_all_refused_values_at_once(refuse: Callable[..., str]) -> None:
    written = refuse("stage=collect", "best_of=0", "format=xml", "rollout.top_p=2")
    assert written.startswith("rlt: ConfigError: the config has 3 errors:")


def test_a_gpu_that_is_not_there(
    refuse: Callable[..., str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    message = refuse("stage=teacher_sft", "hardware=gpu_8gb")
    assert "hardware.accelerator=gpu: torch" in message and "choose hardware=cpu" in message
    monkeypatch.setattr("torch.backends.mps.is_available", lambda: False)
    message = refuse("stage=teacher_sft", "hardware=mps")
    assert "hardware.accelerator=mps: torch" in message and "choose hardware=cpu" in message


def test_all_errors_at_once(composed: Composed, tmp_path: Path) -> None:
    cfg = composed(
        "stage=teacher_rl", "+typo=1", "+optim.lrr=1", "data=jsonl", "+reward.temprature=1"
    )
    with pytest.raises(ConfigError) as caught:
        run(cfg, tmp_path)
    lines = str(caught.value).splitlines()
    assert lines[0] == "the config has 4 errors:"
    assert sorted(line.split(":")[0].split()[1] for line in lines[1:]) == [
        "data.source.files", "optim.lrr", "reward.temprature", "typo",
    ]  # fmt: skip


@pytest.mark.parametrize(
    "override",
    [
        "+hydra.job.env_set.LD_PRELOAD=/tmp/hostile.so",
        "+hydra.callbacks.x={_target_: os.system, command: touch hostile}",
        "+hydra.job_logging.handlers={x: {class: os.system, command: touch hostile}}",
    ],
)
@pytest.mark.parametrize("mode", [[], ["-m"]])
def test_hydra_s_own_node_is_checked_before_hydra_acts_on_it(
    refuse: Callable[..., str], tmp_path: Path, override: str, mode: list[str]
) -> None:
    written = refuse(*mode, "stage=teacher_rl", "check=true", override)
    assert written.startswith("rlt: ConfigError: the config has 1 error:\n  1. hydra.")
    assert "LD_PRELOAD" not in os.environ and not (tmp_path / "hostile").exists()


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["stage=teacher_rl", "algorithm.epsilon_high=-3"], "algorithm.epsilon_high=-3"),
        (["stage=teacher_rl", "algorithm.minibatches=5000"], "algorithm.minibatches=5000 exceeds"),
        (["stage=teacher_rl", "algorithm.aggregation=sum"], "algorithm.aggregation='sum'"),
        (["stage=teacher_rl", "reward.terms.thought_kl.estimator=k2"], "estimator='k2'"),
        (["stage=teacher_rl", "rollout.temperature=-1"], "rollout.temperature=-1"),
        (["stage=teacher_rl", "rollout.max_new_tokens=0"], "rollout.max_new_tokens=0"),
        (
            ["stage=teacher_rl", "reward_student=other"],
            "reward_student=other: choose reference, student",
        ),
        (["stage=teacher_rl", "reward_student=student"], "set model@student="),
        (["stage=teacher_rl", "teacher_path=nowhere"], "teacher_path=nowhere: no such folder"),
        (["stage=teacher_sft", "datamodule.batch_size=0"], "datamodule.batch_size=0"),
        (["stage=teacher_sft", "datamodule.steps=3"], "set one, and the other null"),
        (["stage=teacher_sft", "data.validation_fraction=2"], "data.validation_fraction=2"),
        (["stage=teacher_sft", "data.on_bad_row=ignore"], "data.on_bad_row='ignore'"),
        (["stage=distill"], "stage=distill needs traces="),
        (["stage=distill", "explanations=some"], "explanations=some: choose traces, data, none"),
        (["steps.teacher.inputs.teacher_path=warmup"], "did you mean warm_up?"),
        (["+steps.teacher.overrides.algorithm.bet=1"], "steps.teacher.overrides.algorithm"),
    ],
)
def test_values_that_a_run_would_stumble_over(
    composed: Composed, tmp_path: Path, overrides: list[str], message: str
) -> None:
    with pytest.raises(USER_ERRORS) as caught:
        run(composed(*overrides, "check=true"), tmp_path)
    assert message in str(caught.value)


# --- the command itself -------------------------------------------------------------------------


def test_a_sweep_needs_no_flag_and_names_folders_by_what_differs(tmp_path: Path) -> None:
    swept = [
        "sweep=learning_rate",
        "optim.lr=0.001",
        "seed=3,4",
        f"output_dir={tmp_path / 'sweep'}",
    ]
    done = rlt(["stage=teacher_rl", *swept, "check=true"], tmp_path)
    for seed in (3, 4):
        assert f"teacher_rl leaves in {tmp_path}/sweep/optim.lr=0.001,seed={seed}: " in done.stdout


def test_a_failed_job_of_a_sweep_does_not_stop_the_others(tmp_path: Path) -> None:
    swept = ["-m", "stage=teacher_rl", "check=true", "algorithm.beta=-1,0.1"]
    done = rlt(swept, tmp_path, status=2)
    assert "1. algorithm.beta=-1, but" in done.stderr
    assert "Traceback" not in done.stderr
    assert done.stdout.count("is sound; nothing was loaded or written") == 1


def test_the_full_error_on_request(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("HYDRA_FULL_ERROR", "1")
    done = rlt(["rewrad=rlt"], tmp_path, status=1)
    assert "Traceback" in done.stderr and "Could not override 'rewrad'" in done.stderr
