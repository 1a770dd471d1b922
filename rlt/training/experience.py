"""What one rollout gives the update to learn from, and what is told of it."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from rlt.data.dataset import Behaviour, behaviour_shares
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
    judged: Sequence[Written]
    log_probs: list[Tensor]
    table: RewardTable
    seconds: dict[str, float]

    @property
    def problems(self) -> list[str]:
        """The id of each completion's problem."""
        return [one.problem.id for one in self.judged]

    def metrics(self, behaviour: Behaviour | None) -> dict[str, float]:
        """Means over the completions.

        Args:
            behaviour: names what an explanation does; its shares are then told, too.
        """
        N = len(self.completions)
        values = {
            "completion_tokens": sum(len(c.ids) for c in self.completions) / N,
            "end_tag_share": sum(one.closed for one in self.judged) / N,
            "overlong_share": sum(c.finish == "length" for c in self.completions) / N,
        }
        for name, column in self.table.terms.items():
            values[f"reward_terms/{name}"] = sum(column) / N
        if behaviour is not None:
            values |= behaviour_shares(self.behaviours(behaviour), behaviour.names)
        return values

    def behaviours(self, behaviour: Behaviour) -> list[str]:
        """What each explanation does."""
        return [
            behaviour(one.problem.question, one.problem.solution, one.thought, one.closed)
            for one in self.judged
        ]

    def monitors(self, task: Task, completions_per_problem: int) -> dict[str, float]:
        """What tells reward hacking early; see `rlt.rewards.monitors`."""
        N = len(self.judged)
        return {
            "repetition": sum(repetition(one.text) for one in self.judged) / N,
            "tag_failures": 1 - sum(one.closed for one in self.judged) / N,
            **task.monitor(self.judged, completions_per_problem),
        }

    def samples(self, task: Task, count: int, advantages_NT: Tensor) -> list[dict[str, Any]]:
        """The best and the worst completions, with their texts, reward terms and advantages."""
        order = sorted(range(len(self.rows)), key=lambda n: -self.table.rewards[n])
        half = (count + 1) // 2
        picked = order[:half] + order[len(order) - (count - half) :]
        return [
            {
                "problem_id": self.judged[n].problem.id,
                "question": self.judged[n].problem.question,
                "solution": self.judged[n].problem.solution,
                task.kind: self.judged[n].text,
                "finish": self.completions[n].finish,
                **self.table.row(n),
                **task.details(self.judged[n], self.table, n, advantages_NT[n]),
            }
            for n in picked
        ]
