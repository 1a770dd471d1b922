"""A whole teacher-RL step, rollout → reward → update: rlt against trl's GRPOTrainer.

Both train the same model on the same prompts with completions of the same length, the paper's
reward, β = 0.04 and AdamW; trl's reward is scored the published way, one completion at a time, and
its update takes all completions at once, rlt's by `hardware.tokens_per_micro_batch`. Each arm runs
in processes of its own, in turn: `--repeats` processes an arm, each with one step to warm up and
`--steps` timed ones.

    python -m benchmarks.teacher_rl_step
    python -m benchmarks.teacher_rl_step --lora     # both once more, with the same LoRA adapter

The floor of a step, at the rates measured in this run: prompts of the rollout, each once, at the
matrix-product rate; its token steps, each reading all weights and every row's keys and values, at
the memory's rate; one forward of the student; one of the reference; forward and backward (three
forwards) of the policy, each with shared prefixes. AdamW counts as nothing.
"""

import statistics
from collections.abc import Sequence
from typing import Any

import torch

from benchmarks.common import (
    WITH_LORA,
    against_peer,
    leave,
    parse,
    parser,
    peer,
    peer_and_rlt,
    peer_options,
    publish,
    run_arms,
    run_from_command_line,
    timing,
)
from benchmarks.floor import Floor, decode_floor, prefill_floor, scoring_floor, update_floor
from benchmarks.machine import machine_facts
from benchmarks.peers import grpo_steps
from benchmarks.work import (
    StepClock,
    Work,
    compose_stage,
    device_for,
    endless,
    fit,
    load,
    problems_of,
    random_groups,
    teacher_rl,
)

PHASES = ("rollout", "reward", "update")


def main(argv: Sequence[str] | None = None) -> dict[str, Any]:
    """Run the benchmark and return what it publishes, as its JSON file holds it.

    In the process of a single arm, only that arm runs and the result is empty.

    Args:
        argv: the command line; None means `sys.argv[1:]`.
    """
    made = parser(__doc__)
    peer_options(made)
    made.add_argument("--questions", type=int, default=2)
    made.add_argument("--completions", type=int, default=4, help="per question")
    made.add_argument("--prompt-tokens", type=int, default=390)
    made.add_argument("--new-tokens", type=int, default=128)
    made.add_argument("--lora", action="store_true", help="also measure both with adapter=lora")
    args = parse(made, argv)
    if args.arm:
        adapter = ["adapter=lora"] if args.arm.endswith(WITH_LORA) else []
        run = run_rlt if args.arm.startswith("rlt") else run_trl
        leave(args.arm_file, run(args, adapter))
        return {}
    cfg = compose_stage("teacher_rl", args.model, args.overrides)
    machine = machine_facts(device_for(cfg), getattr(torch, cfg.hardware.dtype))
    plain = peer_and_rlt()
    arms = [*plain, *(f"{arm}{WITH_LORA}" for arm in plain if args.lora)]
    found = run_arms("teacher_rl_step", args, arms)
    rows = [line(arm, runs) for arm, runs in found.items()]
    ours, told = rows[len(plain) - 1], found["rlt"][0]
    rates = machine["matmul_flops_per_second"], machine["read_bytes_per_second"]
    floors = {
        phase: sum(Floor(*part).seconds(*rates) for part in parts)
        for phase, parts in told["floor"].items()
    }
    ratios = against_peer(rows[: len(plain)], "seconds a step")
    if args.lora:
        adapted = rows[-1]
        ratios |= {
            f"with LoRA: {name}": value
            for name, value in against_peer(rows[len(plain) :], "seconds a step").items()
        }
        ratios["rlt with LoRA, seconds of a full step"] = adapted["seconds"] / ours["seconds"]
        ratios["rlt with LoRA, peak of a full step"] = adapted["peak_gb"] / ours["peak_gb"]
    ratios["rlt against the floor"] = ours["seconds"] / sum(floors.values())
    ratios |= {f"{phase} against its floor": ours[phase] / floors[phase] for phase in PHASES}
    return publish(
        "teacher_rl_step", args, machine, rows, ratios=ratios,
        settings={
            "steps": args.steps, "completions": args.questions * args.completions,
            "prompt_tokens": told["prompt_tokens"], "new_tokens": args.new_tokens,
            "peer_checkpointing": args.peer_checkpointing,
        },
        floor_seconds={**floors, "step": sum(floors.values())},
        peer=peer(),
    )  # fmt: skip


def line(arm: str, runs: list[dict[str, Any]]) -> dict[str, Any]:
    """Medians over the steps of all processes, less the first step of each."""
    steps = [step for run in runs for step in run["steps"][1:]]
    phases = {phase: statistics.median(step[phase] for step in steps) for phase in PHASES}
    peak = max(run["peak_bytes"] for run in runs) / 1e9
    return timing(arm, [step["seconds"] for step in steps]) | phases | {"peak_gb": peak}


# --- the arms, each in its own process ------------------------------------------------------------


def load_work(args: Any, *overrides: str, prepared: bool = True) -> Work:
    """Load the teacher with the group size and the completion length that `args` names.

    Args:
        prepared: whether `hardware` prepares the process, as in a run of rlt.
    """
    lengths = [
        f"rollout.max_new_tokens={args.new_tokens}",
        f"module.group_size={args.completions}",
    ]
    return load("teacher_rl", args.model, [*lengths, *overrides, *args.overrides], prepared)


def run_rlt(args: Any, adapter: list[str]) -> dict[str, Any]:
    """Train with rlt and return the seconds of each step and the least work of each phase.

    The least work is a list of (FLOPs, bytes read) for each phase.
    """
    work, clock = load_work(args, *adapter), StepClock()
    module = teacher_rl(work, args.steps + 1)
    problems = problems_of(work.renderer, args.questions, args.prompt_tokens)
    with endless(work.tokenizer):
        fit(work, module, problems, args.steps + 1, [clock])
    written = float(module.trainer.callback_metrics["train/completion_tokens"])
    assert written == args.new_tokens, "completions differ in length"
    group = random_groups(
        work.renderer, args.questions, args.completions, args.prompt_tokens, args.new_tokens
    )
    model = work.model
    floors = {
        "rollout": [prefill_floor(model, group.rows), decode_floor(model, group.rows)],
        "reward": [scoring_floor(model, group.student_rows)],
        "update": [update_floor(model, group.rows, module.algorithm.needs_reference)],
    }
    return {
        "steps": clock.steps,
        "prompt_tokens": group.prompt_tokens,
        "floor": {name: [(f.flops, f.bytes_read) for f in fs] for name, fs in floors.items()},
    }


def run_trl(args: Any, adapter: list[str]) -> dict[str, Any]:
    """Train with trl on prompts of the same lengths and return the seconds of each step."""
    checkpointing = ["hardware.gradient_checkpointing=true"] if args.peer_checkpointing else []
    steps = grpo_steps(
        load_work(args, *checkpointing, *adapter, prepared=False), args.questions, args.completions,
        args.prompt_tokens, args.new_tokens, args.steps + 1,
    )  # fmt: skip
    return {"steps": steps}


if __name__ == "__main__":
    run_from_command_line(main)
