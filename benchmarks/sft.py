"""Supervised fine-tuning: tokens per second and peak memory, rlt against trl's SFTTrainer.

Both train on the same rows of random ids at every step, with loss on the targets alone; trl takes
them in one micro-batch, rlt by `hardware.tokens_per_micro_batch`. Each arm runs in processes of its
own, in turn, as in `benchmarks.teacher_rl_step`.
Tokens are all of a row's, prompt and target.

    python -m benchmarks.sft
    python -m benchmarks.sft --lora     # both once more, with the same LoRA adapter
"""

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
from benchmarks.floor import update_floor
from benchmarks.machine import machine_facts
from benchmarks.peers import sft_steps
from benchmarks.work import StepClock, Work, compose_stage, device_for, fit, load, random_ids, sft
from rlt.training import Example


def main(argv: Sequence[str] | None = None) -> dict[str, Any]:
    """Run the benchmark and return what it publishes, as its JSON file holds it.

    In the process of a single arm, only that arm runs and the result is empty.

    Args:
        argv: the command line; None means `sys.argv[1:]`.
    """
    made = parser(__doc__)
    peer_options(made)
    made.add_argument("--rows", type=int, default=8)
    made.add_argument("--prompt-tokens", type=int, default=100)
    made.add_argument("--target-tokens", type=int, default=130)
    made.add_argument("--lora", action="store_true", help="also measure both with adapter=lora")
    args = parse(made, argv)
    if args.arm:
        adapter = ["adapter=lora"] if args.arm.endswith(WITH_LORA) else []
        run = run_rlt if args.arm.startswith("rlt") else run_trl
        leave(args.arm_file, run(args, adapter))
        return {}
    cfg = compose_stage("teacher_sft", args.model, args.overrides)
    machine = machine_facts(device_for(cfg), getattr(torch, cfg.hardware.dtype))
    plain = peer_and_rlt()
    found = run_arms("sft", args, [*plain, *(f"{arm}{WITH_LORA}" for arm in plain if args.lora)])
    tokens = args.rows * (args.prompt_tokens + args.target_tokens)
    rows = []
    for arm, runs in found.items():
        row = timing(arm, [seconds for run in runs for seconds in run["steps"][1:]])
        row["tokens_per_second"] = tokens / row["seconds"]
        rows.append(row | {"peak_gb": max(run["peak_bytes"] for run in runs) / 1e9})
    floor = found["rlt"][0]["flops"] / machine["matmul_flops_per_second"]
    ratios = against_peer(rows[: len(plain)], "tokens per second")
    ratios["rlt against the floor"] = rows[len(plain) - 1]["seconds"] / floor
    if args.lora:
        ratios |= {
            f"with LoRA: {name}": value
            for name, value in against_peer(rows[len(plain) :], "tokens per second").items()
        }
    names = ("rows", "prompt_tokens", "target_tokens", "steps", "peer_checkpointing")
    return publish(
        "sft", args, machine, rows, ratios=ratios, floor_seconds=floor, peer=peer(),
        settings={name: getattr(args, name) for name in names},
    )  # fmt: skip


# --- the arms, each in its own process ------------------------------------------------------------


def examples_of(work: Work, args: Any) -> list[Example]:
    """Return examples of random token ids with exactly the lengths that `args` names."""
    whole = random_ids(work.tokenizer, args.rows, args.prompt_tokens + args.target_tokens)
    return [
        Example(ids[: args.prompt_tokens], ids[args.prompt_tokens :], f"row {n}")
        for n, ids in enumerate(whole)
    ]


def run_rlt(args: Any, adapter: list[str]) -> dict[str, Any]:
    """Train with rlt and return the seconds of each step and the FLOPs that a step needs."""
    work, clock = load("teacher_sft", args.model, [*args.overrides, *adapter]), StepClock()
    examples = examples_of(work, args)
    fit(work, sft(work, args.steps + 1), examples, args.steps + 1, [clock])
    rows = [(example.prompt, example.target) for example in examples]
    floor = update_floor(work.model, rows, needs_reference=False)
    return {"steps": [step["seconds"] for step in clock.steps], "flops": floor.flops}


def run_trl(args: Any, adapter: list[str]) -> dict[str, Any]:
    """Train with trl on the same examples and return the seconds of each step."""
    checkpointing = ["hardware.gradient_checkpointing=true"] if args.peer_checkpointing else []
    work = load(
        "teacher_sft", args.model, [*args.overrides, *checkpointing, *adapter], prepared=False
    )
    return {"steps": sft_steps(work, examples_of(work, args), args.steps + 1)}


if __name__ == "__main__":
    run_from_command_line(main)
