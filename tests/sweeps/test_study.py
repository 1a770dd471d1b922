"""Runs side by side: arms and seeds, intervals and verdicts by hand, the page, its HTML."""

import json
import re
from io import StringIO
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from rlt.report.html import write_html
from rlt.stages.compare import Compare
from rlt.sweeps.arms import compare_arms
from rlt.sweeps.jobs import find_jobs
from rlt.sweeps.page import print_study, sentence, write_study_report
from rlt.sweeps.study import arms_of, failures, read_study
from tests.report.report_runs import make_evaluate_run, make_run, write_lines
from tests.report.test_report import check_markdown


def job(folder: Path, right: list[list[bool]], seed: int, *overrides: str, **manifest: Any) -> Path:
    """An evaluation of a sweep: its overrides, its seed, when it began."""
    make_evaluate_run(folder, right)
    file = folder / "manifest.json"
    told = json.loads(file.read_text())
    told |= {"seed": seed, "overrides": ["experiment=x", *overrides, f"seed={seed}"]}
    file.write_text(json.dumps(told | manifest))
    return folder


def answers(*per_question: int) -> list[list[bool]]:
    """Four answers to each question, so many of them right."""
    return [[True] * n + [False] * (4 - n) for n in per_question]


@pytest.fixture
def sweep(tmp_path: Path) -> Path:
    """Two rewards, three seeds, four questions; one job failed, one runs still."""
    folder = tmp_path / "sweep"
    for seed, (good, bad) in enumerate([((4, 4, 4, 2), 1), ((4, 4, 4, 4), 2), ((4, 4, 3, 3), 0)]):
        job(folder / f"rlt{seed}", answers(*good), seed, "reward=rlt", "optim.lr=1")
        job(folder / f"len{seed}", answers(bad, 0, 0, 0), seed, "reward=length", "optim.lr=1")
    failed = {"status": "failed", "error": "ValueError: loss nan"}
    job(folder / "x", answers(1, 1, 1, 1), 3, "reward=rlt", "optim.lr=1", **failed)
    return folder


def test_arms_are_what_differs_but_for_the_seed(sweep: Path) -> None:
    study = read_study([str(sweep)], "reward=rlt", "last")
    jobs, reference = study.jobs, study.reference
    assert len(jobs) == 7 and reference.name == "reward=rlt"
    assert {arm.name for arm in study.arms} == {"reward=rlt", "reward=length"}
    assert sorted(reference.cells) == [0, 1, 2]
    # 14, 16 and 14 of 16: mean 0.9167, t(0.975, 2) = 4.3027, standard error 0.04167
    half = 4.302653 * (0.125**2 / 3 / 3) ** 0.5
    assert reference.interval == pytest.approx((11 / 12, 11 / 12 - half, 11 / 12 + half), abs=1e-4)
    assert failures(jobs) == [("x", "ValueError: loss nan")]


def test_differences_are_paired_by_seed(sweep: Path) -> None:
    study = read_study([str(sweep)], "reward=rlt", "last")
    [other] = [arm for arm in study.arms if arm is not study.reference]
    difference = study.differences[other.name]
    assert difference is not None
    # 13, 14 and 14 of 16 answers more
    assert difference.interval.mean == pytest.approx(41 / 48)
    assert (difference.seeds, difference.wins, difference.verdict) == (3, 3, "better")
    assert compare_arms(other, study.reference).verdict == "worse"
    text = sentence(study, difference)
    assert text.startswith("reward=rlt is **better** than reward=length: +85.4 points [")
    assert text.endswith("ahead in 3 of 3 seeds.")


def test_two_runs_are_compared_by_question(tmp_path: Path) -> None:
    a = job(tmp_path / "a", answers(4, 4, 0, 0), 0)
    b = job(tmp_path / "b", answers(4, 0, 4, 0), 0)
    first, second = arms_of(find_jobs([str(a), str(b)]))
    assert (first.name, second.name) == ("a", "b")
    difference = compare_arms(first, second)
    assert difference.verdict == "within noise" and difference.questions_needed is None
    c = job(tmp_path / "c", answers(0, 0, 0, 4), 0)
    study = read_study([str(a), str(c)])
    noisy = study.differences["c"]
    assert noisy is not None
    # Differences 1, 1, 0, -1: ((1.96 + 0.8416) * 0.9574 / 0.25)^2 = 115.1
    assert noisy.verdict == "within noise" and noisy.questions_needed == 116
    assert "a difference as large would show over about 116 questions" in sentence(study, noisy)


def test_what_cannot_be_compared(sweep: Path, tmp_path: Path) -> None:
    job(sweep / "again", answers(1, 1, 1, 1), 0, "reward=rlt", "optim.lr=1")
    with pytest.raises(ValueError, match=r"are both 'reward=rlt' with seed 0; leave one"):
        read_study([str(sweep)], None, "last")
    other = job(tmp_path / "o", answers(1, 1), 0)
    one = job(tmp_path / "p", answers(1, 1, 1, 1), 0)
    with pytest.raises(ValueError, match="answered different questions"):
        read_study([str(other), str(one)], None, "last")
    with pytest.raises(ValueError, match=r"reference='O': no such arm; did you mean 'o'"):
        read_study([str(other)], "O", "last")
    with pytest.raises(FileNotFoundError, match="is no folder"):
        read_study([str(tmp_path / "none")], None, "last")
    (tmp_path / "empty").mkdir()
    with pytest.raises(FileNotFoundError, match="holds no run"):
        read_study([str(tmp_path / "empty")], None, "last")
    with pytest.raises(ValueError, match="runs is empty"):
        read_study([], None, "last")
    with pytest.raises(ValueError, match="choose last or all"):
        read_study([str(other)], None, "first")


# --- pages ----------------------------------------------------------------------------------------


def compare_run(folder: Path, runs: list[str], **config: Any) -> Path:
    config = {"runs": runs, "reference": None, "evaluations": "last", "title": None} | config
    make_run(folder, "compare", {"compare/jobs": 7.0}, config)
    write_study_report(folder, read_study(runs, config["reference"]))
    return folder


def test_the_page_of_a_sweep(sweep: Path, tmp_path: Path) -> None:
    run = compare_run(tmp_path / "c", [str(sweep)], reference="reward=rlt", title="A | B <b>")
    text = check_markdown(run / "report.md")
    assert text.startswith("# A \\| B \\<b\\>\n")
    assert "reward=rlt is **better** than reward=length" in text
    assert "| 1 | reward=rlt | 91.7 % [73.7, 100.0] | 87.5 100.0 87.5 | 3 |" in text
    assert "1 of 7 jobs." in text and "| `x` | ValueError: loss nan |" in text
    assert "Student's over seeds" in text
    page = (run / "report.html").read_text()
    assert "<b>" not in page.split("</style>")[1].split("is <strong>")[0]
    out = StringIO()
    print_study(run, Console(file=out, width=100))
    assert "failed: x: ValueError: loss nan" in out.getvalue()
    Compare.print_result(run)


def pipeline(
    folder: Path, store: Path, accuracy: int, reward: float, label: str, seed: int = 0
) -> Path:
    """A pipeline with traces of a mean reward and an evaluation, as the study reads it."""
    steps = []
    make_run(
        store / "traces", "collect",
        {
            "collect/reward": reward, "collect/behaviour/step_fraction": 0.25,
            "collect/behaviour/leak_rate": 0.75,
        },
    )  # fmt: skip
    rows = [
        {
            "question": "1 2", "solution": "3", "explanation": f"text {n} of {label}",
            "behaviour": "leak" if n % 4 else "step", "reward": reward + n,
            "reward_terms": {"solution_log_prob/mean": -float(n)},
        }
        for n in range(40)
    ]  # fmt: skip
    write_lines(store / "traces" / "traces.jsonl", rows)
    make_evaluate_run(store / "accuracy", answers(accuracy, accuracy, 0, 0))
    for name, stage, shown in (("traces", "collect", None), ("accuracy", "evaluate", label)):
        metrics = json.loads((store / name / "metrics.json").read_text())
        told = {"name": name, "stage": stage, "label": shown, "dir": str(store / name)}
        steps.append(told | {"metrics": metrics, "seconds": 1.0})
    make_run(folder, "pipeline", {"accuracy/eval/avg@4": 0.5}, {"reward": {"terms": {}}})
    manifest = json.loads((folder / "manifest.json").read_text())
    (folder / "manifest.json").write_text(
        json.dumps(manifest | {"seed": seed, "overrides": [f"arm={label}"]})
    )
    (folder / "steps.json").write_text(json.dumps(steps))
    return folder


def test_behaviours_rewards_and_their_correlation(tmp_path: Path) -> None:
    for seed in (0, 1):
        for n, (accuracy, reward) in enumerate([(1, -3.0), (2, -2.0), (4, -1.0), (3, -1.5)]):
            name = f"arm{n}_{seed}"
            pipeline(
                tmp_path / "s" / name, tmp_path / "store" / name, accuracy, reward, f"arm {n}", seed
            )
    run = compare_run(tmp_path / "c", [str(tmp_path / "s")], reference="arm 2")
    text = check_markdown(run / "report.md")
    assert "over 4 sets of traces: **1.00** [1.00, 1.00]" in text
    assert "| arm 0 | 25.0 % | 75.0 % |" in text  # step, leak
    # Of 40 traces 10 are steps: n = 0, 4, …, 36, mean -18; the others' mean is -20.
    assert "| leak | 60 |" in text and "| step | 20 |" in text
    assert "-20" in text and "-18" in text
    assert "text 20 of arm 1" in text  # the middle one by reward
    assert (run / "plots" / "reward.png").is_file()


def test_html_holds_everything_and_no_markup_of_the_texts(tmp_path: Path) -> None:
    (tmp_path / "plots").mkdir()
    (tmp_path / "plots" / "a b.png").write_bytes(b"\x89PNG")
    report = tmp_path / "report.md"
    report.write_text(
        "# T \\<x\\>\n\n![a](plots/a%20b.png)\n\n```text\n<script>alert(1)</script>\n```\n\n"
        "<script>alert(2)</script>\n\n[link](javascript:alert(3))\n\n| a |\n| --- |\n| b |\n"
    )
    page = write_html(report).read_text()
    assert "<title>T &lt;x&gt;</title>" in page
    assert 'src="data:image/png;base64,iVBORw=="' in page
    assert "<script" not in page and 'href="javascript' not in page
    assert not re.search(r'(src|href)="https?:', page)
    assert "<td>b</td>" in page
