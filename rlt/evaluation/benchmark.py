"""A benchmark: held-out problems with their grader, and the metrics of the answers to them.

The paper reports one score per benchmark. Here each question has k answers, avg@k and pass@k come
with 95 % bootstrap intervals over the questions, and two models are compared in pairs. The stage
samples the texts: `rlt stage=evaluate benchmark=gsm_symbolic student_path=…`. docs/metrics.md
defines the metrics.
"""

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from rlt.data.dataset import ProblemData
from rlt.data.grader import Grader, Verdict
from rlt.data.problem import Problem
from rlt.evaluation.answers import extract_answer
from rlt.evaluation.graders import NO_SOLUTION_BLOCK
from rlt.evaluation.statistics import (
    Interval,
    avg_at_k_per_question,
    majority_per_question,
    paired_difference_interval,
    pass_at_k_per_question,
    share_interval,
)


class Benchmark:
    """The `benchmark` node of a config.

    Args:
        name: the name in reports.
        data: the problems, of which nothing is split off, with the grader of their answers.
        max_questions: how many questions are used, from the first on, or None for all.

    Raises:
        ValueError: there is no grader, something is split off, or `max_questions` is below 1.
    """

    def __init__(self, name: str, data: ProblemData, max_questions: int | None = None) -> None:
        if max_questions is not None and max_questions < 1:
            raise ValueError(
                f"benchmark.max_questions={max_questions}; it must be at least 1, or null for all"
            )
        if data.grader is None:
            raise ValueError(
                f"benchmark {name} has no grader; set benchmark.data.grader, such as "
                "{_target_: rlt.evaluation.graders.MathGrader}"
            )
        if data.validation_fraction != 0:
            raise ValueError(
                f"benchmark.data.validation_fraction={data.validation_fraction}; a benchmark is "
                "held out as a whole: set it to 0"
            )
        self.name = name
        self.data = data
        self.max_questions = max_questions
        self.grader = data.grader
        self.report: dict[str, Any] = {}

    def load(
        self,
        forbidden: Sequence[str] = (),
        count_tokens: Callable[[str], int] | None = None,
    ) -> list[Problem]:
        """Load the problems, and count them in `report`.

        Args:
            forbidden: texts that no problem may contain, such as tags.
            count_tokens: counts the tokens of a text, for the data's limits on length.
        """
        split = self.data.load(forbidden, count_tokens)
        problems = split.train[: self.max_questions]
        self.report = {**split.report, "benchmark": self.name, "questions": len(problems)}
        return problems


@dataclass(frozen=True)
class AnswerRecord:
    """One graded answer: one line of answers.jsonl.

    Attributes:
        problem_id: the id of the problem.
        question: its question.
        solution: its solution.
        sample: the number of the answer among those to the question, from 0.
        text: the completion.
        extracted: what the grader compared, or None without a solution block.
        correct: whether the score is full.
        score: the grader's score.
        reason: the grader's reason, see `rlt.data.grader.Verdict`.
        tokens: the length of the completion in tokens, or None if unknown.
        prompt: what the model was asked, word for word, or None if unknown.
    """

    problem_id: str
    question: str
    solution: str
    sample: int
    text: str
    extracted: str | None
    correct: bool
    score: float
    reason: str
    tokens: int | None = None
    prompt: str | None = None

    def to_json(self) -> dict[str, Any]:
        """Return the record as a JSON object."""
        return asdict(self)


@dataclass(frozen=True)
class EvaluationResult:
    """Every graded answer, and the metrics by their flat names (`eval/…`)."""

    records: list[AnswerRecord]
    metrics: dict[str, float]


def evaluate_answers(
    problems: Sequence[Problem],
    answers_PK: Sequence[Sequence[str]],
    tags: tuple[str, str],
    grader: Grader,
    tokens_PK: Sequence[Sequence[int]] | None = None,
    prompts_P: Sequence[str] | None = None,
    confidence: float = 0.95,
    resamples: int = 10_000,
    seed: int = 0,
) -> EvaluationResult:
    """Grade k completions per problem and summarise them.

    Args:
        problems: the problems, each of them once.
        answers_PK: the completions, as sampled after the opening thought tag, a list of k for each
            problem.
        tags: the prompt style's opening and closing solution tag.
        grader: the judge of the answers.
        tokens_PK: the lengths of the completions, if known, a list of k for each problem.
        prompts_P: what was asked, word for word, if known, [problems].
        confidence: that of the intervals.
        resamples: how often the questions are resampled for an interval.
        seed: the seed of the resampling.

    Raises:
        ValueError: the problems and the rows of answers do not fit together.
    """
    k = _answers_per_question(problems, answers_PK)
    texts = [text for answers in answers_PK for text in answers]
    owners = [problem for problem in problems for _ in range(k)]
    answers = [extract_answer(text, *tags) for text in texts]
    given = [(owner, a) for owner, a in zip(owners, answers, strict=True) if a is not None]
    graded = iter(grader.grade_all(given))
    missing = Verdict(False, "", NO_SOLUTION_BLOCK)
    verdicts = [missing if answer is None else next(graded) for answer in answers]
    tokens = [None] * len(texts) if tokens_PK is None else [n for row in tokens_PK for n in row]
    records = [
        AnswerRecord(
            problem_id=owner.id,
            question=owner.question,
            solution=owner.solution,
            sample=index % k,
            text=text,
            extracted=None if answer is None else verdict.extracted,
            correct=verdict.correct,
            score=verdict.score,
            reason=verdict.reason,
            tokens=count,
            prompt=None if prompts_P is None else prompts_P[index // k],
        )
        for index, (owner, text, answer, verdict, count) in enumerate(
            zip(owners, texts, answers, verdicts, tokens, strict=True)
        )
    ]
    correct_PK = correct_matrix(records)
    metrics = _accuracy_metrics(correct_PK, confidence, resamples, seed)
    if k > 2:
        told = [record.extracted for record in records]
        rows = [told[start : start + k] for start in range(0, len(told), k)]
        interval = share_interval(
            majority_per_question(rows, correct_PK), confidence, resamples, seed
        )
        for end, value in zip(("", "_low", "_high"), interval, strict=True):
            metrics[f"eval/majority@{k}{end}"] = value
    metrics |= {
        "eval/no_answer_rate": float(np.mean([not (answer or "").strip() for answer in answers])),
        "eval/grading_error_rate": float(np.mean([verdict.failed for verdict in verdicts])),
        "eval/questions": float(len(problems)),
        "eval/answers": float(len(texts)),
    }
    if tokens_PK is not None:
        metrics["eval/answer_tokens"] = float(
            np.mean([count for count in tokens if count is not None])
        )
    return EvaluationResult(records, metrics)


def correct_matrix(records: Sequence[AnswerRecord]) -> NDArray[np.bool_]:
    """Return right or wrong as [questions, samples], questions in the order of the records.

    Raises:
        ValueError: the questions have different numbers of answers.
    """
    rows = list(_by_problem(records).values())
    lengths = {len(row) for row in rows}
    if len(lengths) != 1:
        raise ValueError(
            f"questions have {sorted(lengths)} answers, need the same number each; "
            "the answers may be incomplete: evaluate again"
        )
    return np.asarray(rows, dtype=np.bool_)


def compare_answers(
    a: Sequence[AnswerRecord],
    b: Sequence[AnswerRecord],
    confidence: float = 0.95,
    resamples: int = 10_000,
    seed: int = 0,
) -> Interval:
    """Compute avg@k(a) - avg@k(b) with its paired interval; see `paired_difference_interval`.

    Raises:
        ValueError: the two did not answer the same questions.
    """
    of_a, of_b = _by_problem(a), _by_problem(b)
    if of_a.keys() != of_b.keys():
        raise ValueError(
            f"{len(of_a.keys() - of_b.keys())} and {len(of_b.keys() - of_a.keys())} questions were "
            "answered by one side only; compare evaluations of the same benchmark and size"
        )
    a_P = [float(np.mean(of_a[problem_id])) for problem_id in of_a]
    b_P = [float(np.mean(of_b[problem_id])) for problem_id in of_a]
    return paired_difference_interval(a_P, b_P, confidence, resamples, seed)


def _by_problem(records: Sequence[AnswerRecord]) -> dict[str, list[bool]]:
    correct: dict[str, list[bool]] = {}
    for record in records:
        correct.setdefault(record.problem_id, []).append(record.correct)
    return correct


def _answers_per_question(problems: Sequence[Problem], answers_PK: Sequence[Sequence[str]]) -> int:
    lengths = {len(answers) for answers in answers_PK}
    if len(problems) != len(answers_PK) or len(lengths) != 1 or 0 in lengths:
        raise ValueError(
            f"{len(problems)} problems came with {len(answers_PK)} rows of {sorted(lengths)} "
            "answers; needs one row each, all of the same length, at least one answer"
        )
    if len({problem.id for problem in problems}) != len(problems):
        raise ValueError("a problem stands twice in the benchmark; load it with data.unique=true")
    return lengths.pop()


def _accuracy_metrics(
    correct_PK: NDArray[np.bool_], confidence: float, resamples: int, seed: int
) -> dict[str, float]:
    k = correct_PK.shape[1]
    powers = [2**n for n in range(k.bit_length()) if 2**n < k]
    per_question = {f"avg@{k}": avg_at_k_per_question(correct_PK)}
    per_question |= {f"pass@{j}": pass_at_k_per_question(correct_PK, j) for j in [*powers, k]}
    metrics: dict[str, float] = {}
    for name, values_P in per_question.items():
        interval = share_interval(values_P, confidence, resamples, seed)
        metrics[f"eval/{name}"] = interval.mean
        metrics[f"eval/{name}_low"] = interval.low
        metrics[f"eval/{name}_high"] = interval.high
    return metrics
