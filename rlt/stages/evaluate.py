"""`rlt stage=evaluate`: a student answers a benchmark's questions, k times each."""

import json
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar

from omegaconf import OmegaConf

from rlt.config.fields import at_least
from rlt.data.dataset import ProblemData
from rlt.data.problem import Problem
from rlt.data.renderer import Renderer
from rlt.evaluation.benchmark import Benchmark, evaluate_answers
from rlt.evaluation.contamination import Contamination
from rlt.llm.device import on_device
from rlt.llm.model_sources import ModelSource
from rlt.llm.models import fingerprint, freeze
from rlt.report.results import evaluate_result
from rlt.runs import ranks
from rlt.runs.environment import peak_memory_bytes
from rlt.runs.folder import RunFolder
from rlt.sampling import Rollout
from rlt.stages.common import in_batches, log_scalars
from rlt.stages.rl import sampling_in_words
from rlt.stages.stage import RUN_FILES, Inputs, ModelStage, Role, batches


@dataclass(kw_only=True)
class Evaluate(ModelStage):
    """Samples answers of a student and grades them.

    Attributes:
        thinking: False gives the student an empty thought, so that it answers at once.
        trained_on: data that the questions may overlap with, to be measured.
    """

    student: ModelSource
    student_path: str | None
    benchmark: Benchmark
    rollout: Rollout
    samples: int = at_least(1)
    thinking: bool
    questions_per_batch: int = at_least(1)
    contamination: Contamination
    trained_on: ProblemData | None

    name: ClassVar[str] = "evaluate"
    writer: ClassVar[Role | None] = "student"
    leaves: ClassVar[tuple[str, ...]] = (*RUN_FILES, "answers.jsonl")
    limit: ClassVar[tuple[str, str] | None] = ("benchmark.max_questions", "questions_per_batch")

    @classmethod
    def as_step(cls, step: Any, pipeline: Any) -> None:
        """Tell a step's config what the other steps of its pipeline train on."""
        step.trained_on = pipeline.data
        if pipeline.data.get("parts") is not None:  # other steps may train on the other parts
            OmegaConf.update(step, "trained_on.parts", None)
            OmegaConf.update(step, "trained_on.part", None)

    def run(self, run: RunFolder) -> dict[str, float]:
        renderer = self.load_renderer()
        benchmark = self.benchmark
        problems = benchmark.load(renderer.style.forbidden, renderer.count_tokens)
        overlap = self.check_contamination(renderer, problems)
        student = on_device(freeze(self.load_model("student").model), self.hardware.device)
        run.record(data=benchmark.report, models={"student": fingerprint(student)})
        tags = renderer.style.tags["solution_open"], renderer.style.tags["solution_close"]

        def prompt(problem: Problem) -> list[int]:
            return (
                renderer.student_prompt(problem)
                if self.thinking
                else renderer.answer_prompt(problem, [])
            )

        begun = "" if self.thinking else tags[0]  # of the answer, by the prompt

        def answer(questions: list[Problem]) -> list[dict[str, Any]]:
            prompts = [prompt(problem) for problem in questions]
            groups = self.rollout.sample(
                student, renderer.tokenizer, prompts, self.samples, tags[1]
            )
            return [
                {
                    "problem_id": problem.id,
                    "texts": [begun + renderer.decode(c.ids) for c in group],
                    "tokens": [len(c.ids) for c in group],
                }
                for problem, group in zip(questions, groups, strict=True)
            ]

        self.rollout.prepare(student, renderer.tokenizer)
        partial = run.folder / "answers.partial"
        rows = in_batches(
            problems, self.questions_per_batch, partial, self.seed, "answering", answer
        )

        def grade() -> dict[str, float]:
            with benchmark.grader:
                result = evaluate_answers(
                    problems,
                    [row["texts"] for row in rows],
                    tags,
                    benchmark.grader,
                    [row["tokens"] for row in rows],
                    [renderer.decode(prompt(problem)) for problem in problems],
                )
            with (run.folder / "answers.jsonl").open("w", encoding="utf-8") as file:
                for record in result.records:
                    file.write(json.dumps(record.to_json(), ensure_ascii=False) + "\n")
            partial.unlink()
            return result.metrics

        metrics = ranks.from_main(grade, "grading") | overlap
        log_scalars(self.make_logger(run.folder), metrics)
        return metrics | {"resources/peak_memory_bytes": float(peak_memory_bytes())}

    def check_contamination(self, renderer: Renderer, problems: list[Problem]) -> dict[str, float]:
        """Overlap of the questions with what the student was trained on, if that is known.

        Raises:
            ValueError: it is above the config's limit.
        """
        if self.trained_on is None:
            return {}
        trained_on = self.trained_on.load(renderer.forbidden, renderer.count_tokens).train
        return self.contamination.check(trained_on, problems)

    # --- what a plan asks ------------------------------------------------------------------------

    def read(self, renderer: Renderer | None) -> Inputs:
        count: Callable[[str], int] = renderer.count_tokens if renderer is not None else len
        questions = self.benchmark.load(self.prompt.forbidden, count)
        if renderer is not None:
            self.check_contamination(renderer, questions)
        words = f"benchmark {self.benchmark.name}: {len(questions)} questions"
        return Inputs(questions, [], words)

    @property
    def reads(self) -> str:
        return f"benchmark {self.benchmark.name}"

    def count_steps(self, inputs: Inputs) -> int | None:
        questions = None if inputs.problems is None else len(inputs.problems)
        return batches(questions, self.questions_per_batch)

    def does(self, inputs: Inputs) -> list[str]:
        questions = "?" if inputs.problems is None else len(inputs.problems)
        return [
            f"{self.samples} answers to each of {questions} questions",
            sampling_in_words(self.rollout),
        ]

    @property
    def completions(self) -> tuple[int, int]:
        return self.questions_per_batch * self.samples, self.samples

    @staticmethod
    def result(run: Any) -> list[str]:
        return evaluate_result(run)
