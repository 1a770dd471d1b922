"""Each stage by hand, from one to the next, through the real command line."""

import math
import re
from pathlib import Path
from typing import Any

import pyarrow.parquet
import pytest
import torch
from omegaconf import DictConfig, OmegaConf
from transformers import AutoModelForCausalLM, AutoTokenizer

from rlt.llm.models import fingerprint
from rlt.report import read_scalars
from rlt.runs.identity import config_key
from rlt.stages.collect import ranked
from rlt.stages.steps import input_fingerprints
from tests.cli import read, read_lines, results, rlt, stage
from tests.metrics_doc import documented
from tests.stages.killing import finish

TRAINING = ("pretrain", "teacher_sft", "teacher_rl", "distill")
STAGES = (*TRAINING, "collect", "evaluate")
HEADLINES = {
    "pretrain": "validation/loss",
    "teacher_sft": "validation/loss",
    "teacher_rl": "validation/reward",
    "distill": "validation/loss",
    "collect": "collect/reward",
    "evaluate": "eval/avg@3",
}
TRACE_FIELDS = {
    "behaviour",
    "problem_id", "question", "solution", "explanation", "system", "finish", "end_tag_found",
    "teacher_tokens", "student_tokens", "reward", "reward_terms", "reward_mean_of_n", "teacher",
    "student", "config", "seed", "sampling",
}  # fmt: skip


@pytest.mark.parametrize("name", STAGES)
def test_config_is_resolved_and_makes_the_same_key(
    chain: Path, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(chain)  # paths are relative to where the command was given
    file = chain / name / "config.yaml"
    assert "${" not in file.read_text()
    cfg = OmegaConf.load(file)
    assert cfg.stage == name
    assert isinstance(cfg, DictConfig)
    assert config_key(cfg, input_fingerprints(cfg)) == read(chain / name / "manifest.json")["key"]


@pytest.mark.parametrize("name", STAGES)
def test_manifest_says_what_ran_on_what(chain: Path, name: str) -> None:
    manifest = read(chain / name / "manifest.json")
    assert manifest["status"] == "finished"
    assert manifest["stage"] == name
    assert f"stage={name}" in manifest["command"]
    assert manifest["packages"]["torch"] == torch.__version__
    assert manifest["hardware"]["torch_threads"] == 1
    data = manifest["data"]
    assert data["read"] == data["kept"] + data["duplicates"]
    assert re.fullmatch(r"[0-9a-f]{16}", data["fingerprint"])
    if name in ("teacher_sft", "teacher_rl", "collect", "distill"):
        assert (data["read"], data["train"], data["validation"]) == (48, 16, 4)


def test_manifests_know_the_models_by_their_weights(chain: Path) -> None:
    def of(folder: str) -> str:
        return fingerprint(AutoModelForCausalLM.from_pretrained(chain / folder / "model"))

    rl = read(chain / "teacher_rl" / "manifest.json")["models"]
    assert rl["teacher"] == rl["student"] == of("teacher_sft")
    held = rl["bytes_in_memory"]
    assert held == dict.fromkeys(("teacher", "reference and student"), 4 * rl["parameters"])
    collect = read(chain / "collect" / "manifest.json")["models"]
    assert collect == {"teacher": of("teacher_rl"), "student": of("pretrain")}
    assert read(chain / "evaluate" / "manifest.json")["models"] == {"student": of("distill")}


@pytest.mark.parametrize("name", STAGES)
def test_metrics_are_flat_finite_and_documented(chain: Path, name: str) -> None:
    metrics = read(chain / name / "metrics.json")
    scalars = read_scalars(chain / name)
    assert HEADLINES[name] in metrics and HEADLINES[name] in scalars
    for values in ({k: [v] for k, v in metrics.items()}, scalars_only(scalars)):
        for key, numbers in values.items():
            assert documented(key), key
            assert all(isinstance(v, float) and math.isfinite(v) for v in numbers), key


def scalars_only(scalars: dict[str, list[tuple[int, float]]]) -> dict[str, list[float]]:
    return {tag: [value for _, value in points] for tag, points in scalars.items()}


@pytest.mark.parametrize("name", TRAINING)
def test_training_logs_every_step_once(chain: Path, name: str) -> None:
    steps = {"pretrain": 60, "teacher_sft": 4, "teacher_rl": 6, "distill": None}[name]
    train = "train/reward" if name == "teacher_rl" else "train/loss"
    logged = [step for step, _ in read_scalars(chain / name)[train]]
    assert logged == sorted(set(logged))
    assert steps is None or len(logged) == steps
    metrics = results(chain / name)
    held_out = train.replace("train", "validation")
    assert held_out in metrics
    assert f"start/{held_out}" in metrics


def test_pretraining_learns(chain: Path) -> None:
    metrics = results(chain / "pretrain")
    assert metrics["start/validation/loss"] > math.log(28)  # 28 tokens: worse than guessing
    assert metrics["validation/loss"] < 0.75 * metrics["start/validation/loss"]


@pytest.mark.parametrize("name", STAGES)
def test_report_shows_plots_that_exist(chain: Path, name: str) -> None:
    report = (chain / name / "report.md").read_text()
    plots = re.findall(r"!\[[^\]]*\]\(([^)]+)\)", report)
    assert plots or name == "evaluate"
    for plot in plots:
        assert (chain / name / plot).read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize("name", TRAINING)
def test_model_folder_loads_with_plain_transformers(chain: Path, name: str) -> None:
    folder = chain / name / "model"
    model = AutoModelForCausalLM.from_pretrained(folder)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    ids = tokenizer("1 2 <think>", add_special_tokens=False, return_tensors="pt")["input_ids"]
    assert tokenizer.convert_ids_to_tokens(ids[0].tolist()) == ["1", "2", "<think>"]
    assert tokenizer.pad_token == "<pad>"
    assert model.config.pad_token_id == tokenizer.pad_token_id
    assert model(ids).logits.shape == (1, 3, len(tokenizer))


def test_every_training_stage_changes_the_weights(chain: Path) -> None:
    found = {(chain / name / "model/model.safetensors").read_bytes() for name in TRAINING}
    assert len(found) == len(TRAINING)


def test_rewards_of_sample_explanations_are_their_terms(chain: Path) -> None:
    samples = read_lines(chain / "teacher_rl" / "samples.jsonl")
    assert [row["step"] for row in samples] == [0, 0, 1, 1, 2, 2, 3, 3, 4, 4, 5, 5]
    for row in samples:
        terms = {k: v for k, v in row.items() if isinstance(v, float)}
        terms |= row.get("reward_terms", {})
        assert row["reward"] == pytest.approx(rlt_reward(terms), rel=1e-4, abs=1e-4)


def test_held_out_rewards_are_of_the_same_problems_at_every_validation(chain: Path) -> None:
    rows = read_lines(chain / "teacher_rl" / "held_out_rewards.jsonl")
    steps = {step: [r for r in rows if r["step"] == step] for step in (0, 2, 4, 6)}
    assert len(rows) == sum(map(len, steps.values()))
    problems = {row["problem_id"] for row in rows}
    metrics = results(chain / "teacher_rl")
    for step, name in ((0, "start/validation/reward"), (6, "validation/reward")):
        assert {row["problem_id"] for row in steps[step]} == problems
        mean = sum(row["reward"] for row in steps[step]) / len(problems)
        assert mean == pytest.approx(metrics[name], rel=1e-5)


def rlt_reward(terms: dict[str, float]) -> float:
    """The paper's: alpha = 0.01, lambda = 3."""
    return (
        terms["solution_log_prob/mean"]
        + 0.01 * terms["solution_log_prob/min"]
        - 3 * terms["thought_kl/mean"]
        - 0.03 * terms["thought_kl/max"]
        - terms["end_tag_penalty"]
    )


def test_traces_hold_everything_about_themselves(chain: Path) -> None:
    traces = read_lines(chain / "collect" / "traces.jsonl")
    manifest = read(chain / "collect" / "manifest.json")
    assert 0 < len(traces) <= 16
    assert len({row["problem_id"] for row in traces}) == len(traces)
    for row in traces:
        assert set(row) == TRACE_FIELDS
        assert row["reward"] == pytest.approx(rlt_reward(row["reward_terms"]), rel=1e-4, abs=1e-4)
        assert row["reward_terms"]["end_tag_penalty"] == (0.0 if row["end_tag_found"] else 1.0)
        assert row["finish"] in ("stop", "eos", "length")
        assert 1 <= row["teacher_tokens"] <= 12
        written = len(row["explanation"].split())
        if row["finish"] == "stop":
            assert row["teacher_tokens"] == written + 1  # the end tag
        # <bos>, seven digits, ?, <think> | explanation | </think> <answer>, digit, </answer> <eos>
        assert row["student_tokens"] == 10 + written + 2 + 1 + 2
        assert (row["config"], row["seed"]) == (manifest["key"], 0)
        assert row["teacher"] == manifest["models"]["teacher"]
        assert row["student"] == manifest["models"]["student"]
        assert row["sampling"]["best_of"] == 3
        assert row["sampling"]["temperature"] == 0.7


def test_best_of_n_takes_the_best(chain: Path) -> None:
    traces = read_lines(chain / "collect" / "traces.jsonl")
    # Of each problem it may be below the mean, which counts what is unfit to be a trace too.
    gains = [row["reward"] - row["reward_mean_of_n"] for row in traces]
    assert sum(gains) / len(gains) > 1e-3
    metrics = results(chain / "collect")
    assert metrics["collect/traces"] == len(traces)
    rewards = [row["reward"] for row in traces]
    assert metrics["collect/reward"] == pytest.approx(sum(rewards) / len(rewards))


def test_the_best_is_sought_among_what_is_fit_to_be_a_trace() -> None:
    def row(reward: float, left_out: str | None) -> dict[str, Any]:
        return {"reward": reward, "left_out": left_out}

    group = [row(-1.0, "tag_inside"), row(-4.0, None), row(-2.5, None), row(-2.0, "cut")]
    best = ranked(group, 1)
    assert (best["reward"], best["reward_mean_of_n"]) == (-2.5, (-1.0 - 4.0 - 2.5 - 2.0) / 4)
    assert ranked(group, 2)["reward"] == -4.0
    assert ranked(group, 3)["reward"] == -4.0  # only two are fit
    assert ranked([row(-3.0, "cut"), row(-2.0, "cut")], 1)["reward"] == -2.0


def test_cut_traces_and_parquet(chain: Path) -> None:
    whole = read_lines(chain / "collect" / "traces.jsonl")
    limit = sorted(row["student_tokens"] for row in whole)[len(whole) // 2]
    paths = ["teacher_path=teacher_rl/model", "student_path=pretrain/model"]
    options = ["format=parquet", f"max_student_tokens={limit}", "output_dir=cut"]
    finish(stage("collect", *paths, *options), chain)
    traces = pyarrow.parquet.read_table(chain / "cut" / "traces.parquet").to_pylist()
    best = {row["problem_id"]: row for row in whole}
    assert {r["problem_id"] for r in whole if r["student_tokens"] <= limit} <= {
        row["problem_id"] for row in traces
    }
    changed = {"config", "sampling"}  # they tell the limit and the format
    for row in traces:
        assert set(row) == TRACE_FIELDS
        assert row["student_tokens"] <= limit
        same = best[row["problem_id"]]
        if same["student_tokens"] <= limit:
            assert all(row[key] == same[key] for key in TRACE_FIELDS - changed)
        else:  # the best one is too long: the best of the others stands in
            assert row["reward"] <= same["reward"]
    metrics = results(chain / "cut")
    assert metrics["collect/cut_rate"] > 0
    shares = [metrics[f"collect/{why}_rate"] for why in ("cut", "tag_inside", "unclosed")]
    assert 16 * sum(shares) == pytest.approx(16 - len(traces))


def test_distillation_reads_all_traces(chain: Path) -> None:
    report = read(chain / "distill" / "manifest.json")["traces"]
    traces = read_lines(chain / "collect" / "traces.jsonl")
    assert report["read"] == report["kept"] == len(traces)
    assert report["train"] + report["validation"] == len(traces)
    steps = len(read_scalars(chain / "distill")["train/loss"])
    assert steps == math.ceil(report["train"] / 8)


def test_accuracy_is_what_the_answers_say(chain: Path) -> None:
    answers = read_lines(chain / "evaluate" / "answers.jsonl")
    metrics = results(chain / "evaluate")
    assert len(answers) == 8 * 3
    by_question: dict[str, list[bool]] = {}
    for row in answers:
        assert row["correct"] == (row["extracted"] == row["solution"])
        by_question.setdefault(row["problem_id"], []).append(row["correct"])
    assert {len(verdicts) for verdicts in by_question.values()} == {3}
    shares = [sum(verdicts) / 3 for verdicts in by_question.values()]
    assert metrics["eval/avg@3"] == pytest.approx(sum(shares) / 8)
    assert metrics["eval/pass@1"] == pytest.approx(sum(shares) / 8)
    assert metrics["eval/pass@3"] == pytest.approx(sum(share > 0 for share in shares) / 8)
    assert metrics["eval/avg@3_low"] <= metrics["eval/avg@3"] <= metrics["eval/avg@3_high"]
    assert metrics["eval/answer_tokens"] == pytest.approx(sum(r["tokens"] for r in answers) / 24)
    assert (metrics["eval/questions"], metrics["eval/answers"]) == (8, 24)


def test_a_finished_run_is_not_run_again(chain: Path) -> None:
    before = (chain / "evaluate" / "answers.jsonl").stat().st_mtime_ns
    done = rlt(stage("evaluate", "output_dir=evaluate", "student_path=distill/model"), chain)
    assert "already finished" in done.stdout + done.stderr
    assert (chain / "evaluate" / "answers.jsonl").stat().st_mtime_ns == before


def test_progress_in_lines_where_there_is_no_terminal(chain: Path, tmp_path: Path) -> None:
    done = rlt(
        stage(
            "teacher_sft", f"teacher_path={chain / 'pretrain' / 'model'}", "output_dir=run",
            "callbacks.lines.every_seconds=0.001",
        ),
        tmp_path,
    )  # fmt: skip
    lines = re.findall(r"^step (\d) of 4, [\d.]+ s left, train/loss [\d.]+.*$", done.stdout, re.M)
    assert lines == ["1", "2", "3", "4"]
