"""The shape of every stage's config: which keys there are, and what the shared values mean.

Each stage's dataclass comes first in its defaults list, so a misspelt key fails wherever it stands,
in an experiment file too. A stage lists only what it uses: `stage=distill reward=rlt` is an error.
What lies below a `_target_` is typed by that target's signature instead (see `rlt.config.check`).

A stage's config is the shared groups it uses plus its *recipe*, the knobs that are its own. The
pipeline holds the shared groups once and every stage's recipe under the stage's name; the config
of one step is cut out of it (`rlt.stages.pipeline`) and is then an ordinary stage config.

This module imports no torch: `rlt --help` must be quick.
"""

from dataclasses import dataclass, field
from typing import Any

from hydra.core.config_store import ConfigStore
from omegaconf import MISSING

from rlt.config.suggestions import did_you_mean

Node = Any  # a config group's content: a mapping checked against its `_target_`


@dataclass
class Hardware:
    """What the machine can hold and how Lightning drives it (`conf/hardware/`)."""

    accelerator: str = MISSING
    devices: Any = 1
    num_nodes: int = 1
    strategy: Any = "auto"
    precision: str = "32-true"
    dtype: str = "float32"
    attention: str = "sdpa"
    tokens_per_micro_batch: int = 1024
    generation_token_budget: int = 65536
    gradient_checkpointing: bool = False
    threads: int | None = None


@dataclass
class Base:
    """What every stage has."""

    stage: str = MISSING
    seed: int = 0
    output_dir: str | None = None
    note: str | None = None  # printed with the result: what its numbers are good for
    check: bool = False
    probe: bool = False  # with check: run the first steps, for their time and memory
    accept_changes: list[str] = field(default_factory=list)  # keys: see rlt.runs.folder


@dataclass
class Common(Base):
    """What every stage has that runs models."""

    hardware: Hardware = field(default_factory=Hardware)
    logger: Node = None


@dataclass
class TrainingRecipe:
    """What every training stage has of its own."""

    module: Node = MISSING
    datamodule: Node = MISSING
    optim: Node = MISSING
    schedule: Node = MISSING
    trainer: Node = MISSING
    callbacks: Node = None


@dataclass
class PretrainRecipe(TrainingRecipe):
    data: Node = MISSING


@dataclass
class TeacherSFTRecipe(TrainingRecipe):
    pass


@dataclass
class TeacherRLRecipe(TrainingRecipe):
    rollout: Node = MISSING
    reward_student: str = "reference"
    preflight: Node = None


@dataclass
class StudentRLRecipe(TrainingRecipe):
    rollout: Node = MISSING
    missing_answer_penalty: float = 0.0


@dataclass
class CollectRecipe:
    rollout: Node = MISSING
    sees_solution: bool = True
    best_of: int = 1
    rank: int = 1
    max_problems: int | None = None
    max_student_tokens: int | None = None
    keep_unclosed: bool = False
    format: str = "jsonl"
    problems_per_batch: int = 64


@dataclass
class DistillRecipe(TrainingRecipe):
    rollout: Node = MISSING
    explanations: str = "traces"
    max_examples: int | None = None
    validation_fraction: float = 0.05
    validation_answers: int = 64


@dataclass
class EvaluateRecipe:
    rollout: Node = MISSING
    samples: int = 1
    thinking: bool = True
    questions_per_batch: int = 64
    contamination: Node = MISSING


@dataclass
class Pretrain(Common, PretrainRecipe):
    student: Node = MISSING
    prompt: Node = MISSING


@dataclass
class TeacherSFT(Common, TeacherSFTRecipe):
    teacher: Node = MISSING
    teacher_path: str | None = None
    data: Node = MISSING
    prompt: Node = MISSING


@dataclass
class TeacherRL(Common, TeacherRLRecipe):
    teacher: Node = MISSING
    teacher_path: str | None = None
    student: Node = None
    student_path: str | None = None
    data: Node = MISSING
    prompt: Node = MISSING
    reward: Node = MISSING
    credit: Node = MISSING
    algorithm: Node = MISSING


@dataclass
class ScoreRecipe:
    preflight: Node = None
    temperature: float = 1.0
    keep_fraction: float = 1.0
    attributed: int = 8
    format: str = "jsonl"
    rows_per_batch: int = 64


@dataclass
class Score(Common, ScoreRecipe):
    student: Node = MISSING
    student_path: str | None = None
    teacher: Node = None
    teacher_path: str | None = None
    traces: str | None = None
    data: Node = None
    prompt: Node = MISSING
    reward: Node = MISSING


@dataclass
class StudentRL(Common, StudentRLRecipe):
    student: Node = MISSING
    student_path: str | None = None
    data: Node = MISSING
    prompt: Node = MISSING
    algorithm: Node = MISSING


@dataclass
class Collect(Common, CollectRecipe):
    teacher: Node = MISSING
    teacher_path: str | None = None
    student: Node = MISSING
    student_path: str | None = None
    data: Node = MISSING
    prompt: Node = MISSING
    reward: Node = MISSING


@dataclass
class Distill(Common, DistillRecipe):
    student: Node = MISSING
    student_path: str | None = None
    traces: str | None = None
    data: Node = MISSING
    prompt: Node = MISSING


@dataclass
class Evaluate(Common, EvaluateRecipe):
    student: Node = MISSING
    student_path: str | None = None
    prompt: Node = MISSING
    benchmark: Node = MISSING
    trained_on: Node = None


@dataclass
class Step:
    """One stage run inside a pipeline.

    Attributes:
        stage: which stage.
        inputs: config key that takes a path → the earlier step whose artefact it is.
        overrides: config key of the stage (dotted) → value, for this step alone.
        gate: final metric → its smallest value, below which the pipeline stops here.
        label: name in tables and plots; the step's own name if null.
    """

    stage: str = MISSING
    inputs: dict[str, str] = field(default_factory=dict)
    overrides: dict[str, Any] = field(default_factory=dict)
    gate: dict[str, float] = field(default_factory=dict)
    label: str | None = None


@dataclass
class Pipeline(Common):
    """Every shared group once, every stage's recipe under its name, and the steps to run."""

    teacher: Node = MISSING
    teacher_path: str | None = None
    student: Node = MISSING
    student_path: str | None = None
    data: Node = MISSING
    prompt: Node = MISSING
    reward: Node = MISSING
    credit: Node = MISSING
    algorithm: Node = MISSING
    benchmark: Node = MISSING
    pretrain: PretrainRecipe = field(default_factory=PretrainRecipe)
    teacher_sft: TeacherSFTRecipe = field(default_factory=TeacherSFTRecipe)
    teacher_rl: TeacherRLRecipe = field(default_factory=TeacherRLRecipe)
    collect: CollectRecipe = field(default_factory=CollectRecipe)
    distill: DistillRecipe = field(default_factory=DistillRecipe)
    student_rl: StudentRLRecipe = field(default_factory=StudentRLRecipe)
    evaluate: EvaluateRecipe = field(default_factory=EvaluateRecipe)
    steps: dict[str, Step] = field(default_factory=dict)
    cache_dir: str = "outputs/steps"


@dataclass
class Compare(Base):
    runs: list[str] = field(default_factory=list)
    reference: str | None = None
    evaluations: str = "last"
    metric: str | None = None
    direction: str | None = None
    title: str | None = None


STAGES: dict[str, type[Base]] = {
    "pretrain": Pretrain,
    "teacher_sft": TeacherSFT,
    "teacher_rl": TeacherRL,
    "collect": Collect,
    "distill": Distill,
    "student_rl": StudentRL,
    "score": Score,
    "evaluate": Evaluate,
    "pipeline": Pipeline,
    "compare": Compare,
}


def of(stage: Any) -> type[Base]:
    """A stage's dataclass; raises ValueError if there is no such stage."""
    if stage not in STAGES:
        raise ValueError(
            f"stage={stage} is none of {', '.join(STAGES)}{did_you_mean(str(stage), STAGES)}"
        )
    return STAGES[stage]


# What a step of a pipeline may be: the stages whose recipes a pipeline holds.
STEP_STAGES = [name for name in STAGES if name in Pipeline.__dataclass_fields__]


def register() -> None:
    """Put every stage's dataclass into Hydra's config store as `schema/<stage>`."""
    store = ConfigStore.instance()
    for name, schema in STAGES.items():
        store.store(group="schema", name=name, node=schema, package="_global_", provider="rlt")
