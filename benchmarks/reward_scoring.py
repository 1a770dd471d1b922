"""Rewarding explanations: rlt's scorer against the published way, which gives the same rewards.

The published way (`benchmarks.peers`) runs student and teacher on one completion after the other,
with logits over the whole vocabulary at every place. rlt runs the student once per micro-batch,
each prompt once, and the head where it is needed; the teacher's half comes with the rollout in
float32 ("scorer"), and from one more forward in lower precision ("scorer and teacher"). Both ways
run in processes of their own, in turn, with one round to warm up and `--steps` timed ones.

    python -m benchmarks.reward_scoring
"""

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import torch

from benchmarks.common import (
    alternate,
    arm_options,
    leave,
    parse,
    parser,
    publish,
    ratio,
    run_arms,
    run_from_command_line,
    timing,
)
from benchmarks.floor import scoring_floor
from benchmarks.machine import machine_facts
from benchmarks.peers import one_by_one_rewards
from benchmarks.work import (
    compose_stage,
    device_for,
    load,
    random_groups,
    scored_of,
    scorer_of,
    teacher_rl,
)

PEER = "one by one, full logits"
OURS = ("scorer and teacher", "scorer")
TOLERANCE = 1e-3


def main(argv: Sequence[str] | None = None) -> dict[str, Any]:
    """Run the benchmark and return what it publishes, as its JSON file holds it.

    In the process of a single arm, only that arm runs and the result is empty.

    Args:
        argv: the command line; None means `sys.argv[1:]`.

    Raises:
        AssertionError: the arms disagree on the rewards by more than `TOLERANCE` in float32.
    """
    made = parser(__doc__)
    arm_options(made)
    made.add_argument("--questions", type=int, default=2)
    made.add_argument("--completions", type=int, default=4, help="per question")
    made.add_argument("--prompt-tokens", type=int, default=390)
    made.add_argument("--new-tokens", type=int, default=128, help="of an explanation")
    args = parse(made, argv)
    if args.arm:
        leave(args.arm_file, run_arm(args))
        return {}
    cfg = compose_stage("teacher_rl", args.model, args.overrides)
    dtype = getattr(torch, cfg.hardware.dtype)
    machine = machine_facts(device_for(cfg), dtype)
    found = run_arms("reward_scoring", args, ["peer", "rlt"])
    told = found["rlt"][0]
    difference = largest_difference(found)
    if dtype == torch.float32 and difference > TOLERANCE:
        raise AssertionError(f"rewards differ by {difference:.3g}, more than {TOLERANCE}")
    seconds = {
        arm: [s for run in found["peer" if arm == PEER else "rlt"] for s in run["seconds"][arm]]
        for arm in (PEER, *OURS)
    }
    N = args.questions * args.completions
    rows = [timing(arm, values) for arm, values in seconds.items()]
    rows = [row | {"seconds_per_completion": row["seconds"] / N} for row in rows]
    least = told["flops"] / machine["matmul_flops_per_second"]
    return publish(
        "reward_scoring", args, machine, rows,
        settings={
            "steps": args.steps, "completions": N, "prompt_tokens": told["prompt_tokens"],
            "new_tokens": args.new_tokens,
        },
        ratios={f"{arm} against one by one": ratio(seconds, PEER, arm) for arm in OURS},
        floor_seconds=least,
        flops_utilisation={"scorer": least / rows[-1]["seconds"]},
        largest_difference_of_rewards=difference,
    )  # fmt: skip


def largest_difference(found: dict[str, list[dict[str, Any]]]) -> float:
    """Return the largest absolute difference between a reward of rlt and that of the peer."""
    [expected] = found["peer"][0]["rewards"].values()
    return max(
        abs(a - b)
        for rewards in found["rlt"][0]["rewards"].values()
        for a, b in zip(rewards, expected, strict=True)
    )


# --- the arms, each in its own process ------------------------------------------------------------


def run_arm(args: Any) -> dict[str, Any]:
    """Score the same completions in each way of one arm.

    Returns:
        The rewards and the seconds of each way, by its name.
    """
    work = load("teacher_rl", args.model, args.overrides, prepared=args.arm == "rlt")
    module = teacher_rl(work, steps=1)
    group = random_groups(
        work.renderer, args.questions, args.completions, args.prompt_tokens, args.new_tokens
    )
    reward_scorer = scorer_of(module)
    scored = scored_of(module, group, module.row_log_probs(module.policy, group.rows))

    def published() -> list[float]:
        return one_by_one_rewards(
            work.model, reward_scorer.student, work.renderer, group.problems,
            [ids for _, ids in group.rows], reward_scorer.temperature,
        )  # fmt: skip

    def scorer() -> list[float]:
        return reward_scorer(scored, teacher=work.model).rewards

    def scorer_and_teacher() -> list[float]:
        log_probs = module.row_log_probs(work.model, group.rows)
        rows = [
            replace(one, teacher_log_probs_T=values)
            for one, values in zip(scored, log_probs, strict=True)
        ]
        return reward_scorer(rows, teacher=work.model).rewards

    ways: dict[str, Callable[[], list[float]]] = {PEER: published}
    if args.arm == "rlt":
        ways = dict(zip(OURS, (scorer_and_teacher, scorer), strict=True))
    rewards: dict[str, list[float]] = {}

    def run(name: str) -> None:
        rewards[name] = ways[name]()

    return {
        "seconds": alternate({name: partial(run, name) for name in ways}, args.steps),
        "rewards": rewards,
        "prompt_tokens": group.prompt_tokens,
        "flops": scoring_floor(reward_scorer.student, group.student_rows).flops,
    }


if __name__ == "__main__":
    run_from_command_line(main)
