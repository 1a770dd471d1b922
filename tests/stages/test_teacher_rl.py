"""Teacher RL with every algorithm and every reward, two steps each, on the real entrypoint."""

import math
from pathlib import Path

import pytest

from rlt.config.compose import config_dir
from rlt.report import read_scalars
from tests.cli import here, read, read_lines, stage
from tests.metrics_doc import documented

GROUPS = {
    group: sorted(f.stem for f in (config_dir() / group).glob("*.yaml") if f.stem[0] != "_")
    for group in ("algorithm", "reward")
}
SAMPLES = 2  # explanations that are written out at each step
Scalars = dict[str, list[float]]


@pytest.fixture
def train(base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Two steps from the base model; the run's scalars by name, its final metrics checked."""

    def run(*overrides: str) -> tuple[Path, Scalars]:
        folder = tmp_path / "run"
        short = ["datamodule.steps=2", "data.validation_fraction=0", "callbacks.progress=null"]
        short += ["rollout.max_new_tokens=8", f"teacher_path={base}", "output_dir=run"]
        monkeypatch.setattr("rlt.report.write_result", lambda run_dir: None)  # plots take seconds
        here(stage("teacher_rl", *short, *overrides), tmp_path, monkeypatch)
        metrics = read(folder / "metrics.json")
        assert all(documented(k) and math.isfinite(v) for k, v in metrics.items())
        scalars = {k: [v for _, v in points] for k, points in read_scalars(folder).items()}
        assert all(documented(name) for name in scalars)
        return folder, scalars

    return run


@pytest.mark.parametrize("algorithm", GROUPS["algorithm"])
def test_algorithm(train, algorithm: str) -> None:
    _, scalars = train(f"algorithm={algorithm}")
    assert "validation/reward" not in scalars  # nothing was held out
    assert scalars["policy/kl_old_k3"] == [0.0, 0.0]  # strictly on-policy
    assert scalars["policy/ratio"] == pytest.approx([1.0, 1.0])
    first, second = scalars["policy/grad_norm"]
    assert first > 0 and second > 0
    # Only an algorithm with a KL penalty asks for the reference's log-probs: 0 before the first
    # step, as reference and policy are the same then, more after it.
    if algorithm in ("grpo", "bnpo"):
        assert scalars["policy/kl_reference_k3"][0] == pytest.approx(0.0, abs=1e-6)
        assert scalars["policy/kl_reference_k3"][1] > 1e-5
    else:
        assert "policy/kl_reference_k3" not in scalars


@pytest.mark.parametrize("reward", GROUPS["reward"])
def test_reward(train, reward: str) -> None:
    folder, scalars = train(f"reward={reward}")
    terms = {n.split("/")[2] for n in scalars if n.startswith("train/reward_terms/")}
    expected = {
        "correctness": {"correctness"},
        "length": {"length"},
        "random": {"random"},
        "kl_only": {"thought_kl"},
        "solution_only": {"solution_log_prob"},
    }.get(reward, {"solution_log_prob", "thought_kl"})
    assert terms == expected | {"end_tag_penalty"}
    if reward == "length":  # 0.1 for each token before the end tag, less the penalty
        rows = read_lines(folder / "samples.jsonl")
        assert len(rows) == 2 * SAMPLES
        for row in rows:
            n_tokens = len(row["explanation"].split())
            assert row["reward"] == pytest.approx(0.1 * n_tokens - (row["finish"] != "stop"))


@pytest.mark.parametrize("exact", ["false", "true"])
def test_token_credit(train, exact: str) -> None:
    folder, scalars = train("credit=token", f"credit.exact={exact}", "credit.discount=0.9")
    first, second = scalars["policy/token_credit_fraction"]
    assert 0 < first <= 1 and 0 < second <= 1
    rows = read_lines(folder / "samples.jsonl")
    for row in rows:
        explanation = row["attribution"]["explanation"]
        advantages = row["attribution"].get("advantage", explanation)
        assert [token for token, _ in advantages] == [token for token, _ in explanation]
    assert any("advantage" in row["attribution"] for row in rows)


@pytest.mark.parametrize("correction", ["none", "tis", "mis"])
def test_sampling_in_bfloat16_is_corrected_and_its_mismatch_logged(train, correction: str) -> None:
    _, scalars = train(
        "rollout.linear_dtype=bfloat16", f"algorithm.correction={correction}",
        "algorithm.correction_cap=1.0001",
    )  # fmt: skip
    assert all(0 < kl < 0.01 for kl in scalars["policy/mismatch_kl"])
    assert all(1 < ratio < 2 for ratio in scalars["policy/mismatch_max_ratio"])
    # Of so narrow a bound nearly every token is out; the rest still has a loss that is finite.
    assert all(0.5 < rate <= 1 for rate in scalars["policy/mismatch_outside_rate"])
    assert all(math.isfinite(loss) for loss in scalars["policy/loss"])


def test_sampler_and_policy_are_one_by_default(train) -> None:
    _, scalars = train()
    assert not any(name.startswith("policy/mismatch") for name in scalars)


def test_published_credit_is_the_default(train) -> None:
    folder, scalars = train()
    assert scalars["policy/token_credit_fraction"] == [0.0, 0.0]
    rows = read_lines(folder / "samples.jsonl")
    assert ["advantage" in row["attribution"] for row in rows] == [False] * 2 * SAMPLES


def test_reference_moves(train) -> None:
    move = ["algorithm.reference_update_every_steps=1", "algorithm.reference_mix_up=1.0"]
    _, scalars = train(*move)
    # After every step the reference is the policy: their divergence is 0 again at the next.
    assert scalars["policy/kl_reference_k3"] == pytest.approx([0.0, 0.0], abs=1e-6)


def test_passes_and_minibatches(train) -> None:
    steps = ["algorithm.num_iterations=2", "algorithm.minibatches=2", "schedule=linear"]
    _, scalars = train(*steps)
    # 2 rollouts × 2 passes × 2 minibatches = 8 optimizer steps, lr falling to 0 over them; the
    # last one on the first rollout is the fourth: 1e-3 × (1 - 3/8), on the second 1e-3 × (1 - 7/8).
    assert scalars["policy/lr"] == pytest.approx([0.625e-3, 0.125e-3])
    first, second = scalars["policy/kl_old_k3"]
    assert first > 0 and second > 0  # off-policy after the first minibatch


def roles(folder: Path) -> set[str]:
    return set(read(folder / "manifest.json")["models"]["bytes_in_memory"])


def test_student_of_its_own(train, base: Path, chain: Path) -> None:
    other = chain / "teacher_sft" / "model"
    own = ["model@student=nano", "reward_student=student"]
    folder, _ = train(*own, f"student_path={other}")
    assert roles(folder) == {"teacher", "reference", "student"}


def test_same_weights_are_kept_once(train, base: Path) -> None:
    own = ["model@student=nano", "reward_student=student", f"student_path={base}"]
    folder, _ = train(*own)
    assert roles(folder) == {"teacher", "reference and student"}
    models = read(folder / "manifest.json")["models"]
    assert models["teacher"] == models["student"]


def test_no_reference_is_made_that_nothing_needs(train, base: Path) -> None:
    own = ["model@student=nano", "reward_student=student", f"student_path={base}"]
    folder, _ = train(*own, "algorithm=dr_grpo")
    assert roles(folder) == {"teacher", "student"}


def test_moving_reference_is_not_the_fixed_student(train, base: Path) -> None:
    own = ["model@student=nano", "reward_student=student", f"student_path={base}"]
    folder, _ = train(*own, "algorithm.reference_update_every_steps=1")
    assert roles(folder) == {"teacher", "reference", "student"}
    held = read(folder / "manifest.json")["models"]["bytes_in_memory"]
    assert held["student"] == held["reference"] == held["teacher"]  # no weight is shared
