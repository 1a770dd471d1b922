"""Benchmarks: metrics counted by hand, every shipped file composed, hub schemas read from files."""

import json
import random
from pathlib import Path
from typing import Any

import pytest
from hydra import compose, initialize_config_dir
from hydra.utils import instantiate

from rlt.data.dataset import ProblemData
from rlt.data.problem import make_problem
from rlt.data.rows import BadRowsError, RawRow
from rlt.evaluation.benchmark import (
    AnswerRecord,
    Benchmark,
    compare_answers,
    correct_matrix,
    evaluate_answers,
)
from rlt.evaluation.graders import ExactGrader, MathGrader, MultipleChoiceGrader
from rlt.evaluation.sources import Gpqa

ROOT = Path(__file__).parents[2]
LOCAL = ROOT / "tests/evaluation/benchmarks"
TAGS = ("<answer>", "</answer>")
HUB = {
    "gsm8k": ("openai/gsm8k", "main", "test"),
    "math500": ("HuggingFaceH4/MATH-500", None, "test"),
    "aime24": ("Maxwell-Jia/AIME_2024", None, "train"),
    "gpqa_diamond": ("Idavidrein/gpqa", "gpqa_diamond", "train"),
}
ENDS = ("", "_low", "_high")
PROCEDURAL = ["digit_chain", "gsm_symbolic", "countdown", "chain_sum"]


def build(name: str, *overrides: str) -> Benchmark:
    with initialize_config_dir(str(ROOT / "conf"), version_base="1.3"):
        cfg = compose(overrides=[f"+benchmark={name}", "+seed=0", *overrides])
    benchmark = instantiate(cfg.benchmark)
    assert isinstance(benchmark, Benchmark)
    return benchmark


@pytest.fixture
def local(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder of small files, with the `datasets` cache out of the way."""
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", str(tmp_path / "cache"))
    return LOCAL


def build_local(name: str, folder: Path) -> Benchmark:
    source = "benchmark.data.source"
    return build(name, f"{source}.path={folder / name}", f"{source}.name=null")


def says(answer: str) -> str:
    return f"thinking </think> <answer> {answer} </answer>"


def record(problem_id: str, sample: int, correct: bool) -> AnswerRecord:
    score = float(correct)
    return AnswerRecord(problem_id, "q", "s", sample, "t", "a", correct, score, "reason")


def test_metrics_by_hand() -> None:
    problems = [make_problem(f"question {n}", str(n)) for n in range(4)]
    answers_PK = [
        [says("0"), says("0"), says("0"), says("0")],  # 4 of 4
        [says("1"), says("9"), "no block", says("")],  # 1 of 4
        [says("9")] * 4,
        [says("3"), says("3"), says("9"), says("9")],  # 2 of 4
    ]
    result = evaluate_answers(problems, answers_PK, TAGS, ExactGrader())
    metrics = result.metrics
    assert metrics["eval/avg@4"] == pytest.approx(7 / 16)
    assert metrics["eval/pass@1"] == pytest.approx(7 / 16)
    assert metrics["eval/pass@2"] == pytest.approx((1 + 1 / 2 + 0 + 5 / 6) / 4)
    assert metrics["eval/pass@4"] == pytest.approx(3 / 4)
    assert metrics["eval/no_answer_rate"] == 2 / 16
    assert metrics["eval/grading_error_rate"] == 0
    assert (metrics["eval/questions"], metrics["eval/answers"]) == (4, 16)
    assert 0 <= metrics["eval/avg@4_low"] < 7 / 16 < metrics["eval/avg@4_high"] <= 1
    assert metrics["eval/majority@4"] == 3 / 4  # ties go to the answer given first
    of_k = ("avg@4", "pass@1", "pass@2", "pass@4", "majority@4")
    names = [f"eval/{m}{end}" for m in of_k for end in ENDS]
    shares = ["no_answer_rate", "grading_error_rate", "questions", "answers"]
    assert sorted(metrics) == sorted([*names, *(f"eval/{name}" for name in shares)])
    assert correct_matrix(result.records).sum(axis=1).tolist() == [4, 1, 0, 2]


def test_pass_at_k_of_a_k_that_is_no_power_of_two() -> None:
    problems = [make_problem("question", "6")]
    result = evaluate_answers(problems, [[says("6")] * 3], TAGS, ExactGrader())
    found = {name for name in result.metrics if "@" in name}
    assert found == {
        f"eval/{m}{end}"
        for m in ("avg@3", "pass@1", "pass@2", "pass@3", "majority@3")
        for end in ENDS
    }
    assert {result.metrics[name] for name in found if not name.endswith("_low")} == {1.0}


def test_records_tell_what_was_graded() -> None:
    problems = [make_problem("question", "6"), make_problem("other", "7")]
    answers = [[says("6"), "no block"], [says(""), "<answer>8"]]
    result = evaluate_answers(problems, answers, TAGS, ExactGrader(), [[5, 2], [3, 2]])
    first, second, third, fourth = result.records
    assert first == AnswerRecord(
        problems[0].id, "question", "6", 0, says("6"), "6", True, 1.0, "correct", 5
    )
    assert (second.sample, second.extracted, second.reason) == (1, None, "no solution block")
    assert (third.problem_id, third.extracted, third.reason) == (problems[1].id, "", "empty answer")
    assert (fourth.extracted, fourth.correct, fourth.reason, fourth.tokens) == (
        "8",
        False,
        "wrong",
        2,
    )
    assert result.metrics["eval/answer_tokens"] == 3.0
    assert json.loads(json.dumps(first.to_json()))["extracted"] == "6"


def test_timeouts_are_counted() -> None:
    problems = [make_problem("question", "6")]
    answers = [[says("9^{9^{9^{9^9}}}"), says("12/2")]]
    with MathGrader(timeout_seconds=1) as grader:
        result = evaluate_answers(problems, answers, TAGS, grader)
    assert result.metrics["eval/grading_error_rate"] == 0.5
    assert [r.reason for r in result.records] == ["timeout", "correct"]


@pytest.mark.parametrize("answers_PK", [[], [["a"]], [["a"], ["a", "b"]], [[], []]])
def test_ragged_answers_are_refused(answers_PK: list[list[str]]) -> None:
    problems = [make_problem("a", "1"), make_problem("b", "2")]
    with pytest.raises(ValueError, match="needs one row each"):
        evaluate_answers(problems, answers_PK, TAGS, ExactGrader())


def test_repeated_problems_are_refused() -> None:
    problem = make_problem("a", "1")
    with pytest.raises(ValueError, match="stands twice"):
        evaluate_answers([problem, problem], [["x"], ["x"]], TAGS, ExactGrader())


def test_paired_comparison_matches_questions_not_positions() -> None:
    a = [record("p", 0, True), record("p", 1, True), record("q", 0, True), record("q", 1, False)]
    b = [record("q", 0, False), record("q", 1, False), record("p", 0, True), record("p", 1, False)]
    assert compare_answers(a, b) == (0.5, 0.5, 0.5)  # p: 1 - .5, q: .5 - 0
    assert compare_answers(a, a) == (0.0, 0.0, 0.0)
    with pytest.raises(ValueError, match="1 and 0 questions"):
        compare_answers(a, b[:2])
    with pytest.raises(ValueError, match="same number each"):
        correct_matrix(a[:3])


class Rows:
    """A source of the given questions; the solution of each is "1"."""

    def __init__(self, *questions: str) -> None:
        self.questions = questions

    def rows(self) -> Any:
        for number, question in enumerate(self.questions, start=1):
            yield RawRow("rows", number, {"question": question, "solution": "1"})

    def describe(self) -> dict[str, Any]:
        return {"kind": "Rows"}


def test_a_benchmark_keeps_order() -> None:
    data = ProblemData(Rows("a", "b", "c", "d"), validation_fraction=0, grader=ExactGrader())
    benchmark = Benchmark("own", data, max_questions=2)
    assert [p.question for p in benchmark.load()] == ["a", "b"]
    assert benchmark.report["questions"] == 2


def test_a_benchmark_that_cannot_work_is_refused() -> None:
    def data(**options: Any) -> ProblemData:
        return ProblemData(
            Rows("a"), **{"validation_fraction": 0, "grader": ExactGrader(), **options}
        )

    with pytest.raises(ValueError, match="max_questions=0"):
        Benchmark("own", data(), max_questions=0)
    with pytest.raises(ValueError, match="has no grader"):
        Benchmark("own", data(grader=None))
    with pytest.raises(ValueError, match="held out as a whole"):
        Benchmark("own", data(validation_fraction=0.1))


def test_every_shipped_file_is_tested_here() -> None:
    files = {path.stem for path in (ROOT / "conf/benchmark").glob("*.yaml")}
    assert files - {"_benchmark", "reasoning_gym"} == {*HUB, *PROCEDURAL}  # any task, by its name


@pytest.mark.parametrize("name", PROCEDURAL)
def test_procedural_benchmarks_grade_their_own_solutions(name: str) -> None:
    size = "count" if name == "digit_chain" else "size"
    benchmark = build(name, f"benchmark.data.source.{size}=12", "benchmark.max_questions=5")
    problems = benchmark.load()
    assert len(problems) == 5
    assert benchmark.data.source.describe()["seed"] == 10_000_019
    answers_PK = [[says(problem.solution), says("no idea")] for problem in problems]
    with benchmark.grader as grader:
        result = evaluate_answers(problems, answers_PK, TAGS, grader)
    assert correct_matrix(result.records).tolist() == [[True, False]] * 5


def test_digit_chains_have_seven_digits_and_their_sum() -> None:
    for problem in build("digit_chain", "benchmark.data.source.count=20").load():
        digits = [int(digit) for digit in problem.question.split()]
        assert len(digits) == 7
        assert problem.solution == str(sum(digits) % 10)


@pytest.mark.parametrize("name", HUB)
def test_hub_benchmarks_name_their_data_set(name: str) -> None:
    table: Any = build(name).data.source
    table = table.table
    assert (table.path, table.name, table.split) == HUB[name]


def test_gsm8k_rows(local: Path) -> None:
    benchmark = build_local("gsm8k", local)
    first, second, third = benchmark.load()
    assert (first.solution, second.solution, third.solution) == ("79", "6,250", "-3")
    assert first.question.startswith("A baker fills 6 trays")
    assert first.explanation is not None
    assert first.explanation.endswith("are left.")
    with benchmark.grader as grader:
        assert grader.grade(second, ["6250 coins"])[0].correct
        assert not grader.grade(third, ["3"])[0].correct


def test_math500_rows(local: Path) -> None:
    benchmark = build_local("math500", local)
    sixth, midpoint, vera = benchmark.load()
    assert sixth.solution == r"\frac{1}{6}"
    assert sixth.explanation is not None
    assert sixth.explanation.startswith("Multiply:")
    with benchmark.grader as grader:
        assert grader.grade(sixth, ["2/12"])[0].correct
        assert [v.correct for v in grader.grade(midpoint, ["(2,5)", "(5,2)"])] == [True, False]
        assert [v.correct for v in grader.grade(vera, ["Vera", "Una"])] == [True, False]


def test_aime24_rows(local: Path) -> None:
    benchmark = build_local("aime24", local)
    first, second = benchmark.load()
    assert (first.solution, second.solution) == ("23", "35")  # whole numbers become text
    with benchmark.grader as grader:
        assert grader.grade(first, [r"\boxed{023}"])[0].correct


def test_gpqa_rows_letter_the_choices(local: Path) -> None:
    benchmark = build_local("gpqa_diamond", local)
    problems = benchmark.load()
    rights = ["The photon", "Uracil", "2"]
    for problem, right in zip(problems, rights, strict=True):
        choices = problem.metadata["choices"]
        assert choices[problem.solution] == right
        assert list(choices) == ["A", "B", "C", "D"]
        for letter, text in choices.items():
            assert f"\n{letter}) {text}\n" in problem.question
        with benchmark.grader as grader:
            letters = [v.correct for v in grader.grade(problem, list("ABCD"))]
        assert letters == [letter == problem.solution for letter in "ABCD"]
    assert set(problems[0].metadata["choices"].values()) == {
        "The photon", "The gluon", "The Z boson, at rest", "The graviton"
    }  # fmt: skip


def gpqa_row(number: int, question: str, right: str = "right") -> RawRow:
    wrong = {f"Incorrect Answer {n}": f"wrong {n}" for n in (1, 2, 3)}
    return RawRow("f", number, {"Question": question, "Correct Answer": right, **wrong})


def test_gpqa_order_depends_on_the_question_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    rows = [gpqa_row(n, f"question {n}") for n in range(400)]

    def letters(rows: list[RawRow], seed: int = 0) -> dict[str, str]:
        monkeypatch.setattr("rlt.data.sources.hub.HubTable.rows", lambda self, columns: iter(rows))
        return {r.values["question"]: r.values["solution"] for r in Gpqa(seed=seed).rows()}

    expected = letters(rows)
    random.seed(3)
    assert letters(random.sample(rows, 300)).items() <= expected.items()
    assert letters(rows, seed=1) != expected
    for letter in "ABCD":  # 400 draws of 1/4: 100, standard deviation 8.7
        assert 65 < list(expected.values()).count(letter) < 135


def test_gpqa_names_broken_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    rows = [
        gpqa_row(1, "fine"),
        gpqa_row(2, "empty", right=" "),
        gpqa_row(3, ""),
        RawRow("f", 4, {"Question": "no choices", "Correct answer": "x"}),
        RawRow("f", 5, {**gpqa_row(5, "number").values, "Incorrect Answer 2": 4}),
    ]
    monkeypatch.setattr("rlt.data.sources.hub.HubTable.rows", lambda self, columns: iter(rows))
    monkeypatch.setattr("rlt.data.sources.hub.HubTable.describe", lambda self: {"fingerprint": ""})
    data = ProblemData(Gpqa(), validation_fraction=0, grader=MultipleChoiceGrader())
    with pytest.raises(BadRowsError) as caught:
        Benchmark("gpqa", data).load()
    assert [(bad.row, bad.reason) for bad in caught.value.bad_rows] == [
        (2, "empty solution"),
        (3, "empty question"),
        (4, "missing column"),
        (5, "wrong type"),
    ]
    assert "did you mean 'Correct answer'" in caught.value.bad_rows[2].detail
