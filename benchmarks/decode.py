"""Sampling: rlt's rollout against plain `generate`, in milliseconds per token step.

Plain `generate` gets each prompt once per completion and grows a `DynamicCache`. The rollout runs
a prompt once, writes keys and values in place, looks for the stop string and returns log-probs.

    python -m benchmarks.decode
    python -m benchmarks.decode --completions 16
"""

import statistics
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from transformers import GenerationConfig

from benchmarks.common import (
    alternate,
    parse,
    parser,
    publish,
    ratio,
    run_from_command_line,
    timing,
)
from benchmarks.floor import decode_floor
from benchmarks.machine import machine_facts
from benchmarks.work import NEVER, Work, endless, load, problems_of
from rlt.config.build import build
from rlt.sampling import HFRollout


def main(argv: Sequence[str] | None = None) -> dict[str, Any]:
    """Run the benchmark and return what it publishes, as its JSON file holds it.

    Args:
        argv: the command line; None means `sys.argv[1:]`.
    """
    made = parser(__doc__)
    made.add_argument("--questions", type=int, default=2)
    made.add_argument("--completions", type=int, nargs="+", default=[4, 16], help="per question")
    made.add_argument("--prompt-tokens", type=int, default=390)
    made.add_argument("--new-tokens", type=int, default=128, help="at least 2")
    args = parse(made, argv)
    work = load("teacher_rl", args.model, args.overrides)
    machine = machine_facts(work.device, work.model.dtype)
    problems = problems_of(work.renderer, args.questions, args.prompt_tokens)
    prompts = [work.renderer.teacher_prompt(problem) for problem in problems]
    rate, bandwidth = machine["matmul_flops_per_second"], machine["read_bytes_per_second"]
    rows, ratios, floors = [], {}, {}
    for G in args.completions:
        B = G * len(prompts)
        seconds = time_arms(work, prompts, G, args.new_tokens, args.repeats)
        steps: dict[str, float] = {}
        for arm in ("generate", "rollout"):
            first = statistics.median(seconds[f"{arm}, first token"])
            row = timing(f"{arm}, {B} rows", seconds[arm]) | {"first_token_seconds": first}
            steps[arm] = 1000 * (row["seconds"] - first) / (args.new_tokens - 1)
            rows.append(row | {"ms_per_token_step": steps[arm]})
        completions = [(prompt, range(args.new_tokens)) for prompt in prompts for _ in range(G)]
        floor = decode_floor(work.model, completions)
        floors[f"{B} rows"] = 1000 * floor.seconds(rate, bandwidth) / (args.new_tokens - 1)
        ratios[f"rollout against generate, {B} rows"] = ratio(seconds, "generate", "rollout")
        ratios[f"token step, {B} rows"] = steps["generate"] / steps["rollout"]
        ratios[f"token step of the rollout against the floor, {B} rows"] = (
            steps["rollout"] / floors[f"{B} rows"]
        )
    return publish(
        "decode", args, machine, rows, ratios=ratios, floor_ms_per_token_step=floors,
        settings={"prompt_tokens": [len(p) for p in prompts], "new_tokens": args.new_tokens},
    )  # fmt: skip


def time_arms(
    work: Work, prompts: list[list[int]], G: int, new_tokens: int, repeats: int
) -> dict[str, list[float]]:
    """Seconds of all tokens by arm, and of the first one, which the prompts are run for."""
    with endless(work.tokenizer) as beyond:
        arms: dict[str, Callable[[], Any]] = {}
        for name, tokens in {"": new_tokens, ", first token": 1}.items():
            rollout = build(work.cfg.rollout, max_new_tokens=tokens)
            arms[f"generate{name}"] = partial(generate, work, prompts, G, tokens, beyond)
            arms[f"rollout{name}"] = partial(sample, work, rollout, prompts, G)
        return alternate(arms, repeats)


def sample(work: Work, rollout: HFRollout, prompts: list[list[int]], G: int) -> None:
    """Sample `G` completions of full length for each prompt with rlt's own rollout."""
    groups = rollout.sample(work.model, work.tokenizer, prompts, G, NEVER)
    assert all(len(c.ids) == rollout.max_new_tokens for group in groups for c in group)


@torch.no_grad()
def generate(work: Work, prompts: list[list[int]], G: int, new_tokens: int, beyond: int) -> None:
    """What transformers does when it is handed the batch."""
    pad, P = work.tokenizer.pad_token_id, max(map(len, prompts))
    rows = [prompt for prompt in prompts for _ in range(G)]
    sequences = work.model.generate(
        input_ids=torch.tensor([[pad] * (P - len(p)) + p for p in rows], device=work.device),
        attention_mask=torch.tensor(
            [[0] * (P - len(p)) + [1] * len(p) for p in rows], device=work.device
        ),
        generation_config=GenerationConfig(
            do_sample=True, temperature=work.cfg.rollout.temperature, top_k=0, top_p=1.0,
            max_new_tokens=new_tokens, pad_token_id=pad, eos_token_id=beyond,
        ),
    )  # fmt: skip
    assert sequences.shape == (len(rows), P + new_tokens)


if __name__ == "__main__":
    run_from_command_line(main)
