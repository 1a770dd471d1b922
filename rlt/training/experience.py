"""What one rollout gives the update to learn from, and what is told of it."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from rlt.data.dataset import Behaviour, behaviour_rates
from rlt.llm.batching import Row
from rlt.rewards import RewardTable
from rlt.rewards.monitors import repetition
from rlt.sampling import Completion
from rlt.training.tasks import Task, Written


@dataclass
class Experience:
    """N = P × G completions of one rollout, group after group."""

    rows: list[Row]
    completions: list[Completion]
    scored: Sequence[Written]
    log_probs: list[Tensor]
    table: RewardTable
    seconds: dict[str, float]

    @property
    def problems(self) -> list[str]:
        """The id of each completion's problem."""
        return [one.problem.id for one in self.scored]

    def metrics(self, behaviour: Behaviour | None) -> dict[str, float]:
        """Means over the completions.

        Args:
            behaviour: names what an explanation does; its shares are then told, too.
        """
        N = len(self.completions)
        values = {
            "completion_tokens": sum(len(c.ids) for c in self.completions) / N,
            "end_tag_rate": sum(one.closed for one in self.scored) / N,
            "overlong_rate": sum(c.finish == "length" for c in self.completions) / N,
        }
        for name, column in self.table.terms.items():
            values[f"reward_terms/{name}"] = sum(column) / N
        if behaviour is not None:
            values |= behaviour_rates(self.behaviours(behaviour), behaviour.names)
        return values

    def behaviours(self, behaviour: Behaviour) -> list[str]:
        """What each explanation does."""
        return [
            behaviour(one.problem.question, one.problem.solution, one.thought, one.closed)
            for one in self.scored
        ]

    def monitors(self, task: Task, group_size: int) -> dict[str, float]:
        """What tells reward hacking early; see `rlt.rewards.monitors`."""
        N = len(self.scored)
        return {
            "repetition": sum(repetition(one.text) for one in self.scored) / N,
            "tag_failures": 1 - sum(one.closed for one in self.scored) / N,
            **task.monitor(self.scored, group_size),
        }

    def samples(self, task: Task, count: int, advantages_NT: Tensor) -> list[dict[str, Any]]:
        """The best and the worst completions, with their texts, reward terms and advantages."""
        order = sorted(range(len(self.rows)), key=lambda n: -self.table.rewards[n])
        half = (count + 1) // 2
        picked = order[:half] + order[len(order) - (count - half) :]
        return [
            {
                "problem_id": self.scored[n].problem.id,
                "question": self.scored[n].problem.question,
                "solution": self.scored[n].problem.solution,
                task.kind: self.scored[n].text,
                "finish": self.completions[n].finish,
                **self.table.row(n),
                **task.details(self.scored[n], self.table, n, advantages_NT[n]),
            }
            for n in picked
        ]
