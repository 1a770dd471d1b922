"""Rewarding explanations: rlt's scorer against the published way, which gives the same rewards.

The published way (`benchmarks.peers`) runs student and teacher on one completion after the other,
with logits over the whole vocabulary at every place. rlt runs the student once per micro-batch,
each prompt once, and the head where it is needed; the teacher's half comes with the rollout in
float32 ("scorer"), and from one more forward in lower precision ("scorer and teacher").

    python -m benchmarks.reward_scoring
"""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch

from benchmarks.common import (
    alternate,
    parse,
    parser,
    publish,
    ratio,
    run_from_command_line,
    timing,
)
from benchmarks.floor import scoring_floor
from benchmarks.machine import machine_facts
from benchmarks.peers import one_by_one_rewards
from benchmarks.work import experience_of, load, random_groups, teacher_rl

TOLERANCE = 1e-3


def main(argv: Sequence[str] | None = None) -> dict[str, Any]:
    made = parser(__doc__)
    made.add_argument("--questions", type=int, default=2)
    made.add_argument("--completions", type=int, default=4, help="per question")
    made.add_argument("--prompt-tokens", type=int, default=390)
    made.add_argument("--new-tokens", type=int, default=128, help="of an explanation")
    args = parse(made, argv)
    work = load("teacher_rl", args.model, args.overrides)
    machine = machine_facts(work.device, work.model.dtype)
    module = teacher_rl(work, steps=1)
    group = random_groups(
        work.views, args.questions, args.completions, args.prompt_tokens, args.new_tokens
    )
    scored = experience_of(module, group).scored
    completions = [ids for _, ids in group.rows]

    def published() -> list[float]:
        return one_by_one_rewards(
            work.model, module.scorer.student, work.views, group.problems, completions,
            module.scorer.temperature,
        )  # fmt: skip

    def scorer() -> list[float]:
        return module.scorer(scored, teacher=work.model).rewards

    def scorer_and_teacher() -> list[float]:
        log_probs = module.row_log_probs(work.model, group.rows)
        rows = [
            replace(one, teacher_log_probs_T=values)
            for one, values in zip(scored, log_probs, strict=True)
        ]
        return module.scorer(rows, teacher=work.model).rewards

    expected = published()
    difference = max(
        abs(a - b)
        for found in (scorer(), scorer_and_teacher())
        for a, b in zip(found, expected, strict=True)
    )
    if work.model.dtype == torch.float32 and difference > TOLERANCE:
        raise AssertionError(f"rewards differ by {difference:.3g}, more than {TOLERANCE}")
    peer = "one by one, full logits"
    arms = {peer: published, "scorer and teacher": scorer_and_teacher, "scorer": scorer}
    seconds = alternate(arms, args.repeats)
    rows = [timing(arm, values) for arm, values in seconds.items()]
    for row in rows:
        row["seconds_per_completion"] = row["seconds"] / len(scored)
    floor = scoring_floor(module.scorer.student, group.student_rows)
    least = floor.flops / machine["matmul_flops_per_second"]
    return publish(
        "reward_scoring", args, machine, rows,
        settings={
            "completions": len(scored), "prompt_tokens": group.prompt_tokens,
            "new_tokens": args.new_tokens,
        },
        ratios={
            "scorer against one by one": ratio(seconds, peer, "scorer"),
            "scorer and teacher against one by one": ratio(seconds, peer, "scorer and teacher"),
        },
        floor_seconds=least,
        flops_utilisation={"scorer": least / rows[-1]["seconds"]},
        largest_difference_of_rewards=difference,
    )  # fmt: skip


if __name__ == "__main__":
    run_from_command_line(main)
