"""What scoring and update cost as one thing grows: group, completion, vocabulary, model.

Random Llamas that need no download, with one word a token. A line changes what it names; all else
is as in the line "base", whose sizes stand under the table. Scoring is the reward of all
completions with the policy's log-probs known; the update is all of `RL.update`.
"Utilisation" is their arithmetic over their seconds, as a share of the rate of matrix products.

    python -m benchmarks.scaling
"""

import statistics
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from omegaconf import DictConfig

from benchmarks.common import (
    alternate,
    parse,
    parser,
    publish,
    run_from_command_line,
)
from benchmarks.floor import scoring_floor, update_floor
from benchmarks.machine import machine_facts
from benchmarks.work import (
    NEVER,
    Work,
    compose_stage,
    device_for,
    inside_fit,
    random_groups,
    rollout_of,
    scored_of,
    scorer_of,
    teacher_rl,
)
from rlt.config.build import build
from rlt.data.renderer import Renderer
from rlt.llm.device import on_device
from rlt.llm.digit_words import vocabulary
from rlt.llm.random_llama import RandomLlama
from rlt.llm.tokenizers import words


@dataclass(frozen=True)
class Point:
    """One line of the table."""

    completions: int
    new_tokens: int
    prompt_tokens: int
    vocabulary: int
    hidden_size: int
    layers: int


BASE = Point(4, 128, 256, 16384, 256, 6)
CHANGES: list[dict[str, int]] = [
    {},
    *({"completions": G} for G in (2, 8, 16)),
    *({"new_tokens": C} for C in (32, 64, 256)),
    *({"vocabulary": V} for V in (1024, 49152, 151936)),
    *({"hidden_size": D, "layers": L} for D, L in ((128, 4), (512, 8), (768, 12))),
]
TINY = Point(2, 8, 32, 64, 32, 2)
TINY_CHANGES: list[dict[str, int]] = [
    {}, {"completions": 4}, {"new_tokens": 16}, {"vocabulary": 256}, {"hidden_size": 64}
]  # fmt: skip
QUESTIONS = 2


def main(argv: Sequence[str] | None = None) -> dict[str, Any]:
    """Run the benchmark and return what it publishes, as its JSON file holds it.

    Args:
        argv: the command line; None means `sys.argv[1:]`.
    """
    made = parser(__doc__, model="random")
    made.description = f"{made.description}\n--model is random, or nano for tiny sizes."
    args = parse(made, argv)
    if args.model not in ("random", "nano"):
        made.error(f"--model={args.model}: choose random or nano, sizes are this benchmark's own")
    cfg = compose_stage("teacher_rl", "nano", [*args.overrides, "optim.lr=0", "prompt=compact"])
    build(cfg.hardware).prepare()
    machine = machine_facts(device_for(cfg), getattr(torch, cfg.hardware.dtype))
    rate, rows = machine["matmul_flops_per_second"], []
    base, changes = (TINY, TINY_CHANGES) if args.model == "nano" else (BASE, CHANGES)
    for change in changes:
        label = ", ".join(f"{name.replace('_', ' ')} {value}" for name, value in change.items())
        found = measure(cfg, replace(base, **change), args.repeats, rate)
        rows.append({"arm": label or "base", **found})
    return publish("scaling", args, machine, rows, settings={"questions": QUESTIONS, **vars(base)})


def load(cfg: DictConfig, point: Point) -> Work:
    """Build a randomly initialised model of the sizes in `point`, on the config's device."""
    own = vocabulary()  # digits, tags and special tokens; the rest are words that nothing says
    more = map(str, range(10, 10 + point.vocabulary - len(own)))
    made = RandomLlama(
        partial(words, [*own, *more]), hidden_size=point.hidden_size, layers=point.layers,
        heads=point.hidden_size // 32, intermediate_size=3 * point.hidden_size, max_tokens=4096,
        initializer_range=0.02, seed=0, tie_embeddings=True, dtype=cfg.hardware.dtype,
        attention=cfg.hardware.attention,
    ).load()  # fmt: skip
    renderer = Renderer(build(cfg.prompt), made.tokenizer)
    renderer.stop = NEVER
    return Work(cfg, on_device(made.model, device_for(cfg)), renderer)


def measure(cfg: DictConfig, point: Point, repeats: int, rate: float) -> dict[str, Any]:
    """Median seconds of scoring and of the update, and their share of the machine's rate."""
    cfg = cfg.copy()
    cfg.module.group_size = point.completions
    work = load(cfg, point)
    module = teacher_rl(work, steps=1000)
    group = random_groups(
        work.renderer, QUESTIONS, point.completions, point.prompt_tokens, point.new_tokens
    )
    rollout = rollout_of(module, group, point.completions)
    scored = scored_of(module, group, rollout.log_probs)
    arms = {
        "scoring": lambda: scorer_of(module)(scored, teacher=work.model),
        "update": lambda: module.update(rollout),
    }
    seconds: dict[str, list[float]] = {}
    inside_fit(work, module, lambda: seconds.update(alternate(arms, repeats)))
    needs_reference = module.algorithm.needs_reference
    floors = {
        "scoring": scoring_floor(work.model, group.student_rows),
        "update": update_floor(work.model, group.rows, needs_reference),
    }
    found: dict[str, Any] = {"parameters": sum(p.numel() for p in work.model.parameters())}
    for arm, values in seconds.items():
        median = statistics.median(values)
        found[f"{arm}_seconds"] = median
        found[f"{arm}_utilisation"] = floors[arm].flops / median / rate
    return found


if __name__ == "__main__":
    run_from_command_line(main)
