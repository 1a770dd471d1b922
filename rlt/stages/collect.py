"""`rlt stage=collect`: the teacher explains every training problem; the best of n become traces.

With `sees_solution=false` the teacher is asked as a student is, without the solution, and writes
thought and answer; kept are thoughts whose answer the data's grader calls right. That is what an
able student can teach by itself, the control that tells what a teacher is for.

Left out are explanations that a student cannot learn from: longer, as the student sees them, than
its context; with a tag inside, which would be refused as training data; never closed, unless
`keep_unclosed`; with a wrong answer, if `sees_solution=false`. The best of n (or the one of another
`rank`) is sought among the others, and the shares of problems without any are reported.
"""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

from rlt.config.allowed_targets import raise_if_any
from rlt.config.fields import at_least
from rlt.data.dataset import ProblemData, behaviour_rates
from rlt.data.problem import Problem
from rlt.data.renderer import Explanation, Renderer
from rlt.data.traces import write_traces
from rlt.evaluation.answers import extract_answer
from rlt.llm.device import on_device
from rlt.llm.model_sources import ModelSource
from rlt.llm.models import context_tokens, fingerprint, freeze
from rlt.report.results import collect_result
from rlt.rewards import Reward, RewardScorer, ScoredExplanation
from rlt.runs import ranks
from rlt.runs.environment import peak_memory_bytes
from rlt.runs.folder import RunFolder
from rlt.sampling import Rollout, known_log_probs
from rlt.stages.common import in_batches, load_data, log_scalars, require_same_tokenizer
from rlt.stages.rl import sampling_in_words
from rlt.stages.stage import RUN_FILES, Inputs, ModelStage, Role, batches

REASONS = ("cut", "tag_inside", "unclosed")  # why a problem may be left without a trace


@dataclass(kw_only=True)
class Collect(ModelStage):
    """Samples explanations of a teacher, ranks them by reward, and writes traces.

    Attributes:
        sees_solution: False asks the teacher as a student is asked.
        best_of: completions per problem, of which one is kept.
        rank: which of them by reward; 1 is the best.
        max_problems: None takes every training problem.
        max_student_tokens: longer traces are left out; None takes the student's context.
        keep_unclosed: keep explanations that the teacher never closed.
    """

    teacher: ModelSource
    teacher_path: str | None
    student: ModelSource
    student_path: str | None
    data: ProblemData
    reward: Reward
    rollout: Rollout
    sees_solution: bool
    best_of: int = at_least(1)
    rank: int = at_least(1)
    max_problems: int | None = at_least(1)
    max_student_tokens: int | None = at_least(1)
    keep_unclosed: bool
    format: Literal["jsonl", "parquet"]
    problems_per_batch: int = at_least(1)

    name: ClassVar[str] = "collect"
    makes: ClassVar[str | None] = "traces"
    writer: ClassVar[Role | None] = "teacher"
    renders_for: ClassVar[Role] = "teacher"
    leaves: ClassVar[tuple[str, ...]] = (*RUN_FILES, "traces.jsonl or .parquet")
    limit: ClassVar[tuple[str, str] | None] = ("max_problems", "problems_per_batch")

    def __post_init__(self) -> None:
        super().__post_init__()
        errors = []
        if self.rank > self.best_of:
            errors.append(
                f"rank={self.rank}: of best_of={self.best_of} completions there is no such one"
            )
        if self.reward.correctness is not None and self.data.grader is None:
            errors.append("this reward verifies answers: set data.grader (it is null)")
        if not self.sees_solution and self.data.grader is None:
            errors.append(
                "collect with sees_solution=false keeps explanations whose answer is right: set "
                "data.grader (it is null)"
            )
        raise_if_any(errors)

    def run(self, run: RunFolder) -> dict[str, float]:
        renderer = self.load_renderer()
        student_source = self.source("student")
        assert student_source is not None
        require_same_tokenizer(renderer.tokenizer, student_source.tokenizer())
        data, rollout = self.data, self.rollout
        split = load_data(data, renderer)
        device = self.hardware.device
        teacher = on_device(freeze(self.load_model("teacher").model), device)
        student = on_device(freeze(self.load_model("student").model), device)
        scorer = RewardScorer(
            self.reward,
            student,
            renderer,
            temperature=rollout.temperature or 1.0,
            token_budget=self.hardware.micro_batch_tokens,
            grader=data.grader,
        )
        provenance = {
            "teacher": fingerprint(teacher),
            "student": fingerprint(student),
            "config": run.key,
            "seed": self.seed,
            "sampling": {
                "best_of": self.best_of,
                "rank": self.rank,
                **plain_settings(rollout),
            },
        }
        run.record(data=split.report, models={k: provenance[k] for k in ("teacher", "student")})

        limit = min(self.max_student_tokens or 2**31, context_tokens(student))

        tags = renderer.style.tags
        solution_tags = tags["solution_open"], tags["solution_close"]

        def explain(problems: list[Problem]) -> list[dict[str, Any]]:
            if self.sees_solution:
                prompts = [renderer.teacher_prompt(problem) for problem in problems]
                stop, end_tag = renderer.stop, renderer.stop
            else:
                prompts = [renderer.student_prompt(problem) for problem in problems]
                stop, end_tag = tags["solution_close"], tags["thought_close"]
            groups = rollout.sample(teacher, renderer.tokenizer, prompts, self.best_of, stop)
            owners = [p for p, group in enumerate(groups) for _ in group]
            completions = [c for group in groups for c in group]
            log_probs = None
            if scorer.temperature == (rollout.temperature or 1.0):
                log_probs = known_log_probs(teacher, completions)
            if log_probs is None:
                log_probs = scorer.row_log_probs(
                    teacher, [(prompts[p], c.ids) for p, c in zip(owners, completions, strict=True)]
                )
            scored = [
                ScoredExplanation(
                    problems[p], renderer.explanation(c.ids, end_tag), prompts[p], values
                )
                for p, c, values in zip(owners, completions, log_probs, strict=True)
            ]
            table = scorer(scored, teacher=teacher)
            wrong = [False] * len(scored)
            if not self.sees_solution:
                assert data.grader is not None
                texts = [renderer.decode(c.ids) for c in completions]
                answers = [extract_answer(text, *solution_tags) or "" for text in texts]
                owned = [problems[p] for p in owners]
                verdicts = data.grader.grade_all(list(zip(owned, answers, strict=True)))
                wrong = [not verdict.correct for verdict in verdicts]
            rows = []
            for n, row in enumerate(scored):
                text = renderer.student_text(row.problem, row.explanation.ids)
                tokens = len(text.prompt) + len(text.continuation)
                behaviour = data.behaviour and data.behaviour(
                    row.problem.question,
                    row.problem.solution,
                    row.explanation.text,
                    row.explanation.end_tag_found,
                )
                rows.append(
                    {
                        "problem_id": row.problem.id,
                        "question": row.problem.question,
                        "solution": row.problem.solution,
                        "explanation": row.explanation.text,
                        "system": row.problem.system,
                        "finish": completions[n].finish,
                        "end_tag_found": row.explanation.end_tag_found,
                        "teacher_tokens": len(completions[n].ids),
                        "student_tokens": tokens,
                        "reward": table.rewards[n],
                        "reward_terms": {name: v[n] for name, v in table.terms.items()},
                        **({"behaviour": behaviour} if behaviour is not None else {}),
                        "left_out": why_left_out(row.explanation, tokens, wrong[n]),
                        **provenance,
                    }
                )
            groups_of_rows = [rows[i : i + self.best_of] for i in range(0, len(rows), self.best_of)]
            return [ranked(group, self.rank) for group in groups_of_rows]

        def why_left_out(explanation: Explanation, student_tokens: int, wrong: bool) -> str | None:
            if student_tokens > limit:
                return "cut"
            if any(tag in explanation.text for tag in renderer.forbidden):
                return "tag_inside"
            if not explanation.end_tag_found and not self.keep_unclosed:
                return "unclosed"
            return "wrong" if wrong else None

        problems = split.train[: self.max_problems]
        rollout.prepare(teacher, renderer.tokenizer)
        rows = in_batches(
            problems, self.problems_per_batch, run.folder / "traces.partial", self.seed,
            "collecting", explain,
        )  # fmt: skip
        kept = [
            {key: value for key, value in row.items() if key != "left_out"}
            for row in rows
            if row["left_out"] is None
        ]
        if not kept:
            counts = Counter(row["left_out"] for row in rows)
            raise ValueError(
                f"no trace is left of {len(rows)}: {counts['cut']} are longer than {limit} tokens "
                "(raise max_student_tokens, up to the student's context, or lower "
                "rollout.max_new_tokens), "
                f"{counts['tag_inside']} have a tag inside the explanation, "
                f"{counts['unclosed']} were never closed (train the teacher for longer, or set "
                f"keep_unclosed=true), {counts['wrong']} end in a wrong answer"
            )

        def write() -> None:
            write_traces(kept, run.folder, self.format)
            (run.folder / "traces.partial").unlink()

        ranks.from_main(write, "writing traces")
        metrics = summarise(rows, kept, REASONS if self.sees_solution else (*REASONS, "wrong"))
        if data.behaviour is not None:
            shares = behaviour_rates([row["behaviour"] for row in kept], data.behaviour.names)
            metrics |= {f"collect/{name}": share for name, share in shares.items()}
        log_scalars(self.make_logger(run.folder), metrics)
        return metrics | {"resources/peak_memory_bytes": float(peak_memory_bytes())}

    # --- what a plan asks ------------------------------------------------------------------------

    def count_steps(self, inputs: Inputs) -> int | None:
        problems = None if inputs.problems is None else len(inputs.problems)
        return batches(problems, self.problems_per_batch, self.max_problems)

    def does(self, inputs: Inputs) -> list[str]:
        how_many = "all" if self.max_problems is None else self.max_problems
        which = "best" if self.rank == 1 else f"number {self.rank}"
        return [
            f"{which} of {self.best_of} for {how_many} problems, as {self.format}",
            sampling_in_words(self.rollout),
        ]

    def rows(
        self, problems: Sequence[Problem], renderer: Renderer
    ) -> list[tuple[list[int], list[int]]]:
        if not self.sees_solution:
            return super().rows(problems, renderer)
        return [(renderer.teacher_prompt(problem), []) for problem in problems]

    @property
    def completions(self) -> tuple[int, int]:
        return self.problems_per_batch * self.best_of, self.best_of

    @property
    def scores_by(self) -> str | None:
        return "student"

    @staticmethod
    def result(run: Any) -> list[str]:
        return collect_result(run)


def ranked(group: list[dict[str, Any]], rank: int) -> dict[str, Any]:
    """A problem's completion of that rank by reward, or the last of them if fewer are fit.

    Ranked are those fit to be a trace, if any are.
    """
    fit = [row for row in group if row["left_out"] is None] or group
    in_order = sorted(fit, key=lambda row: -float(row["reward"]))
    chosen = in_order[min(rank, len(in_order)) - 1]
    return chosen | {"reward_mean_of_n": sum(row["reward"] for row in group) / len(group)}


def plain_settings(part: Any) -> dict[str, Any]:
    """The plain values that a part holds, for a record of how something was made."""
    return {k: v for k, v in vars(part).items() if isinstance(v, bool | int | float | str)}


def summarise(
    rows: list[dict[str, Any]], kept: list[dict[str, Any]], reasons: Sequence[str]
) -> dict[str, float]:
    """Means over the traces that were kept, and the shares of problems left without one.

    Args:
        reasons: why a problem may be left without a trace.
    """
    metrics = {
        "collect/traces": float(len(kept)),
        "collect/reward_mean_of_n": sum(row["reward_mean_of_n"] for row in rows) / len(rows),
    }
    for reason in reasons:
        share = sum(row["left_out"] == reason for row in rows) / len(rows)
        metrics[f"collect/{reason}_rate"] = share
    for name in ("reward", "teacher_tokens", "student_tokens"):
        metrics[f"collect/{name}"] = sum(row[name] for row in kept) / len(kept)
    metrics["collect/end_tag_rate"] = sum(row["end_tag_found"] for row in kept) / len(kept)
    for name in kept[0]["reward_terms"]:
        total = sum(row["reward_terms"][name] for row in kept)
        metrics[f"collect/reward_terms/{name}"] = total / len(kept)
    return metrics
