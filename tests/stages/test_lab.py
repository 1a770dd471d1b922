"""The reward lab, student RL, contamination and comparisons, from the command line."""

import csv
from collections.abc import Callable
from pathlib import Path

import pytest

from rlt.report import read_scalars
from tests.cli import (
    BENCHMARK,
    DATA,
    RECIPES,
    SHARED,
    here,
    read,
    read_lines,
    refused,
    results,
    rlt,
    stage,
    weights,
)
from tests.metrics_doc import documented
from tests.stages.killing import finish

SCORE = ["stage=score", *SHARED, "rows_per_batch=5", "temperature=1"]


@pytest.fixture(scope="module")
def scored(chain: Path) -> Path:
    """The traces of the chain, scored again with the same models and temperature."""
    finish(
        [*SCORE, "traces=collect/traces", "temperature=0.7", "student_path=pretrain/model",
         "model@teacher=nano", "teacher_path=teacher_rl/model", "keep_fraction=0.5",
         "output_dir=score"],
        chain,
    )  # fmt: skip
    return chain / "score"


def test_a_text_scores_as_it_did_when_it_was_written(scored: Path) -> None:
    traces = {row["explanation"]: row for row in read_lines(scored.parent / "collect/traces.jsonl")}
    rows = read_lines(scored / "scores.jsonl")
    assert len(rows) == len(read_lines(scored.parent / "collect/traces.jsonl"))
    closed = 0
    for row in rows:
        trace = traces[row["explanation"]]
        if not trace["end_tag_found"] or trace["problem_id"] != row["problem_id"]:
            continue  # what was never closed is scored as closed
        closed += 1
        assert row["reward"] == pytest.approx(trace["reward"], abs=1e-3)
        for name, value in trace["reward_terms"].items():
            assert row["reward_terms"][name] == pytest.approx(value, abs=1e-3)
    assert closed


def test_rows_are_ranked_and_the_best_can_be_distilled(scored: Path) -> None:
    rows = read_lines(scored / "scores.jsonl")
    rewards = [row["reward"] for row in rows]
    assert rewards == sorted(rewards, reverse=True)
    assert [row["rank"] for row in rows] == list(range(1, len(rows) + 1))
    kept = read_lines(scored / "traces.jsonl")
    assert [row["reward"] for row in kept] == rewards[: round(len(rows) / 2)]
    metrics = results(scored)
    assert metrics["score/reward"] == pytest.approx(sum(rewards) / len(rewards))
    assert metrics["score/reward_low"] <= metrics["score/reward"] <= metrics["score/reward_high"]
    assert all(documented(name) for name in [*metrics, *read_scalars(scored)])
    distilled = ["traces=score/traces", "student_path=pretrain/model", "output_dir=of_score"]
    finish(stage("distill", *distilled), scored.parent)
    report = (scored / "report.md").read_text()
    assert "explanations scored: mean reward" in report and "```attribution" in report
    assert "class=tokens" in (scored / "report.html").read_text()


def test_attribution_names_every_token(scored: Path) -> None:
    row = read_lines(scored / "scores.jsonl")[0]
    found = row["attribution"]
    # Each digit and word is a token, with its spaces around it.
    assert "".join(token for token, _ in found["explanation"]).split() == row["explanation"].split()
    lowest = min(value for _, value in found["solution"])
    assert lowest == pytest.approx(row["reward_terms"]["solution_log_prob/min"], abs=1e-3)
    if found["explanation"]:
        highest = max(value for _, value in found["explanation"])
        assert highest == pytest.approx(row["reward_terms"]["thought_kl/max"], abs=1e-3)


def test_explanations_of_a_data_set_and_no_teacher(
    chain: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    own = [*SCORE, "data=digit_chain", *DATA, "student_path=pretrain/model"]
    here([*own, "reward=no_entropy", "output_dir=own"], chain, monkeypatch)
    rows = read_lines(chain / "own" / "scores.jsonl")
    assert len(rows) == 16 + 4 and "teacher" not in rows[0]  # held-out ones too


MANY = ["data.source.count=200", "data.max_train=80", "data.max_validation=4"]


@pytest.fixture(scope="module")
def flown(chain: Path) -> Path:
    """The data's own explanations scored, with the reward preflight."""
    own = [*SCORE, "data=digit_chain", *MANY, "student_path=pretrain/model", "reward=no_entropy"]
    output = finish([*own, "preflight.lowest_area=1", "output_dir=flown"], chain)
    assert "area under the ROC curve" in output
    assert "preflight: the reward hardly tells good explanations from" in output
    return chain / "flown"


def test_a_preflight_is_told_in_metrics_and_report(flown: Path) -> None:
    rows = read(flown / "preflight.json")
    kinds = {"behaviour", "other_problem", "altered_digit", "truncated", "bare_solution"}
    assert kinds <= {row["against"] for row in rows}
    metrics = read(flown / "metrics.json")
    for row in rows:
        assert 0 <= row["low"] <= row["area"] <= row["high"] <= 1
        if row["term"] == "reward":
            assert metrics[f"preflight/{row['against']}_area"] == row["area"]
    assert all(documented(name) for name in metrics)
    # Steps, a fifth of these explanations, against all others; copies are made of steps alone.
    of_kind = {row["against"]: row for row in rows if row["term"] == "reward"}
    assert of_kind["behaviour"]["good"] + of_kind["behaviour"]["bad"] == 64
    assert of_kind["altered_digit"]["good"] == of_kind["behaviour"]["good"]
    report = (flown / "report.md").read_text()
    assert "## Does the reward tell good explanations from bad?" in report
    assert (flown / "plots" / "preflight.png").is_file()


def test_traces_are_labelled_by_their_data(flown: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    of_data = ["traces=flown/traces", "data=digit_chain", *MANY, "student_path=pretrain/model"]
    again = [*SCORE, *of_data, "reward=no_entropy", "output_dir=labelled"]
    here(again, flown.parent, monkeypatch)
    rows = {row["against"]: row for row in read(flown.parent / "labelled" / "preflight.json")}
    traces = read_lines(flown / "traces.jsonl")
    assert set(rows) == {"behaviour", "verifier"}
    assert rows["verifier"]["good"] + rows["verifier"]["bad"] == len(traces) == 84


def test_no_preflight(chain: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    own = [*SCORE, "data=digit_chain", *DATA, "student_path=pretrain/model", "preflight=null"]
    here([*own, "reward=no_entropy", "output_dir=unflown"], chain, monkeypatch)
    assert not (chain / "unflown" / "preflight.json").exists()


def test_teacher_rl_has_its_preflight_once(chain: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    knobs = ["teacher_path=teacher_sft/model", "data.source.count=200", "data.max_train=80"]
    short = [*knobs, "datamodule.steps=1", "callbacks.checkpoint.every_steps=1"]
    here(stage("teacher_rl", *short, "output_dir=rl_flown"), chain, monkeypatch)
    run = chain / "rl_flown"
    rows, metrics = read(run / "preflight.json"), read(run / "metrics.json")
    assert {row["against"] for row in rows} >= {"behaviour", "altered_digit"}
    assert metrics["preflight/altered_digit_area"] == next(
        row["area"] for row in rows if row["against"] == "altered_digit"
    )
    bare = [*stage("teacher_rl", *short, "preflight=null", "output_dir=rl_unflown")]
    here(bare, chain, monkeypatch)
    assert weights(run) == weights(chain / "rl_unflown")  # no random number is spent on it


def test_a_teacher_that_sees_no_solution_keeps_what_is_right(
    chain: Path, refuse: Callable[..., str], monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = ["teacher_path=pretrain/model", "student_path=pretrain/model", "sees_solution=false"]
    asked += ["rollout.max_new_tokens=20", "keep_unclosed=false", "best_of=8"]
    here(stage("collect", *asked, "output_dir=alone"), chain, monkeypatch)
    traces, metrics = read_lines(chain / "alone/traces.jsonl"), results(chain / "alone")
    assert 0 < len(traces) < 16
    left_out = ("cut", "tag_inside", "unclosed", "wrong")
    assert sum(metrics[f"collect/{why}_rate"] for why in left_out) == pytest.approx(
        1 - len(traces) / 16
    )
    assert metrics["collect/wrong_rate"] > 0
    assert all(documented(name) for name in metrics)
    assert "left out with a wrong answer" in (chain / "alone/report.md").read_text()
    no_grader = stage("collect", *asked, "~data.grader", "+data.grader=null")
    assert "set data.grader (it is null)" in refuse(*no_grader, cwd=chain)


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        (["credit=token", "reward=solution_only"], "choose a reward with thought_kl"),
        (
            ["credit=token", "credit.exact=true", "reward=k3"],
            "credit.exact=true takes the place of",
        ),
        (["credit=token", "credit.discount=2"], "credit.discount=2"),
        (["credit=token", "credit.discont=1"], "did you mean 'discount'"),
        (["preflight.corruptions=[trunk]"], "preflight.corruptions has 'trunk'"),
        (["data.part=teacher"], "set both"),
    ],
)
def test_credit_and_preflight_that_do_not_fit(
    chain: Path, refuse: Callable[..., str], overrides: list[str], said: str
) -> None:
    asked = stage("teacher_rl", "teacher_path=pretrain/model", *overrides, "check=true")
    assert said in refuse(*asked, cwd=chain)


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        ([], "stage=score takes explanations from traces="),
        (["traces=collect/traces"], "set model@teacher="),
        (
            ["traces=collect/traces", "reward=solution_only", "keep_fraction=0"],
            "keep_fraction=0: must",
        ),
        (["traces=none", "reward=solution_only"], "traces=none: no such file"),
    ],
)
def test_what_cannot_be_scored(
    chain: Path, refuse: Callable[..., str], overrides: list[str], said: str
) -> None:
    assert said in refuse(*SCORE, "student_path=pretrain/model", *overrides, cwd=chain)


def test_student_rl(chain: Path, refuse: Callable[..., str]) -> None:
    knobs = [knob for knob in RECIPES["teacher_rl"] if "max_new_tokens" not in knob]
    knobs += ["rollout.max_new_tokens=20", "student_path=pretrain/model"]
    finish(["stage=student_rl", *SHARED, *DATA, *knobs, "output_dir=student_rl"], chain)
    run = chain / "student_rl"
    assert weights(run) != weights(chain / "pretrain")
    metrics = read(run / "metrics.json")
    assert {"train/reward_terms/answer/correct", "train/behaviour/step_rate"} <= set(metrics)
    assert all(documented(name) for name in [*metrics, *read_scalars(run)])
    samples = read_lines(run / "samples.jsonl")
    assert {"completion", "answer/correct", "reward"} <= set(samples[0])
    assert "completions with an answer" in (run / "report.md").read_text()
    card = (run / "model" / "README.md").read_text()
    assert "A student after RL with verified answers as reward." in card
    no_grader = ["stage=student_rl", *SHARED, *DATA, "~data.grader", "+data.grader=null"]
    assert "set data.grader (it is null)" in refuse(*no_grader, cwd=chain)
    no_grader = ["~data.grader", "+data.grader=null", "traces=traces", "validation_answers=4"]
    message = refuse(*stage("distill", *no_grader), cwd=chain)
    assert "validation_answers=4 grades answers: set data.grader (it is null)" in message


def test_questions_that_were_trained_on_are_refused(
    chain: Path, refuse: Callable[..., str]
) -> None:
    same = ["data@trained_on=digit_chain", "trained_on.source.seed=10000019"]
    same += ["trained_on.source.count=1024", "trained_on.validation_fraction=0"]
    asked = stage("evaluate", "student_path=distill/model", *same)
    assert "8 of 8 questions (100.0 %) overlap" in refuse(*asked, "output_dir=no", cwd=chain)
    assert "8 of 8 questions" in refuse(*asked, "check=true", cwd=chain)
    finish([*asked, "contamination.max_exact_fraction=1", "output_dir=yes"], chain)
    assert results(chain / "yes")["eval/contamination_exact_fraction"] == 1.0
    record = read_lines(chain / "yes" / "answers.jsonl")[0]
    assert record["question"] in record["prompt"] and record["prompt"].endswith("<think>")


def test_two_evaluations_are_compared(chain: Path) -> None:
    finish(stage("evaluate", "student_path=pretrain/model", "output_dir=of_base"), chain)
    finish(stage("evaluate", "student_path=distill/model", "output_dir=of_student"), chain)
    command = ["stage=compare", "runs=[of_base,of_student]", "output_dir=compared"]
    first = finish(command, chain)
    assert "student_path=pretrain/model" in first and "student_path=distill/model" in first
    assert "going on" not in finish(command, chain)  # made again
    metrics = read(chain / "compared" / "metrics.json")
    assert metrics["compare/jobs"] == 2.0
    known = results(chain / "of_student")["eval/avg@3"]
    assert metrics["compare/student_path=distill/model/accuracy"] == pytest.approx(known)
    page = (chain / "compared" / "report.html").read_text()
    assert "data:image/png;base64," in page
    assert "2 finished of 2 runs" in finish([*command, "check=true"], chain)
    assert "x y z" in finish([*command, "title=x y z"], chain)  # only a page is made anew


def test_a_gate_stops_a_pipeline_before_it_costs_more(base: Path, tmp_path: Path) -> None:
    recipes = [f"{name}.{knob}" for name, knobs in RECIPES.items() for knob in knobs]
    paths = [f"student_path={base}", f"teacher_path={base}", "cache_dir=store"]
    gated = ["stage=pipeline", *SHARED, *DATA, *BENCHMARK, *recipes, *paths, "arm=chain"]
    gated += ["+steps.warm_up.gate={validation/loss: 100}", "output_dir=gated"]
    said = refused(gated, tmp_path)
    assert "steps.warm_up: validation/loss is " in said and "less than the 100" in said
    assert read(tmp_path / "gated" / "manifest.json")["status"] == "failed"
    assert [path.name for path in (tmp_path / "store").iterdir()] == ["teacher_sft"]
    wrong = [*gated[:-2], "+steps.warm_up.gate={validation/los: 1}", "output_dir=wrong"]
    assert "no such metric; did you mean 'validation/loss'" in refused(wrong, tmp_path)


def test_a_sweep_ends_in_a_page(base: Path, tmp_path: Path) -> None:
    (tmp_path / "base").symlink_to(base)
    evaluated = stage("evaluate", "student_path=base", "output_dir=sweep")
    callback = (
        "+hydra.callbacks.compare={_target_: rlt.stages.compare_jobs.CompareJobs, reference: none}"
    )
    done = rlt(["-m", *evaluated, "samples=2,3", "seed=0,1", callback], tmp_path)
    assert "samples=2 (reference)" in done.stdout
    assert "no arm 'none': compared with 'samples=2' instead" in done.stdout
    page = (tmp_path / "sweep" / "compare" / "report.md").read_text()
    assert "samples=2" in page and "Student's over seeds" in page


def test_a_sweep_with_a_failed_job_has_its_page_too(base: Path, tmp_path: Path) -> None:
    (tmp_path / "base").symlink_to(base)
    evaluated = stage("evaluate", "student_path=base", "output_dir=sweep")
    callback = "+hydra.callbacks.compare={_target_: rlt.stages.compare_jobs.CompareJobs}"
    ended = rlt(["-m", *evaluated, "samples=2,0", callback], tmp_path, status=1)
    assert "samples=0: must be a whole number of at least 1" in ended.stderr
    compared = tmp_path / "sweep" / "compare"
    page = (compared / "report.md").read_text()
    assert "avg@2" in page and "samples=2" in page and "1 of 2 jobs." in page
    with (compared / "jobs.csv").open(newline="") as rows:
        jobs = {row["params.samples"]: row for row in csv.DictReader(rows)}
    assert (jobs["2"]["status"], jobs["2"]["reason"]) == ("finished", "")
    assert jobs["0"]["status"] == "failed" and jobs["0"]["reason"] in page
    assert "samples=0: must be a whole number" in jobs["0"]["reason"]
    assert f"failed: {jobs['0']['job']}" in ended.stdout
