"""Synthetic run folders of every stage and of a pipeline, as the reports read them."""

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
from torch.utils.tensorboard import SummaryWriter

from rlt.config.compose import config_dir
from rlt.report import write_report

Rows = dict[str, list[tuple[int, float]]]


def write_events(folder: Path, scalars: Rows) -> None:
    with SummaryWriter(str(folder)) as writer:
        for tag, values in scalars.items():
            for step, value in values:
                writer.add_scalar(tag, value, step)


def write_lines(file: Path, rows: list[dict[str, Any]]) -> None:
    file.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


# A run's config names the class of its stage, as conf/stage/ or conf/recipe/ has it.
TARGETS: dict[str, str] = {
    file.stem: match[1]
    for folder in ("recipe", "stage")
    for file in (config_dir() / folder).glob("*.yaml")
    if (match := re.search(r"^_target_: (.*)$", file.read_text(), re.MULTILINE))
}


def make_run(
    folder: Path, stage: str, metrics: dict[str, float], config: dict[str, Any] | None = None
) -> Path:
    folder.mkdir(parents=True)
    (folder / "config.yaml").write_text(
        json.dumps({"stage": stage, "_target_": TARGETS[stage], "seed": 0} | (config or {}))
    )
    (folder / "metrics.json").write_text(json.dumps(metrics))
    manifest = {
        "key": "0123456789abcdef",
        "status": "finished",
        "stage": stage,
        "seed": 0,
        "command": [f"stage={stage}", "data=digit_chain"],
        "began": ["2026-01-02T03:04:05+0000"],
        "ended": "2026-01-02T03:05:10+0000",
        "seconds": 65.0,
        "rlt": "0.1.0",
        "git": None,
        "packages": {"torch": "2.13.0", "lightning": "2.6.6"},
        "hardware": {"platform": "Linux", "python": "3.11", "cpus": 2, "torch_threads": 2},
        "data": {
            "source": "digit chains | seed 0",
            "read": 1100,
            "kept": 1098,
            "bad": {"empty solution": 2},
            "bad_rows": ["rows.jsonl:7: empty solution"],
            "duplicates": 0,
            "train": 1024,
            "validation": 74,
        },
    }
    (folder / "manifest.json").write_text(json.dumps(manifest))
    return folder


def rl_curves(steps: int = 80) -> Rows:
    rng = np.random.default_rng(0)
    x = np.arange(steps)
    rise = 1 - np.exp(-x / (steps / 4))
    train = {
        "reward": -3 + 2.6 * rise + rng.normal(0, 0.15, steps),
        "reward_std": 0.9 - 0.6 * rise + rng.normal(0, 0.05, steps),
        "completion_tokens": 9 + 2 * rise + rng.normal(0, 0.3, steps),
        "end_tag_rate": np.clip(0.9 + 0.1 * rise + rng.normal(0, 0.01, steps), 0, 1),
        "overlong_rate": np.clip(0.1 - 0.1 * rise, 0, 1),
        "reward_terms/solution_log_prob/mean": -2 + 1.7 * rise + rng.normal(0, 0.1, steps),
        "reward_terms/solution_log_prob/min": -4 + 3 * rise + rng.normal(0, 0.2, steps),
        "reward_terms/thought_kl/mean": 0.3 - 0.25 * rise + rng.normal(0, 0.02, steps),
        "reward_terms/thought_kl/max": 2 - 1.5 * rise + rng.normal(0, 0.2, steps),
        "reward_terms/end_tag_penalty": 0.1 - 0.1 * rise,
    }
    policy = {
        "loss": rng.normal(0, 0.01, steps),
        "grad_norm": 1 + rng.gamma(2, 0.3, steps),
        "lr": np.full(steps, 3e-4),
        "entropy": 1.4 - 0.9 * rise,
        "kl_reference_k3": 0.8 * rise + rng.normal(0, 0.01, steps),
        "kl_old_k1": np.zeros(steps),
        "kl_old_k3": np.zeros(steps),
        "ratio": np.ones(steps),
        "clip_low_rate": np.zeros(steps),
        "clip_high_rate": np.zeros(steps),
        "zero_advantage_rate": 0.2 * rise,
    }
    time = {
        "train_rollout_seconds": rng.normal(0.2, 0.02, steps),
        "train_reward_seconds": rng.normal(0.05, 0.005, steps),
        "train_update_seconds": rng.normal(0.1, 0.01, steps),
    }
    curves = {
        f"{prefix}/{name}": list(zip(range(steps), values.tolist(), strict=True))
        for prefix, group in (("train", train), ("policy", policy), ("time", time))
        for name, values in group.items()
    }
    for name in train:
        curves[f"validation/{name}"] = curves[f"train/{name}"][:: steps // 4]
    return curves


def make_rl_run(folder: Path) -> Path:
    metrics = {
        "start/validation/reward": -3.0,
        "validation/reward": -0.5,
        "start/validation/reward_terms/solution_log_prob/mean": -2.0,
        "validation/reward_terms/solution_log_prob/mean": -0.25,
        "start/validation/end_tag_rate": 0.875,
        "validation/end_tag_rate": 1.0,
        "train/reward": -0.6,
        "resources/peak_memory_bytes": 2.0**30,
    }
    make_run(folder, "teacher_rl", metrics)
    write_events(folder, rl_curves())
    rows = [
        {
            "step": step,
            "problem_id": "p",
            "question": "3 5 2 ?",
            "solution": "0",
            "explanation": text,
            "finish": "stop",
            "reward": reward,
            "solution_log_prob/mean": reward / 2,
            "end_tag_penalty": 0.0,
        }
        for step, text, reward in (
            (0, "``` first best\n2", -2.0),
            (0, "first worst", -5.0),
            (40, "middle", -1.5),
            (79, "last best", -0.1),
            (79, "last worst", -1.0),
        )
    ]
    write_lines(folder / "samples.jsonl", rows)
    return folder


def make_sft_run(folder: Path, stage: str = "distill") -> Path:
    metrics = {"start/validation/loss": 2.0, "validation/loss": 0.5, "train/loss": 0.4}
    metrics |= {"start/validation/answer_accuracy": 0.125, "validation/answer_accuracy": 0.75}
    make_run(folder, stage, metrics)
    falling = [(s, 2.0 * 0.95**s + 0.3) for s in range(48)]
    write_events(
        folder,
        {
            "train/loss": falling,
            "train/grad_norm": falling,
            "train/entropy": falling,
            "train/lr": [(s, 5e-4 * (1 - s / 48)) for s in range(48)],
            "validation/loss": falling[::12],
            "validation/answer_accuracy": [(s, 0.1 + s / 80) for s in range(0, 48, 12)],
        },
    )
    return folder


def make_collect_run(folder: Path) -> Path:
    metrics = {"collect/traces": 3.0, "collect/cut_rate": 0.25, "collect/reward": -1.0}
    metrics |= {"collect/reward_mean_of_n": -2.0, "collect/end_tag_rate": 1.0}
    make_run(folder, "collect", metrics, {"best_of": 4})
    rows = [
        {
            "problem_id": str(n),
            "question": "q",
            "solution": "s",
            "explanation": f"explanation {n}",
            "end_tag_found": True,
            "finish": "stop",
            "teacher_tokens": 10 + n,
            "student_tokens": 20 + n,
            "reward": -0.5 * n,
            "reward_terms": {"thought_kl/mean": 0.25 * n, "end_tag_penalty": 0.0},
        }
        for n in (1, 2, 3)
    ]
    write_lines(folder / "traces.jsonl", rows)
    return folder


def make_evaluate_run(folder: Path, right: list[list[bool]]) -> Path:
    share = float(np.mean(right))
    k = len(right[0])
    metrics = {
        f"eval/avg@{k}": share,
        f"eval/avg@{k}_low": max(0.0, share - 0.1),
        f"eval/avg@{k}_high": min(1.0, share + 0.1),
        f"eval/pass@{k}": float(np.mean([any(row) for row in right])),
        "eval/no_answer_rate": 0.125,
        "eval/grading_error_rate": 0.0,
        "eval/questions": float(len(right)),
    }
    make_run(folder, "evaluate", metrics, {"benchmark": {"name": "digit_chain"}})
    rows = [
        {
            "problem_id": f"p{p}",
            "question": f"question {p}",
            "solution": "6",
            "sample": sample,
            "text": "thought `6`",
            "extracted": "`6`",
            "correct": correct,
            "score": float(correct),
            "reason": "" if correct else "differs",
            "tokens": 5,
        }
        for p, row in enumerate(right)
        for sample, correct in enumerate(row)
    ]
    write_lines(folder / "answers.jsonl", rows)
    return folder


def make_pipeline(folder: Path) -> list[dict[str, Any]]:
    make_run(folder, "pipeline", {})
    weak = [[True, False]] * 4 + [[False, False]] * 36  # avg@2 = 4/80 = 5 %
    strong = [[True, True]] * 36 + [[False, False]] * 4  # 72/80 = 90 %
    close = [[True, True]] * 35 + [[True, False]] * 2 + [[False, False]] * 3  # 72/80, other places
    for run in (make_rl_run, make_sft_run, make_collect_run):
        run(folder / "steps" / run.__name__)
        write_report(folder / "steps" / run.__name__)
    for name, right in (("base", weak), ("warm_up", close), ("student", strong)):
        make_evaluate_run(folder / "steps" / name, right)
    entries = [
        ("teacher", "teacher_rl", None, "make_rl_run", True),
        ("traces", "collect", None, "make_collect_run", True),
        ("distill", "distill", None, "make_sft_run", False),
        ("base_accuracy", "evaluate", "base", "base", False),
        ("warm_accuracy", "evaluate", "warm-up teacher's student", "warm_up", False),
        ("student_accuracy", "evaluate", "RLT $student_1$ [new]", "student", False),
    ]
    steps = [
        {
            "name": name,
            "stage": stage,
            "label": label,
            "dir": f"steps/{place}",
            "key": "k",
            "reused": reused,
            "seconds": 12.0,
            "metrics": json.loads((folder / "steps" / place / "metrics.json").read_text()),
        }
        for name, stage, label, place, reused in entries
    ]
    (folder / "steps.json").write_text(json.dumps(steps))
    return steps
