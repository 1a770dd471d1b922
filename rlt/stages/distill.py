"""`rlt stage=distill`: a student learns from explanations and solutions, or from solutions alone.

The explanations are those of traces, or the data's own. Some of the traces are held out to measure
the loss, and some of the questions to measure accuracy.
"""

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

from rlt.config.fields import at_least
from rlt.data.dataset import ProblemData, split_problems
from rlt.data.problem import Problem
from rlt.data.renderer import Renderer
from rlt.data.traces import find_traces, trace_source
from rlt.evaluation.answers import extract_answer
from rlt.llm.adapters import Adapter
from rlt.llm.model_sources import ModelSource
from rlt.runs.folder import RunFolder
from rlt.sampling import Rollout
from rlt.stages.common import load_data
from rlt.stages.examples import require_explanations, student_examples
from rlt.stages.rl import sampling_in_words
from rlt.stages.stage import Inputs, Role
from rlt.stages.training import SFTStage
from rlt.training import Example

log = logging.getLogger(__name__)


@dataclass(kw_only=True)
class Distill(SFTStage):
    """Fine-tunes a student on explanations and solutions, or on solutions alone."""

    student: ModelSource
    student_path: str | None
    adapter: Adapter
    traces: str | None
    data: ProblemData
    rollout: Rollout
    explanations: Literal["traces", "data", "none"]
    max_examples: int | None = at_least(1)
    validation_fraction: float
    validation_answers: int = at_least(0)

    name: ClassVar[str] = "distill"
    trains: ClassVar[Role | None] = "student"
    writer: ClassVar[Role | None] = "student"
    card: ClassVar[str | None] = (
        "A student, fine-tuned on explanations: it is asked a question, thinks, answers."
    )

    @classmethod
    def config_errors(cls, cfg: Any) -> list[str]:
        """Where `explanations` and `traces` contradict each other."""
        reads = cfg.traces is not None
        if cfg.explanations == "traces" and not reads:
            return [
                "stage=distill needs traces=<run>/traces; or explanations=data for the data's own, "
                "or explanations=none for solutions alone"
            ]
        if cfg.explanations in ("data", "none") and reads:
            return [
                f"traces={cfg.traces} would not be read with explanations={cfg.explanations}; "
                "leave one of them out"
            ]
        return []

    def __post_init__(self) -> None:
        super().__post_init__()
        asks = self.validation_answers > 0 and self.data.validation_fraction > 0
        if asks and self.data.grader is None:
            raise ValueError(
                f"validation_answers={self.validation_answers} grades answers: set data.grader (it "
                "is null), or validation_answers=0"
            )

    def run(self, run: RunFolder) -> dict[str, float]:
        renderer = self.load_renderer()
        split = load_data(self.data, renderer)
        report: dict[str, Any] = {"data": split.report}
        train, validation = split.train, split.validation
        if self.explanations == "traces":
            traces = ProblemData(
                trace_source(self.traces or ""),
                on_bad_row=self.data.on_bad_row,
                validation_fraction=0,
            ).load(renderer.forbidden)
            # Traces are of training questions already: another split of them needs other numbers.
            train, validation = split_problems(traces.train, self.validation_fraction, "traces")
            counts = {"train": len(train), "validation": len(validation)}
            report["traces"] = traces.report | counts
            known = {problem.id for problem in split.train}
            if not any(problem.id in known for problem in traces.train):
                log.warning(
                    "traces: none of their %d questions is among data's training problems; the "
                    "accuracy while training is measured on data's held-out questions, so choose "
                    "data=… as for collect, or validation_answers=0",
                    len(traces.train),
                )
        run.record(**report)
        if self.explanations != "none":
            require_explanations(train)
        train_examples = self.examples(train[: self.max_examples], renderer)
        validation_examples = self.examples(validation, renderer)
        questions = split.validation[: self.validation_answers]
        accuracy = self.answer_accuracy(renderer, questions) if questions else None
        return self.fit(run, renderer, train_examples, validation_examples, accuracy)

    def examples(self, problems: Sequence[Problem], renderer: Renderer) -> list[Example]:
        return student_examples(problems, renderer, self.explanations == "none")

    def answer_accuracy(
        self, renderer: Renderer, questions: list[Problem]
    ) -> Callable[[Any], float]:
        """A function of the student: the fraction of held-out questions that it answers right."""
        tags = renderer.style.tags["solution_open"], renderer.style.tags["solution_close"]
        grader = self.data.grader
        assert grader is not None

        def accuracy(student: Any) -> float:
            prompts = [renderer.student_prompt(problem) for problem in questions]
            self.rollout.prepare(student, renderer.tokenizer)
            groups = self.rollout.sample(student, renderer.tokenizer, prompts, 1, tags[1])
            answers = [extract_answer(renderer.decode(group[0].ids), *tags) for group in groups]
            verdicts = grader.grade_all(
                [(p, a) for p, a in zip(questions, answers, strict=True) if a is not None]
            )
            return sum(v.correct for v in verdicts) / len(questions)

        return accuracy

    # --- what a plan asks ------------------------------------------------------------------------

    def read(self, renderer: Renderer | None) -> Inputs:
        if self.traces is not None:
            find_traces(self.traces)
        inputs = super().read(renderer)
        if self.explanations == "data":
            require_explanations(inputs.problems or [])
        return inputs

    def rows(
        self, problems: Sequence[Problem], renderer: Renderer
    ) -> list[tuple[list[int], list[int]]]:
        if self.explanations == "traces":  # how long they are is known when they are read
            return [(renderer.student_prompt(problem), []) for problem in problems]
        return super().rows(problems, renderer)

    def check_lengths(self, contexts: Any, problems: Any, renderer: Renderer) -> None:
        if self.explanations != "traces":
            super().check_lengths(contexts, problems, renderer)

    def count_steps(self, inputs: Inputs) -> int | None:
        if self.explanations == "traces":
            return self._known_steps(None)
        train = None if inputs.problems is None else len(inputs.problems)
        limit = self.max_examples
        return self._known_steps(train if train is None or limit is None else min(train, limit))

    def warnings(self, inputs: Inputs) -> list[str]:
        return [] if self.explanations == "traces" else super().warnings(inputs)

    def does(self, inputs: Inputs) -> list[str]:
        return [*super().does(inputs), sampling_in_words(self.rollout)]

    @property
    def completions(self) -> tuple[int, int]:
        return max(1, self.validation_answers), 1
