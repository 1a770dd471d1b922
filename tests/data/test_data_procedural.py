"""reasoning-gym tasks: explanations, metadata for the verifier, errors."""

import json
from fractions import Fraction

import pytest
import reasoning_gym

from rlt.data.row_checks import collect_problems
from rlt.data.sources.procedural import (
    ReasoningGym,
    decode_entry,
    encode_entry,
    running_totals,
    worked_explanation,
)


def test_last_line_is_stripped() -> None:
    assert (
        worked_explanation("gsm_symbolic", {"answer_cot": "2+2=4\nSo 4.\n#### 4"}) == "2+2=4\nSo 4."
    )
    assert worked_explanation("gsm_symbolic", {"answer_cot": "2+2=4\n#### 4\n\n"}) == "2+2=4"
    assert (
        worked_explanation("gsm_symbolic", {"answer_cot": "#### is a mark\nSo 4."})
        == "#### is a mark\nSo 4."
    )
    assert worked_explanation("gsm_symbolic", {"answer_cot": "a #### 4"}) == "a #### 4"
    assert worked_explanation("gsm_symbolic", {}) is None


def test_gsm_symbolic() -> None:
    problems = collect_problems(ReasoningGym("gsm_symbolic", 20, seed=0).rows()).problems
    for problem in problems:
        assert problem.explanation is not None
        assert "####" not in problem.explanation
        assert problem.explanation == problem.explanation.strip() != ""
        assert problem.metadata["task"] == "gsm_symbolic"
    assert problems == collect_problems(ReasoningGym("gsm_symbolic", 20, seed=0).rows()).problems


@pytest.mark.parametrize("task", ["gsm_symbolic", "countdown"])
def test_neighbouring_seeds_share_no_problems(task: str) -> None:
    sets = [collect_problems(ReasoningGym(task, 50, seed).rows()).problems for seed in (0, 1)]
    ids = [{problem.id for problem in problems} for problems in sets]
    assert ids[0].isdisjoint(ids[1])


@pytest.mark.parametrize(
    "task", ["gsm_symbolic", "chain_sum", "countdown", "complex_arithmetic", "advanced_geometry"]
)
def test_verifier_accepts_the_solution_after_json(task: str) -> None:
    verify = reasoning_gym.get_score_answer_fn(task)
    for problem in collect_problems(ReasoningGym(task, 3, seed=5).rows()).problems:
        entry = decode_entry(json.loads(json.dumps(problem.metadata["entry"])))
        assert verify(problem.solution, entry) == 1.0
        assert verify("no idea", entry) < 1.0


def test_tuples_and_fractions_survive_json() -> None:
    entry = {"a": ((1, 2), [3, (4,)]), "b": {"c": None, "d": ()}, "e": Fraction(2, 3)}
    assert decode_entry(json.loads(json.dumps(encode_entry(entry)))) == entry
    with pytest.raises(TypeError, match="holds a set"):
        encode_entry({"a": {1}})


def test_options_reach_the_task() -> None:
    source = ReasoningGym("chain_sum", 5, 0, {"min_terms": 3, "max_terms": 3, "max_digits": 1})
    for problem in collect_problems(source.rows()).problems:
        assert problem.metadata["entry"]["metadata"]["num_terms"] == 3
        assert problem.explanation is not None
        assert problem.explanation.count("=") == 2
    [bare] = collect_problems(ReasoningGym("countdown", 1, 0).rows()).problems
    assert bare.explanation is None


def test_errors_name_the_nearest() -> None:
    with pytest.raises(ValueError, match=r"no such task; did you mean 'gsm_symbolic'"):
        ReasoningGym("gsm_symbolc", 5, 0)
    with pytest.raises(ValueError, match=r"options\.min_term:.*did you mean 'min_terms'"):
        ReasoningGym("chain_sum", 5, 0, {"min_term": 2})
    with pytest.raises(ValueError, match=r"options\.seed"):
        ReasoningGym("chain_sum", 5, 0, {"seed": 2})
    with pytest.raises(ValueError, match="size=0"):
        ReasoningGym("chain_sum", 0, 0)
    with pytest.raises(ValueError, match=r"chain_sum refuses size=5.*min_terms"):
        list(ReasoningGym("chain_sum", 5, 0, {"min_terms": 9, "max_terms": 2}).rows())


def test_task_without_reference_answer_gives_bad_rows() -> None:
    actual = collect_problems(ReasoningGym("graph_color", 2, 0).rows(), "skip")
    assert actual.bad_per_reason() == {"empty solution": 2}


def test_sums_are_explained_by_their_running_totals() -> None:
    assert running_totals("4 - 1 - 7") == "4 - 1 = 3\n3 - 7 = -4"
    assert running_totals("-1 - -6 + 60") == "-1 - -6 = 5\n5 + 60 = 65"
    for row in ReasoningGym("chain_sum", 20, 0, {"allow_negation": True}).rows():
        lines = str(row.values["explanation"]).splitlines()
        assert lines[-1].endswith(f"= {row.values['solution']}")
        assert all(eval(left) == int(right) for left, right in (x.split(" = ") for x in lines))
