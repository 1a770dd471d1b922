"""One policy update: prefixes shared against every row run whole; the gradients are the same.

"update" is all of `RL.update`: the reference's forward, the policy's forward and backward,
clipping, AdamW. "policy alone" leaves the reference's forward out.

    python -m benchmarks.update
"""

import contextlib
import sys
from collections.abc import Callable, Iterator, Sequence
from typing import Any
from unittest import mock

import torch
from torch import Tensor

from benchmarks.common import (
    alternate,
    parse,
    parser,
    publish,
    ratio,
    run_from_command_line,
    timing,
)
from benchmarks.floor import update_floor
from benchmarks.machine import machine_facts
from benchmarks.work import (
    Work,
    inside_fit,
    load,
    random_groups,
    rollout_of,
    teacher_rl,
)
from rlt.llm.logprobs import shares_prefixes
from rlt.training import RL
from rlt.training.rollout_batch import RolloutBatch

TOLERANCE = 1e-4


def main(argv: Sequence[str] | None = None) -> dict[str, Any]:
    """Run the benchmark and return what it publishes, as its JSON file holds it.

    Args:
        argv: the command line; None means `sys.argv[1:]`.
    """
    made = parser(__doc__)
    made.add_argument("--questions", type=int, default=2)
    made.add_argument("--completions", type=int, default=4, help="per question")
    made.add_argument("--prompt-tokens", type=int, default=390)
    made.add_argument("--new-tokens", type=int, default=128)
    args = parse(made, argv)
    # With a learning rate of 0 every update starts from the same weights.
    work = load("teacher_rl", args.model, [*args.overrides, "optim.lr=0"])
    machine = machine_facts(work.device, work.model.dtype)
    module = teacher_rl(work, steps=1000)
    group = random_groups(
        work.renderer, args.questions, args.completions, args.prompt_tokens, args.new_tokens
    )
    rollout = rollout_of(module, group, args.completions)
    seconds: dict[str, list[float]] = {}
    differences: list[float] = []

    def measure() -> None:
        arms = arms_of(module, rollout)
        differences.append(gradient_difference(work, arms["shared"], arms["unshared"]))
        if work.model.dtype == torch.float32 and differences[0] > TOLERANCE:
            raise AssertionError(f"gradients differ by {differences[0]:.3g}, relative")
        seconds.update(alternate(arms, args.repeats))

    inside_fit(work, module, measure)
    rows = [timing(arm, values) for arm, values in seconds.items()]
    medians = {row["arm"]: row["seconds"] for row in rows}
    least = {
        "shared": update_floor(work.model, group.rows, module.algorithm.needs_reference),
        "shared, policy alone": update_floor(work.model, group.rows, needs_reference=False),
    }
    rate = machine["matmul_flops_per_second"]
    return publish(
        "update", args, machine, rows,
        settings={
            "completions": len(group.rows), "prompt_tokens": group.prompt_tokens,
            "new_tokens": args.new_tokens,
        },
        ratios={
            "shared against unshared": ratio(seconds, "unshared", "shared"),
            "shared against unshared, policy alone": ratio(
                seconds, "unshared, policy alone", "shared, policy alone"
            ),
        },
        floor_seconds={arm: floor.flops / rate for arm, floor in least.items()},
        flops_utilisation={arm: f.flops / rate / medians[arm] for arm, f in least.items()},
        relative_difference_of_gradients=differences[0],
    )  # fmt: skip


def arms_of(module: RL, rollout: RolloutBatch) -> dict[str, Callable[[], Any]]:
    """Return the updates to compare, by name, with and without shared prefixes."""

    def update() -> None:
        module.update(rollout)

    def policy_alone() -> None:  # after an update, which has taken the reference's log-probs
        module.minibatch_step(rollout, list(range(len(rollout))))

    return {
        "unshared": lambda: run_unshared(update),
        "shared": update,
        "unshared, policy alone": lambda: run_unshared(policy_alone),
        "shared, policy alone": policy_alone,
    }


def run_unshared(run: Callable[[], None]) -> None:
    """Call `run` while no model shares prefixes."""
    with unshared_prefixes():
        run()


@contextlib.contextmanager
def unshared_prefixes() -> Iterator[None]:
    """No model shares prefixes, wherever rlt asks."""

    def no_model(model: Any) -> bool:
        return False

    with contextlib.ExitStack() as stack:
        for name, module in list(sys.modules.items()):
            ours = name == "rlt" or name.startswith("rlt.")
            if ours and getattr(module, "shares_prefixes", None) is shares_prefixes:
                patch = mock.patch.object(module, "shares_prefixes", no_model)
                stack.enter_context(patch)
        yield


def gradient_difference(work: Work, one: Callable[[], Any], other: Callable[[], Any]) -> float:
    """Norm of the difference of the gradients that two updates leave, relative to their norm."""

    def gradients(run: Callable[[], Any]) -> Tensor:
        run()
        return torch.cat([p.grad.flatten().clone() for p in work.model.parameters()])

    first, second = gradients(one), gradients(other)
    return float((first - second).norm() / second.norm())


if __name__ == "__main__":
    run_from_command_line(main)
