"""What a stage is: one dataclass that says all that the program needs to know of it.

Its fields are the keys of its config; `rlt.config.build.build_stage` builds each of them once. Its
class attributes and methods tell the pipeline what it makes, the plan what it reads and how large
it is, the report how its result is told. To add a stage, write one such class and one YAML file
that names it under `_target_` (docs/howto/stage.md).
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Literal

from rlt.config.allowed_targets import raise_if_any
from rlt.config.fields import field_errors, passes
from rlt.data.dataset import ProblemData
from rlt.data.problem import Problem
from rlt.data.prompt_style import PromptStyle, StyleByTokenizer
from rlt.data.renderer import Renderer
from rlt.llm.device import Hardware
from rlt.llm.model_sources import ModelSource, source_at
from rlt.llm.models import LanguageModel
from rlt.runs import ranks
from rlt.runs.folder import RunFolder
from rlt.runs.formatting import number

Role = Literal["teacher", "student"]
RUN_FILES = ("config.yaml", "manifest.json", "metrics.json", "report.md", "report.html")
FIRST_LOOK = 64  # problems tokenised before any weights are loaded


@dataclass(frozen=True)
class Inputs:
    """What a stage reads, looked at without weights.

    Attributes:
        problems: to train on, or to work through; None where a hub was not reached.
        held_out: for validation.
        in_words: a line about what was read.
    """

    problems: list[Problem] | None
    held_out: list[Problem]
    in_words: str


@dataclass(kw_only=True)
class Stage:
    """A stage of any kind.

    Attributes:
        name: what `stage=` chooses it by.
        trains: the role whose weights it changes.
        makes: what a later step of a pipeline can read from its folder: `model` or `traces`.
        leaves: files in its run folder.
        card: the first sentence on the README.md of a model that it makes.
        limit: key of the number of items that it works through, and key of how many at once.
        walked_again: a finished run is run again, as what it reads knows best what is still good.
        writes_own_report: report.md is its result, a study of other runs. A run with another config
            may take its folder, because nothing but a page is lost.
    """

    seed: int

    name: ClassVar[str]
    trains: ClassVar[Role | None] = None
    makes: ClassVar[str | None] = None
    leaves: ClassVar[tuple[str, ...]] = RUN_FILES
    card: ClassVar[str | None] = None
    limit: ClassVar[tuple[str, str] | None] = None
    walked_again: ClassVar[bool] = False
    writes_own_report: ClassVar[bool] = False

    def __post_init__(self) -> None:
        raise_if_any(field_errors(type(self), vars(self)))

    @classmethod
    def config_errors(cls, cfg: Any) -> list[str]:
        """What is wrong with a config before anything of it is built."""
        return []

    @classmethod
    def as_step(cls, step: Any, pipeline: Any) -> None:
        """Set what a step's config takes from its pipeline's, before the step's own overrides."""

    @classmethod
    def settle(cls, step: Any) -> None:
        """Change a step's config for the last time, after its overrides and inputs are set."""

    def run(self, run: RunFolder) -> dict[str, float]:
        """Do the work in a claimed run folder, from where it stopped; returns final metrics."""
        raise NotImplementedError

    @property
    def files(self) -> tuple[str, ...]:
        """What it leaves as it is configured."""
        return self.leaves

    @staticmethod
    def result(run: Any) -> list[str]:
        """A finished run's result in sentences; the first one stands for it in a pipeline's report.

        Args:
            run: its folder, read (`rlt.report.folder.Run`).
        """
        return [f"{name} {number(value)}." for name, value in sorted(run.metrics.items())]

    @staticmethod
    def write_report(folder: Path) -> None:
        """Write report.md of a finished run, and the card of its model."""
        from rlt.report import write_result  # it loads matplotlib

        write_result(folder)

    @staticmethod
    def print_result(folder: Path, brief: bool = False) -> None:
        """Print the result of a finished run.

        Args:
            brief: print sentences only, without metrics and paths, as for a step of a pipeline.
        """
        from rlt.report import print_result

        print_result(folder, brief)

    def look(self) -> Inputs:
        """What a stage reads that runs no models."""
        return Inputs(None, [], "")

    def count_steps(self, inputs: Inputs) -> int | None:
        """Steps of training, or batches, of the whole run; None if that is not known yet."""
        return None

    def does(self, inputs: Inputs) -> list[str]:
        """Lines of a plan: what the run would do."""
        return []

    def warnings(self, inputs: Inputs) -> list[str]:
        """Lines of a plan: what its user may not have meant."""
        return []


@dataclass(kw_only=True)
class ModelStage(Stage):
    """A stage that runs language models on problems.

    Attributes:
        writer: the role that samples completions, if one does.
        renders_for: the role whose tokenizer renders the problems.
    """

    hardware: Hardware
    logger: Callable[..., Any] | None = passes("save_dir")
    prompt: PromptStyle | StyleByTokenizer

    writer: ClassVar[Role | None] = None
    renders_for: ClassVar[Role] = "student"

    def source(self, role: str) -> ModelSource | None:
        """Where a role's model comes from: `<role>_path` if that is set, else its config group.

        Raises:
            FileNotFoundError: the path is no folder; it is never taken for a hub id.
        """
        source = getattr(self, role, None)
        path = getattr(self, f"{role}_path", None)
        if source is None or path is None:
            return source
        if not Path(path).is_dir():
            raise FileNotFoundError(f"{role}_path={path}: no such folder; give <run>/model")
        return source_at(source, path)

    @property
    def roles(self) -> list[str]:
        """Roles of the models that this stage loads."""
        return [role for role in ("teacher", "student") if getattr(self, role, None) is not None]

    def load_model(self, role: str) -> LanguageModel:
        """Weights and tokenizer of a role."""
        from rlt.stages.common import load

        source = self.source(role)
        assert source is not None, role
        return load(role, source)

    def load_renderer(self, role: str | None = None) -> Renderer:
        """Prompt style with a role's tokenizer; reads no weights."""
        source = self.source(role or self.renders_for)
        assert source is not None
        return Renderer(self.prompt, source.tokenizer())

    def make_logger(self, folder: Path) -> Any:
        """The config's Lightning logger, writing into a run folder; None if there is none."""
        return self.logger(save_dir=str(folder)) if self.logger and ranks.is_main() else None

    # --- what a plan asks ------------------------------------------------------------------------

    def problem_data(self) -> ProblemData | None:
        """The data that this stage reads problems from, if it does."""
        return getattr(self, "data", None)

    def read(self, renderer: Renderer | None) -> Inputs:
        """Read what the run would read.

        Args:
            renderer: None if no tokenizer is at hand; lengths are then not limited.
        """
        data = self.problem_data()
        assert data is not None
        forbidden = renderer.forbidden if renderer is not None else self.prompt.forbidden
        split = data.load(forbidden, renderer.count_tokens if renderer is not None else len)
        for problem in split.train[:FIRST_LOOK] if renderer is not None else ():
            assert renderer is not None
            renderer.teacher_prompt(problem)  # a tokenizer that cannot read them is told here
        bad = sum(split.report["bad"].values())
        words = f"data: {len(split.train)} training, {len(split.validation)} held out"
        words += f", {bad} broken rows skipped" if bad else ""
        return Inputs(split.train, split.validation, words)

    @property
    def reads(self) -> str:
        """What `read` reads, to be named where a hub was not reached."""
        return "data"

    def rows(
        self, problems: Sequence[Problem], renderer: Renderer
    ) -> list[tuple[list[int], list[int]]]:
        """Token ids of prompts, and of the targets after them, as the models would see them."""
        return [(renderer.student_prompt(problem), []) for problem in problems]

    def check_lengths(
        self, contexts: Mapping[str, int], problems: Sequence[Problem], renderer: Renderer
    ) -> None:
        """Raises ValueError where something would outgrow a model's context.

        Args:
            contexts: role → tokens.
        """

    @property
    def completions(self) -> tuple[int, int] | None:
        """Completions that are sampled at once, and how many of them share a prompt."""
        return None

    @property
    def rows_per_step(self) -> int:
        """Rows that one update trains on."""
        return 0

    @property
    def scores_by(self) -> str | None:
        """The role whose log-probs make the reward, if there is one."""
        return None

    @property
    def holds_reference(self) -> bool:
        """Whether a frozen copy of the trained model is in memory besides."""
        return False


def batches(items: int | None, size: int, limit: int | None = None) -> int | None:
    """How many batches a number of items makes; None where it is not known."""
    if items is None:
        return None
    return -(-min(items, limit if limit is not None else items) // size)
