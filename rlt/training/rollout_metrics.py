"""What is logged of a rollout: means over its completions, monitors of hacking, samples."""

from typing import Any

from rlt.data.dataset import Behaviour, behaviour_rates
from rlt.rewards.monitors import repetition
from rlt.training.rollout_batch import RolloutBatch
from rlt.training.tasks import Task


def completion_metrics(rollout: RolloutBatch, behaviour: Behaviour | None) -> dict[str, float]:
    """Means over the completions: tokens, rates in [0, 1], reward terms, rates of behaviours.

    Args:
        rollout: scored completions.
        behaviour: names what an explanation does; None leaves these rates out.
    """
    N = len(rollout)
    values = {
        "completion_tokens": sum(rollout.lengths) / N,
        "end_tag_rate": sum(parsed.closed for parsed in rollout.parsed) / N,
        "overlong_rate": sum(c.finish == "length" for c in rollout.completions) / N,
    }
    for name, column in rollout.reward_table.terms.items():
        values[f"reward_terms/{name}"] = sum(column) / N
    if behaviour is not None:
        values |= behaviour_rates(behaviours(rollout, behaviour), behaviour.names)
    return values


def behaviours(rollout: RolloutBatch, behaviour: Behaviour) -> list[str]:
    """What each completion's thought does, as the classifier names it."""
    return [
        behaviour(problem.question, problem.solution, parsed.thought, parsed.closed)
        for problem, parsed in zip(rollout.problems, rollout.parsed, strict=True)
    ]


def hacking_monitors(rollout: RolloutBatch, task: Task) -> dict[str, float]:
    """Numbers that tell reward hacking early (see `rlt.rewards.monitors`), the task's included."""
    N = len(rollout)
    return {
        "repetition": sum(repetition(parsed.text) for parsed in rollout.parsed) / N,
        "tag_failures": 1 - sum(parsed.closed for parsed in rollout.parsed) / N,
        **task.monitor(rollout),
    }


def best_and_worst(rollout: RolloutBatch, task: Task, count: int) -> list[dict[str, Any]]:
    """The `count` best and worst completions: texts, reward terms, the task's details."""
    rewards = rollout.reward_table.rewards
    order = sorted(range(len(rollout)), key=lambda n: -rewards[n])
    half = (count + 1) // 2
    picked = order[:half] + order[len(order) - (count - half) :]
    return [
        {
            "problem_id": rollout.problems[n].id,
            "question": rollout.problems[n].question,
            "solution": rollout.problems[n].solution,
            task.kind: rollout.parsed[n].text,
            "finish": rollout.completions[n].finish,
            **rollout.reward_table.row(n),
            **task.details(rollout, n),
        }
        for n in picked
    ]
