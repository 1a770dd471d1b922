"""Reports: of synthetic run folders, with numbers counted by hand."""

import json
import re
from io import StringIO
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from matplotlib.image import imread
from rich.console import Console

from rlt.report import (
    HELD_OUT_FILE,
    SampleWriter,
    StepRows,
    log_samples,
    print_table,
    read_scalars,
    write_pipeline_report,
    write_report,
)
from rlt.report.curves import moving_average
from rlt.report.folder import Run, read_jsonl
from rlt.report.results import result_lines
from rlt.report.run import metrics_table
from rlt.report.text import fenced, heading, metric_value, table
from rlt.runs.formatting import duration, number
from tests.metrics_doc import documented, documented_metrics
from tests.report.report_runs import (
    make_collect_run,
    make_evaluate_run,
    make_pipeline,
    make_rl_run,
    make_run,
    make_sft_run,
    write_events,
)


def check_markdown(report: Path) -> str:
    """Tables have as many cells in each row as in their header, and every link leads somewhere."""
    text = report.read_text(encoding="utf-8")
    for target in re.findall(r"\]\(([^)]+)\)", text):
        assert (report.parent / target).is_file(), target
    width = None
    for line in text.splitlines():
        cells = len(re.findall(r"(?<!\\)\|", line)) if line.startswith("| ") else None
        assert cells is None or width in (None, cells), line
        width = cells
    return text


def test_areas_of_a_preflight_stand_in_the_report(tmp_path: Path) -> None:
    run = make_rl_run(tmp_path / "run")
    rows = [
        {"against": against, "term": term, "good": 64, "bad": 60, "area": area, "low": area - 0.04,
         "high": area + 0.04}
        for against, term, area in (
            ("truncated", "reward", 0.71), ("truncated", "thought_kl/max", 0.34),
            ("altered_digit", "reward", 0.84), ("altered_digit", "thought_kl/max", 0.85),
        )
    ]  # fmt: skip
    (run / "preflight.json").write_text(json.dumps(rows))
    text = check_markdown(write_report(run))
    assert "## Does the reward tell good explanations from bad?" in text
    assert "| against | good : bad | `reward` | `thought_kl/max` |" in text
    assert "| `truncated` | 64 : 60 | 0.71 [0.67, 0.75] | 0.34 [0.30, 0.38] |" in text
    assert "](plots/preflight.png)" in text
    assert imread(run / "plots" / "preflight.png").std() > 0.05


def test_scalars_of_a_resumed_run_are_merged_and_the_last_written_wins(tmp_path: Path) -> None:
    write_events(tmp_path, {"train/loss": [(0, 3.0), (1, 2.0), (2, 9.0)], "old": [(5, 1.0)]})
    first = next(tmp_path.glob("events.*"))
    first.rename(tmp_path / "events.out.tfevents.9999999999.renamed.1.0")  # names do not decide
    write_events(tmp_path, {"train/loss": [(2, 1.5), (3, 1.0)]})
    assert read_scalars(tmp_path) == {
        "old": [(5, 1.0)],
        "train/loss": [(0, 3.0), (1, 2.0), (2, 1.5), (3, 1.0)],
    }


def test_all_of_many_scalars_are_read(tmp_path: Path) -> None:
    # TensorBoard's own default keeps a sample of 10,000.
    write_events(tmp_path, {"train/loss": [(step, float(step)) for step in range(12_000)]})
    assert len(read_scalars(tmp_path)["train/loss"]) == 12_000


def test_no_events_give_no_scalars(tmp_path: Path) -> None:
    assert read_scalars(tmp_path) == {}


def test_moving_average_is_over_the_values_around() -> None:
    averages = moving_average(np.array([1.0, 3.0, 5.0, 10.0]), 3)
    assert averages.tolist() == [2.0, 3.0, 6.0, 7.5]


def test_numbers_and_units() -> None:
    assert [number(v) for v in (3.0, 0.123456, 12345.6, -1e-7, 1234567.0, float("nan"))] == [
        "3", "0.1235", "12,346", "-1e-07", "1,234,567", "nan",
    ]  # fmt: skip
    assert metric_value("eval/avg@4_low", 0.5) == "50.0 %"
    assert metric_value("train/end_tag_rate", 0.875) == "87.5 %"
    assert metric_value("resources/peak_memory_bytes", 1.5 * 2**30) == "1.50 GiB"
    assert [duration(s) for s in (1.25, 59.99, 65.0, 7384.0)] == [
        "1.2 s", "60.0 s", "1 min 05 s", "2 h 03 min",
    ]  # fmt: skip


def test_fences_hold_whatever_the_text_is() -> None:
    assert fenced("a ```` b") == "`````text\na ```` b\n`````"
    shown = fenced("x" * 50 + "y" * 50, limit=10)
    assert shown == "```text\nxxxxx\n… (90 characters left out) …\nyyyyy\n```"


def test_tables_escape_what_would_break_them() -> None:
    assert table(["a", "b"], [["x|y", "two\nlines"]]).splitlines()[-1] == "| x\\|y | two lines |"
    assert heading("_a_b_ <i> *") == r"\_a_b\_ \<i\> \*"


def test_metrics_table_sets_before_beside_after() -> None:
    lines = metrics_table({"validation/loss": 0.5, "start/validation/loss": 2.0, "train/lr": 0.1})
    assert lines.splitlines() == [
        "| metric | before | after |",
        "| --- | ---: | ---: |",
        "| `train/lr` |  | 0.1 |",
        "| `validation/loss` | 2 | 0.5 |",
    ]


def test_report_of_teacher_rl(tmp_path: Path) -> None:
    run = make_rl_run(tmp_path / "run")
    text = check_markdown(write_report(run))
    assert text.startswith("# teacher_rl · 2026-01-02 03:05\n")
    assert "Held-out reward: -3 → -0.5 (+2.5)." in text
    assert "solution_log_prob/mean -2 → -0.25" in text
    assert "closed explanations 87.5 % → 100.0 %" in text
    for name in ("reward", "reward_terms", "completions", "policy", "time"):
        assert imread(run / f"plots/{name}.png").std() > 0.01  # something is drawn
        assert f"](plots/{name}.png)" in text
    assert not (run / "plots/loss.png").exists()
    places = [text.index(t) for t in ("first best", "first worst", "last best", "last worst")]
    assert places == sorted(places)
    assert "````text\n``` first best\n2\n````" in text
    assert "middle" not in text
    assert "1 min 05 s" in text and "rlt stage=teacher_rl data=digit_chain" in text
    assert "| bad: empty solution | 2 |" in text


def test_report_of_sft(tmp_path: Path) -> None:
    run = make_sft_run(tmp_path / "run")
    text = check_markdown(write_report(run))
    assert "Held-out loss 2 → 0.5 nats per target token; answer accuracy 12.5 % → 75.0 %." in text
    assert {p.stem for p in (run / "plots").iterdir()} == {"loss", "policy"}


def test_report_of_collect(tmp_path: Path) -> None:
    run = make_collect_run(tmp_path / "run")
    text = check_markdown(write_report(run))
    assert (
        "3 traces kept, each the best of 4 by reward. Mean reward of the kept ones -1 "
        "(worst -1.5, best -0.5); of everything sampled -2." in text
    )
    assert "25.0 % of the problems cut out" in text
    assert "thought_kl/mean 0.5" in text  # (0.25 + 0.5 + 0.75) / 3
    assert text.index("explanation 1") < text.index("explanation 3")
    assert (run / "plots/traces.png").is_file()


def test_report_of_evaluate(tmp_path: Path) -> None:
    run = make_evaluate_run(tmp_path / "run", [[True, False], [False, False]])
    text = check_markdown(write_report(run))
    assert "avg@2 on digit_chain: 25.0 % [15.0, 35.0], 95 % interval over 2 questions" in text
    assert "pass@2: 50.0 %" in text
    assert text.count("### Right") == 1 and text.count("### Wrong") == 2
    assert "Taken as its answer: `` `6` ``. Grader: differs." in text


def test_a_run_without_metrics_and_events_still_gets_a_report(tmp_path: Path) -> None:
    text = check_markdown(write_report(tmp_path))
    assert text == "# run\n\n- This run wrote no metrics that say how it went.\n"


def test_training_values_stand_in_where_nothing_was_held_out(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", "teacher_rl", {"train/reward": 3.0})
    write_events(run, {"train/reward": [(s, float(s)) for s in range(20)]})
    assert result_lines(Run(run)) == [
        "Training reward: 0.5 → 18.5 (first and last 2 steps of 20)."  # (0+1)/2, (18+19)/2
    ]


def test_pipeline_report(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    make_pipeline(folder)
    text = check_markdown(write_pipeline_report(folder))
    # 36 right questions of 40 against 4 half right ones: (72 - 4) / 80 = 85 points
    assert "RLT $student_1$ \\[new\\] is better than base: +85.0 points [" in text
    assert "against warm-up teacher's student: within noise, +0.0 points [" in text
    assert "| RLT $student_1$ \\[new\\] | 90.0 % [80.0, 100.0] | 90.0 % | 12.5 % | 40 |" in text
    assert "| teacher | teacher_rl | reused | 12.0 s |" in text
    assert "| total of the new ones |  |  | 48.0 s |" in text
    assert imread(folder / "plots/accuracy.png").std() > 0.01
    assert "](plots/teacher/reward.png)" in text and "](plots/traces/traces.png)" in text
    assert "](steps/make_rl_run/report.md)" in text
    assert not (folder / "plots/teacher/time.png").exists()


def test_evaluations_of_other_questions_are_not_compared(tmp_path: Path) -> None:
    make_run(tmp_path / "run", "pipeline", {})
    make_evaluate_run(tmp_path / "a", [[True]] * 3)
    make_evaluate_run(tmp_path / "b", [[True]] * 4)
    steps = [
        {"name": n, "stage": "evaluate", "label": None, "dir": str(tmp_path / n)} for n in "ab"
    ]
    (tmp_path / "run/steps.json").write_text(json.dumps(steps))
    text = check_markdown(write_pipeline_report(tmp_path / "run"))
    assert text.count("## Accuracy on digit_chain") == 2 and "points" not in text
    assert (tmp_path / "run/plots/accuracy_2.png").is_file()


def test_final_table(tmp_path: Path) -> None:
    out = StringIO()
    print_table(make_pipeline(tmp_path / "run"), tmp_path / "run", Console(file=out, width=160))
    lines = out.getvalue()
    assert re.search(r"base +│ +5.0 % \[0.0, 15.0\] │ +10.0 % │ +12.5 % │ +\+85.0 ", lines)
    assert re.search(r"RLT \$student_1\$ \[new\] +│ +90.0 %", lines)
    assert "within noise" in lines
    assert re.search(r"traces +│ collect +│ reused │ 12.0 s", lines)
    assert f"{tmp_path / 'run' / 'report.md'}" in lines
    assert f"tensorboard --logdir {tmp_path / 'run'}\n" in lines


def sample(reward: float) -> dict[str, Any]:
    return {"explanation": f"worth {reward}", "reward": reward, "thought_kl/mean": 0.25}


def test_change_of_the_held_out_reward_is_paired_by_problem(tmp_path: Path) -> None:
    folder = make_rl_run(tmp_path / "run")
    assert "one validation each" in "\n".join(result_lines(Run(folder)))
    write = StepRows(folder / HELD_OUT_FILE)
    easy_and_hard = [{"problem_id": p, "reward": r} for p, r in (("a", -1.0), ("b", -5.0))]
    write(0, easy_and_hard)
    write(80, [{**row, "reward": row["reward"] + 2.5} for row in reversed(easy_and_hard)])
    lines = result_lines(Run(folder))
    # Both problems gain 2.5: however far apart they are, the change has no spread.
    assert lines[0] == "Held-out reward: -3 → -0.5 (+2.5 [+2.5, +2.5])."
    assert lines[-1].endswith("paired over 2 held-out problems.")


def test_samples_of_a_resumed_run_are_not_doubled(tmp_path: Path) -> None:
    writer = SampleWriter(tmp_path)
    for step in range(4):
        writer(step, [sample(1.0), sample(0.0)])
    with (tmp_path / "samples.jsonl").open("a") as file:
        file.write('{"step": 4, "rew')  # killed while writing
    resumed = SampleWriter(tmp_path)
    resumed(2, [sample(5.0)])
    resumed(3, [sample(6.0)])
    rows = read_jsonl(tmp_path / "samples.jsonl")
    assert [(row["step"], row["reward"]) for row in rows] == [
        (0, 1.0), (0, 0.0), (1, 1.0), (1, 0.0), (2, 5.0), (3, 6.0),
    ]  # fmt: skip


def test_samples_go_to_tensorboard_best_first() -> None:
    shown: list[tuple[str, str, int]] = []

    def add_text(tag: str, text: str, global_step: int) -> None:
        shown.append((tag, text, global_step))

    logger = SimpleNamespace(experiment=SimpleNamespace(add_text=add_text))
    log_samples(logger, 7, [sample(-2.0), sample(1.5)])
    log_samples(None, 8, [sample(0.0)])
    ((tag, text, step),) = shown
    assert (tag, step) == ("samples", 7)
    assert text.index("reward **1.5** · thought_kl/mean 0.25") < text.index("worth -2.0")


def test_every_metric_of_the_synthetic_runs_is_documented(tmp_path: Path) -> None:
    make_pipeline(tmp_path / "run")
    for folder in (tmp_path / "run/steps").iterdir():
        run = Run(folder)
        assert [n for n in (*run.metrics, *run.scalars) if not documented(n)] == []


def test_documentation_is_not_a_catch_all() -> None:
    names = documented_metrics()
    assert len(names) == len(set(names)) > 50
    assert documented("eval/pass@16_low") and documented("start/validation/reward")
    for name in ("eval/pass@k", "train/rewards", "reward", "train/reward_terms/x", "start/loss"):
        assert not documented(name), name


@pytest.mark.parametrize("name", ["policy/kl_reference_k3", "time/train_update_seconds"])
def test_placeholders_stand_for_one_part_of_a_name(name: str) -> None:
    assert documented(name) and not documented(f"{name}/more")
