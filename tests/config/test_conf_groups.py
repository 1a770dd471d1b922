"""Every file of every config group composes with a stage that uses it; its targets are sound."""

import re
from collections.abc import Callable
from itertools import product
from pathlib import Path

import pytest
from hydra import compose, initialize_config_dir
from omegaconf import DictConfig

from rlt.cli.run import run
from rlt.config.build import build_stage
from rlt.config.check import check_targets
from rlt.config.compose import config_dir
from rlt.config.hydra_guard import check_hydra_node

CONF = config_dir()
STAGES = sorted(path.stem for path in (CONF / "stage").glob("*.yaml"))

# A group → where it is mounted: the stage, and what stands left of = to choose an option of it.
MOUNTS: dict[str, list[tuple[str, str]]] = {
    "algorithm": [("teacher_rl", "algorithm"), ("pipeline", "algorithm")],
    "benchmark": [("evaluate", "benchmark"), ("pipeline", "benchmark")],
    "callbacks": [("teacher_sft", "callbacks"), ("pipeline", "callbacks@teacher_rl.callbacks")],
    "adapter": [
        (stage, "adapter")
        for stage in ("teacher_sft", "teacher_rl", "distill", "student_rl", "pipeline")
    ],
    "credit": [("teacher_rl", "credit"), ("pipeline", "credit")],
    "data": [("teacher_sft", "data"), ("pretrain", "data"), ("pipeline", "data")],
    "hardware": [(stage, "hardware") for stage in STAGES if stage != "compare"],
    "logger": [(stage, "logger") for stage in STAGES if stage != "compare"],
    "model": [
        ("teacher_sft", "model@teacher"),
        ("teacher_rl", "model@student"),
        ("collect", "model@teacher"),
        ("evaluate", "model@student"),
    ],
    "optim": [("teacher_rl", "optim"), ("pipeline", "optim@distill.optim")],
    "prompt": [("teacher_rl", "prompt"), ("evaluate", "prompt")],
    "reward": [("teacher_rl", "reward"), ("collect", "reward"), ("pipeline", "reward")],
    "rollout": [("teacher_rl", "rollout"), ("pipeline", "rollout@collect.rollout")],
    "schedule": [("distill", "schedule"), ("pipeline", "schedule@teacher_rl.schedule")],
    "stage": [(stage, "seed") for stage in STAGES],
    "trainer": [("distill", "trainer"), ("pipeline", "trainer@pretrain.trainer")],
}
# What a stage needs besides its defaults, or besides an option of one group.
NEEDED = {
    ("distill", ""): ("explanations=data",),
    ("score", ""): ("data=digit_chain", "model@teacher=nano"),
    ("teacher_rl", "model@student"): ("reward_student=student",),
}
# Files that are not an option of a mount: parts of a stage, or settings of a whole run.
ELSEWHERE = ("arm", "recipe", "experiment", "sweep", "debug", "hydra")
# What a file leaves to be said, where it is mounted.
TO_SAY = {
    ("benchmark", "reasoning_gym"): ("benchmark.data.source.task=gcd",),
    ("data", "csv"): ("data.source.files=x.csv",),
    ("data", "hub"): ("data.source.path=some/set",),
    ("data", "jsonl"): ("data.source.files=x.jsonl",),
    ("data", "parquet"): ("data.source.files=[x.parquet]",),
    ("data", "reasoning_gym"): ("data.source.task=gcd",),
    ("data", "stratos_files"): ("data.source.files=x.jsonl",),
    ("model", "pretrained"): ("{role}.path=some/model",),
}
DEBUG = {
    "training": ("pretrain", "teacher_sft", "teacher_rl", "distill"),
    "teacher_rl": ("teacher_rl",),
    "pipeline": ("pipeline",),
}
EXPERIMENTS = (
    "claim/qwen_0_5b", "claim/qwen_1_5b", "claim/smollm2", "claim/transfer", "paper_7b",
    "quickstart", "rlt_1_5b", "rlt_7b_qlora", "smollm2_gsm",
)  # fmt: skip
# A sweep → what is said beside it, and how many jobs it has.
SWEEPS = {
    "ablation": ([], 39),
    "base_accuracy": (["stage=evaluate", "model@student=smollm2_135m"], 16),
    "base_difficulty": (["stage=evaluate", "model@student=smollm2_135m"], 18),
    "claim_alpha": ([], 15),
    "claim_cold_start": ([], 15),
    "claim_credit": ([], 21),
    "claim_lambda": ([], 35),
    "claim_nano": ([], 66),
    "claim_qwen": ([], 18),
    "claim_rare": ([], 40),
    "claim_reward": ([], 40),
    "claim_size": ([], 25),
    "claim_smollm2": ([], 30),
    "claim_transfer": ([], 30),
    "lambda_alpha": ([], 4),  # the ends of both intervals, not the trials between them
    "learning_rate": (["stage=teacher_rl"], 18),
}

Composed = Callable[..., DictConfig]


def options(group: str) -> list[str]:
    """A group's files; those that start with _ are parts of others."""
    files = (file.relative_to(CONF / group) for file in (CONF / group).rglob("*.yaml"))
    return sorted(file.with_suffix("").as_posix() for file in files if file.name[0] != "_")


ARMS = options("arm")


def errors(cfg: DictConfig) -> list[str]:
    return check_targets(cfg)


def cases() -> list[tuple[str, str, str, str]]:
    return [
        (stage, key, group, option)
        for group, mounts in MOUNTS.items()
        for (stage, key), option in product(mounts, options(group))
        if group != "stage" or option == stage
    ]


def test_every_group_and_file_is_in_these_tests() -> None:
    folders = {path.name for path in CONF.iterdir() if path.is_dir()}
    assert folders == MOUNTS.keys() | set(ELSEWHERE)
    assert set(options("stage")) == set(STAGES)
    assert set(options("recipe")) == set(STAGES) - {"pipeline", "compare"}
    assert options("debug") == sorted(DEBUG)
    assert options("experiment") == sorted(EXPERIMENTS)
    assert options("sweep") == sorted(SWEEPS)


@pytest.mark.parametrize(("stage", "key", "group", "option"), cases())
def test_each_file_composes(
    composed: Composed, stage: str, key: str, group: str, option: str
) -> None:
    overrides = [f"stage={stage}"] + ([f"{key}={option}"] if group != "stage" else [])
    role = key.partition("@")[2]
    to_say = [text.format(role=role) for text in TO_SAY.get((group, option), ())]
    if to_say:
        first = to_say[0].partition("=")[0]
        missing = errors(composed(*overrides))
        assert any(error.startswith(f"{first}: has no value (???)") for error in missing)
        said = (" has no value (???)", " cannot be resolved")  # or refers to what has none
        assert all(any(text in error for text in said) for error in missing)
    cfg = composed(*overrides, *to_say)
    assert cfg.stage == stage
    assert errors(cfg) == []
    if stage not in ("pipeline", "compare"):
        # The option is looked at here, so what else the stage needs is given to it.
        needed = NEEDED.get((stage, key), NEEDED.get((stage, ""), ()))
        servers = (f"{key}.servers=[http://127.0.0.1:1]",) if option == "vllm" else ()
        build_stage(composed(*overrides, *to_say, *needed, *servers))


# --- whole runs ---------------------------------------------------------------------------------


@pytest.mark.parametrize("experiment", EXPERIMENTS)
def test_each_experiment_composes(composed: Composed, experiment: str) -> None:
    cfg = composed(f"experiment={experiment}")
    assert cfg.stage == "pipeline"
    assert errors(cfg) == []


@pytest.mark.parametrize(
    ("debug", "stage"), [(name, stage) for name, stages in DEBUG.items() for stage in stages]
)
def test_each_debug_file_composes(composed: Composed, debug: str, stage: str) -> None:
    cfg = composed(f"stage={stage}", f"debug={debug}")
    assert errors(cfg) == []
    recipe = cfg.teacher_sft if stage == "pipeline" else cfg
    assert (recipe.datamodule.batch_size, recipe.datamodule.steps) == (2, 2)
    assert recipe.datamodule.epochs is None


@pytest.mark.parametrize("experiment", EXPERIMENTS)
def test_debug_makes_any_experiment_small(composed: Composed, experiment: str) -> None:
    cfg = composed(f"experiment={experiment}", "debug=pipeline")
    assert cfg.teacher_rl.datamodule.steps == 2
    assert cfg.cache_dir == "outputs/debug_steps"


def swept(values: str) -> list[str]:
    """The values of a grid, or the two ends of an interval."""
    interval = re.search(r"interval\((.*), *(.*?)\)", values)
    return list(interval.groups()) if interval else values.split(",")


@pytest.mark.parametrize("sweep", SWEEPS)
def test_every_value_of_each_sweep_composes(composed: Composed, sweep: str) -> None:
    beside, n_jobs = SWEEPS[sweep]
    with initialize_config_dir(str(CONF), version_base="1.3"):
        node = compose("config", [*beside, f"sweep={sweep}"], return_hydra_config=True)
    assert node.hydra.mode.name == "MULTIRUN"
    assert check_hydra_node(node.hydra) == []
    params = node.hydra.sweeper.params
    choices = [[f"{key}={v}" for v in swept(str(values))] for key, values in params.items()]
    assert len(list(product(*choices))) == n_jobs
    first = [key_choices[0] for key_choices in choices]
    for place, key_choices in enumerate(choices):
        if not key_choices[0].startswith("seed="):
            for choice in key_choices:
                job = [*first[:place], choice, *first[place + 1 :]]
                assert errors(composed(*beside, f"sweep={sweep}", *job)) == []


def experiment_of(arm: str) -> str:
    """The experiment that an arm belongs to."""
    if arm == "chain":
        return "smollm2_gsm"
    if arm.startswith(("able_", "smollm2/")):
        return "claim/smollm2"
    return "claim/transfer" if arm.startswith("transfer/") else "quickstart"


@pytest.mark.parametrize("arm", ARMS)
def test_each_arm_has_sound_steps(composed: Composed, arm: str) -> None:
    experiment = experiment_of(arm)
    cfg = composed(f"experiment={experiment}", f"arm={arm}")
    configs = build_stage(cfg).configs
    if experiment in ("quickstart", "claim/transfer") and arm != "from_scratch":
        assert list(configs)[:3] == ["base", "gold_student", "gold_accuracy"]
        assert cfg.steps.gold_accuracy.gate == {"eval/avg@4": 0.97}
    last = cfg.steps[list(configs)[-1]]
    assert last.stage == "evaluate" and last.label


def chosen_by(arm: str) -> dict[str, str]:
    """The options of other groups that an arm's file chooses, such as its reward."""
    text = (CONF / f"arm/{arm}.yaml").read_text(encoding="utf-8")
    return dict(re.findall(r"override /(\w+): (\w+)", text))


@pytest.mark.parametrize("arm", [arm for arm in ARMS if chosen_by(arm)])
def test_an_experiment_leaves_to_its_arm_what_the_arm_chooses(arm: str) -> None:
    """An override in an experiment would win over the arm's without a word."""
    with initialize_config_dir(str(CONF), version_base="1.3"):
        overrides = [f"experiment={experiment_of(arm)}", f"arm={arm}"]
        choices = compose("config", overrides, return_hydra_config=True).hydra.runtime.choices
    assert {group: choices[group] for group in chosen_by(arm)} == chosen_by(arm)


@pytest.mark.parametrize("file", sorted(CONF.rglob("*.yaml")), ids=lambda file: file.stem)
def test_each_file_says_first_what_it_is_for(file: Path) -> None:
    lines = file.read_text(encoding="utf-8").splitlines()
    if lines[0].startswith("# @package"):
        del lines[0]
    assert re.match(r"# [A-Z]", lines[0])


# --- plans --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("overrides", "shown"),
    [
        (["stage=pretrain"], "700 steps of 128"),
        (["stage=teacher_sft"], "640 steps of 16"),  # 10 epochs of 1,024
        (["stage=teacher_rl"], "1024 completions a"),
        (["stage=collect", "best_of=3"], "best of 3 for all"),
        (["stage=collect", "best_of=3", "rank=3"], "number 3 of 3 for all"),
        (["stage=student_rl"], "1024 completions a"),
        (["stage=score", "data=digit_chain", "model@teacher=nano"], "1024 training"),
        (["stage=distill", "explanations=data"], "192 steps of 16"),  # 3 epochs of 1,024
        (["stage=evaluate"], "4 answers to each of"),
        (["stage=pipeline"], "warm_up"),
        (["stage=pipeline", "arm=from_scratch"], "solutions"),
        (["experiment=quickstart"], "solutions"),
        (["experiment=quickstart", "arm=rlt"], "gold_accuracy"),
        (["experiment=claim/transfer"], "teacher"),
        (["experiment=quickstart", "arm=size/small_rlt_to_large"], "large"),
        (["experiment=claim/smollm2"], "134.5 M parameters"),
        (["experiment=smollm2_gsm"], "134.5 M parameters"),
    ],
)
def test_plans_of_what_needs_no_hub(
    composed: Composed,
    overrides: list[str],
    shown: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert run(composed(*overrides, "check=true"), tmp_path) == {}
    printed = capsys.readouterr().out
    assert shown in printed and "is sound; nothing was loaded or written" in printed
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("launcher", sorted(f.stem for f in (CONF / "hydra/launcher").iterdir()))
def test_each_launcher_composes(launcher: str) -> None:
    """Ray is not in the lock: its extra is then named."""
    with initialize_config_dir(str(CONF), version_base="1.3"):
        node = compose("config", [f"hydra/launcher={launcher}"], return_hydra_config=True)
    found = check_hydra_node(node.hydra)
    assert found == [] or (launcher == "ray_cluster" and "pip install 'rlt[ray]'" in found[0])


# --- products -----------------------------------------------------------------------------------


@pytest.mark.parametrize("stage", ["teacher_rl", "student_rl", "teacher_sft", "distill"])
@pytest.mark.parametrize("adapter", options("adapter"))
def test_adapters_go_with_every_reward_algorithm_and_optimizer(
    composed: Composed, adapter: str, stage: str
) -> None:
    """Every group is composed once; its nodes are then put together in every way."""
    always = (f"stage={stage}", f"adapter={adapter}", *NEEDED.get((stage, ""), ()))
    cfg = composed(*always)
    nodes_of = {
        group: [(group, composed(*always, f"{group}={option}")[group]) for option in options(group)]
        for group in ("reward", "algorithm", "optim")
        if group in cfg
    }
    optims = nodes_of.pop("optim")
    for nodes in (*product(*nodes_of.values()), *((optim,) for optim in optims)):
        one = cfg.copy()
        for group, node in nodes:
            one[group] = node
        built = build_stage(one)
        assert built.adapting.quantization == ("nf4" if adapter == "qlora" else None)
        assert built.adapting.lr_factor == (1.0 if adapter == "none" else 10.0)
