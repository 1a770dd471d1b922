"""`rlt stage=score`: any explanations, scored by any reward and student, without RL.

    rlt stage=score traces=outputs/traces/traces model@student=… model@teacher=…
    rlt stage=score data=gsm_symbolic reward=solution_only model@student=smollm2_135m

Explanations come from traces, or from a data set's own. r_KL compares the student with a teacher,
so rewards that hold it need `model@teacher`; with its own weights, if the teacher that wrote the
text is at hand. The best `keep_fraction` is written as traces that `stage=distill` takes.

How well the reward tells good explanations from bad is told, too (`rlt.rewards.preflight`): of the
data's own, against damaged copies; of traces beside `data=…`, by its classifier and its grader.
"""

import dataclasses
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

from rlt.config.allowed_targets import raise_if_any
from rlt.config.fields import at_least
from rlt.data.dataset import ProblemData
from rlt.data.problem import Problem
from rlt.data.renderer import Renderer
from rlt.data.traces import trace_source, write_rows, write_traces
from rlt.evaluation.statistics import bootstrap_interval
from rlt.llm.device import on_device
from rlt.llm.model_sources import ModelSource
from rlt.llm.models import context_tokens, fingerprint, freeze
from rlt.report.results import score_result
from rlt.report.run import best_and_worst_of
from rlt.report.samples import log_attributions
from rlt.rewards import Reward, RewardScorer, RewardTable, ScoredExplanation
from rlt.rewards.attribution import attribution
from rlt.rewards.preflight import Area, Preflight, areas, signed_columns
from rlt.runs import ranks
from rlt.runs.environment import peak_memory_bytes
from rlt.runs.folder import RunFolder
from rlt.stages.common import in_batches, load_data, log_scalars, require_same_tokenizer
from rlt.stages.examples import require_explanations
from rlt.stages.preflight import (
    own_labels,
    preflight_areas,
    scored_explanations,
    student_tokens,
    tell_areas,
)
from rlt.stages.stage import RUN_FILES, Inputs, ModelStage, batches

_MOST_LABELLED = 2000  # traces whose labels are looked at


@dataclass(kw_only=True)
class Score(ModelStage):
    """Scores explanations by a reward and its student.

    Attributes:
        temperature: divides both models' logits; `reward.temperature` takes its place.
        keep_fraction: the best fraction of the rows by reward is written as traces.
        attributed: rows shown token by token, the best and the worst.
    """

    student: ModelSource
    student_path: str | None
    teacher: ModelSource | None
    teacher_path: str | None
    traces: str | None
    data: ProblemData | None
    reward: Reward
    preflight: Preflight | None
    temperature: float
    keep_fraction: float
    attributed: int = at_least(0)
    format: Literal["jsonl", "parquet"]
    rows_per_batch: int = at_least(1)

    name: ClassVar[str] = "score"
    leaves: ClassVar[tuple[str, ...]] = (
        *RUN_FILES, "scores.jsonl", "traces.jsonl or .parquet", "preflight.json",
    )  # fmt: skip
    limit: ClassVar[tuple[str, str] | None] = ("data.max_train", "rows_per_batch")

    def __post_init__(self) -> None:
        super().__post_init__()
        errors = []
        if not 0 < self.keep_fraction <= 1:
            errors.append(f"keep_fraction={self.keep_fraction}: must be above 0 and at most 1")
        if self.temperature <= 0:
            errors.append(f"temperature={self.temperature}: must be above 0")
        if self.traces is None and self.data is None:
            errors.append(
                "stage=score takes explanations from traces=<file or run>/traces, or from data=… "
                "that carries them: give one of the two (neither is set)"
            )
        needs = self.reward.needs
        if "correct_rate" in needs and self.data is None:
            errors.append(
                "this reward verifies answers, and traces name no grader: give the data=… that "
                "they are of, too, whose grader is then taken"
            )
        elif "correct_rate" in needs and self.data is not None and self.data.grader is None:
            errors.append("this reward verifies answers: set data.grader (it is null)")
        if needs & {"teacher_log_probs", "exact_kl"} and self.teacher is None:
            errors.append(
                "this reward compares the student with the teacher that wrote the text: set "
                "model@teacher=… (and teacher_path=…), or choose reward=solution_only or no_entropy"
            )
        if self.teacher is None and self.teacher_path is not None:
            errors.append(f"teacher_path={self.teacher_path} needs model@teacher=…")
        raise_if_any(errors)

    def run(self, run: RunFolder) -> dict[str, float]:
        renderer = self.load_renderer()
        if (teacher_source := self.source("teacher")) is not None:
            require_same_tokenizer(teacher_source.tokenizer(), renderer.tokenizer)
        data = self.problem_data()
        split = load_data(data, renderer)
        run.record(data=split.report)
        problems = split.train + split.validation
        require_explanations(problems)
        problems = [problem for problem in problems if problem.explanation is not None]
        device = self.hardware.device
        student = on_device(freeze(self.load_model("student").model), device)
        teacher = None
        if self.teacher is not None:
            teacher = on_device(freeze(self.load_model("teacher").model), device)
        models = {"student": student, "teacher": teacher}
        prints = {role: fingerprint(model) for role, model in models.items() if model is not None}
        run.record(models=prints)
        scorer = RewardScorer(
            self.reward, student, renderer,
            temperature=self.temperature, token_budget=self.hardware.micro_batch_tokens,
            grader=data.grader,
        )  # fmt: skip
        for problem in problems:
            check_context(renderer, problem, student)

        def score(batch: list[Problem]) -> list[dict[str, Any]]:
            scored = with_teacher(scored_explanations(batch, renderer), teacher, scorer)
            table = scorer(scored, teacher)
            return [
                {
                    "problem_id": one.problem.id,
                    "question": one.problem.question,
                    "solution": one.problem.solution,
                    "explanation": one.explanation.text,
                    "system": one.problem.system,
                    "student_tokens": student_tokens(renderer, one.problem),
                    "reward": table.rewards[n],
                    "reward_terms": {name: column[n] for name, column in table.terms.items()},
                    "attribution": attribution(
                        renderer, one.problem, one.explanation.ids, table.scores[n]
                    ),
                    **prints,
                    "config": run.key,
                }
                for n, one in enumerate(scored)
            ]

        partial = run.folder / "scores.partial"
        rows = in_batches(problems, self.rows_per_batch, partial, self.seed, "scoring", score)
        preflight = self.preflight
        areas_found: list[Area] = []
        if preflight is not None:
            areas_found = self.find_areas(preflight, problems, rows, data, scorer)
        rows.sort(key=lambda row: -row["reward"])
        for place, row in enumerate(rows, start=1):
            row["rank"] = place
        kept = rows[: max(1, round(self.keep_fraction * len(rows)))]
        bare = [{k: v for k, v in row.items() if k != "attribution"} for row in kept]

        def write() -> None:
            write_rows(rows, run.folder / "scores.jsonl")
            write_traces(bare, run.folder, self.format)
            partial.unlink()

        ranks.from_main(write, "writing scores")
        metrics = summarise(rows, kept)
        if preflight is not None:
            metrics |= tell_areas(areas_found, preflight, run.folder)
        log_scalars(self.make_logger(run.folder), metrics)
        log_attributions(self.make_logger(run.folder), best_and_worst_of(rows, self.attributed))
        return metrics | {"resources/peak_memory_bytes": float(peak_memory_bytes())}

    def find_areas(
        self,
        preflight: Preflight,
        problems: list[Problem],
        rows: list[dict[str, Any]],
        data: ProblemData,
        scorer: RewardScorer,
    ) -> list[Area]:
        """How well the reward tells the explanations apart.

        Traces are told apart by their labels, as they were rewarded. The data's own explanations
        are told apart by their labels and from damaged copies.
        """
        if self.traces is None:
            return preflight_areas(preflight, problems, data, scorer, self.seed)
        problems, rows = problems[:_MOST_LABELLED], rows[:_MOST_LABELLED]
        terms = {
            name: [row["reward_terms"][name] for row in rows] for name in rows[0]["reward_terms"]
        }
        columns = signed_columns(scorer.reward, RewardTable([row["reward"] for row in rows], terms))
        known = (
            {} if self.data is None or data.grader is None else self.problems_by_id(scorer.renderer)
        )
        asked = [
            dataclasses.replace(known.get(one.id, one), explanation=one.explanation)
            for one in problems
        ]
        labels = own_labels(asked, data)
        if "verifier" in labels:  # of a problem that the data does not have, nothing is known
            verdicts = zip(problems, labels["verifier"], strict=True)
            labels["verifier"] = [mark if one.id in known else None for one, mark in verdicts]
        return areas(columns, labels, [problem.id for problem in problems])

    def problems_by_id(self, renderer: Renderer) -> dict[str, Problem]:
        """The data's problems, with what its verifier knows of them, which traces do not carry."""
        assert self.data is not None
        source = self.data.source
        split = ProblemData(source, on_bad_row="skip", validation_fraction=0).load(
            renderer.forbidden
        )
        return {problem.id: problem for problem in split.train}

    def problem_data(self) -> ProblemData:
        """The explanations to score; of traces, several may be of one problem.

        Beside traces, `data` gives the grader and the classifier of behaviours alone.
        """
        if self.traces is None:
            assert self.data is not None
            return self.data
        return ProblemData(
            trace_source(self.traces),
            validation_fraction=0,
            unique=False,
            grader=None if self.data is None else self.data.grader,
            behaviour=None if self.data is None else self.data.behaviour,
        )

    # --- what a plan asks ------------------------------------------------------------------------

    def count_steps(self, inputs: Inputs) -> int | None:
        rows = None if inputs.problems is None else len(inputs.problems)
        return batches(rows, self.rows_per_batch)

    @property
    def scores_by(self) -> str | None:
        return "student"

    @staticmethod
    def result(run: Any) -> list[str]:
        return score_result(run)


def check_context(renderer: Renderer, problem: Problem, student: Any) -> None:
    """Raises ValueError when a student's text is longer than its context."""
    tokens = student_tokens(renderer, problem)
    if tokens > context_tokens(student):
        raise ValueError(
            f"problem {problem.id}: question, explanation and solution are {tokens} tokens, the "
            f"student's context holds {context_tokens(student)}; leave such rows out with "
            "data.max_tokens and data.on_bad_row=skip"
        )


def with_teacher(
    scored: list[ScoredExplanation], teacher: Any, scorer: RewardScorer
) -> list[ScoredExplanation]:
    """The same with the log-probs that a teacher gives them; unchanged without a teacher."""
    if teacher is None:
        return scored
    rows = [(one.teacher_prompt, one.explanation.ids) for one in scored]
    log_probs = scorer.row_log_probs(teacher, rows)
    return [
        dataclasses.replace(one, teacher_log_probs_T=values)
        for one, values in zip(scored, log_probs, strict=True)
    ]


def summarise(rows: list[dict[str, Any]], kept: list[dict[str, Any]]) -> dict[str, float]:
    """Means of the rewards and of their terms, with a 95 % interval of the mean reward."""
    interval = bootstrap_interval([row["reward"] for row in rows])
    metrics = {
        "score/rows": float(len(rows)),
        "score/kept": float(len(kept)),
        "score/reward": interval.mean,
        "score/reward_low": interval.low,
        "score/reward_high": interval.high,
        "score/kept_reward": sum(row["reward"] for row in kept) / len(kept),
    }
    for name in rows[0]["reward_terms"]:
        total = sum(row["reward_terms"][name] for row in rows)
        metrics[f"score/reward_terms/{name}"] = total / len(rows)
    return metrics
