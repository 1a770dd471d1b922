"""The record of one RL step: completions, their rewards, their token log-probs, their advantages.

Shapes: P problem, G completion in its group, N = P × G completion, T token of a completion.
"""

import functools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from rlt.data.problem import Problem
from rlt.llm.batching import Row
from rlt.rewards.reward import RewardTable
from rlt.runs import ranks
from rlt.sampling import Completion
from rlt.training.algorithms import Correction
from rlt.training.correction import sampler_ratios


@dataclass(frozen=True)
class ParsedCompletion:
    """What a completion says.

    Attributes:
        ids: token ids of what is judged: of the explanation, or of the whole answer.
        text: the text of these tokens, as samples show it.
        thought: the part of the text that is a thought.
        closed: whether the completion was brought to its end.
    """

    ids: Sequence[int]
    text: str
    thought: str
    closed: bool


@dataclass(frozen=True)
class Scores:
    """What one rank finds out of its completions.

    Attributes:
        log_probs, sampled_elsewhere, reward_table: see `RolloutBatch`.
    """

    log_probs: list[Tensor]
    sampled_elsewhere: bool
    reward_table: RewardTable

    def __getstate__(self) -> dict[str, Any]:
        """What other ranks are told: all but the hidden states, which are large."""
        return {
            "log_probs": [values_T.cpu() for values_T in self.log_probs],
            "sampled_elsewhere": self.sampled_elsewhere,
            "reward_table": self.reward_table.without_hidden(),
        }


@dataclass
class RolloutBatch:
    """N completions of P problems, group after group.

    `RL.sample` makes the batch. `RL.score`, `RL.assign_credit` and `RL.update` each fill in the
    fields that later steps read.

    Attributes:
        group_size: G.
        problems: the problem of each completion.
        prompts: token ids of each completion's prompt.
        completions: what was sampled.
        parsed: what each completion says.
        log_probs: by `score`: of each completion's tokens under the policy that sampled them, in
            nats at the sampling temperature, one vector `[T]` a completion.
        sampled_elsewhere: by `score`: whether the sampler's log-probs are not the policy's.
        sampler_ratios: by `score`: the policy's over the sampler's probability of the same tokens;
            None where the sampler's log-probs are the policy's, or are not known.
        reward_table: by `score`: rewards with their terms.
        advantages_NT: by `assign_credit`: the advantage of each token.
        exact_kl_weights_N: by `assign_credit`: what each completion's mean exact KL to the student
            weighs in the loss, in units of the reward's own r_KL; None where the loss has none.
        reference_log_probs: by `update`: as `log_probs`, under the reference model; None where the
            algorithm does not read them.
        seconds: wall time by phase: `rollout`, `reward`, `update`.
    """

    group_size: int
    problems: list[Problem]
    prompts: list[Sequence[int]]
    completions: list[Completion]
    parsed: list[ParsedCompletion]
    log_probs: list[Tensor] = field(init=False)
    reward_table: RewardTable = field(init=False)
    advantages_NT: Tensor = field(init=False)
    sampled_elsewhere: bool = False
    sampler_ratios: list[Tensor] | None = None
    exact_kl_weights_N: Tensor | None = None
    reference_log_probs: list[Tensor] | None = None
    seconds: dict[str, float] = field(default_factory=dict)

    @classmethod
    def of_groups(
        cls,
        problems: Sequence[Problem],
        prompts: Sequence[Sequence[int]],
        groups: Sequence[Sequence[Completion]],
        parse: Callable[[Sequence[int]], ParsedCompletion],
    ) -> "RolloutBatch":
        """The batch of P groups of completions, each of one problem and its prompt.

        Args:
            problems: of the P groups.
            prompts: token ids of the P prompts.
            groups: the G completions of each problem.
            parse: says what the token ids of a completion say.
        """
        owners = [p for p, group in enumerate(groups) for _ in group]
        completions = [completion for group in groups for completion in group]
        return cls(
            group_size=len(groups[0]),
            problems=[problems[p] for p in owners],
            prompts=[prompts[p] for p in owners],
            completions=completions,
            parsed=[parse(completion.ids) for completion in completions],
        )

    def __len__(self) -> int:
        return len(self.completions)

    @functools.cached_property
    def rows(self) -> list[Row]:
        """Prompt and completion of each, as token ids."""
        return [(p, c.ids) for p, c in zip(self.prompts, self.completions, strict=True)]

    @property
    def lengths(self) -> list[int]:
        """Tokens of each completion."""
        return [len(completion.ids) for completion in self.completions]

    @property
    def problem_ids(self) -> list[str]:
        """The id of each completion's problem."""
        return [problem.id for problem in self.problems]

    @property
    def rewards_PG(self) -> Tensor:
        """Rewards `[P, G]`, a row for each problem's group."""
        return torch.tensor(self.reward_table.rewards).view(-1, self.group_size)

    @property
    def own(self) -> range:
        """Places of this rank's completions: whole groups."""
        groups = ranks.own_part(len(self) // self.group_size)
        return range(groups.start * self.group_size, groups.stop * self.group_size)

    def part(self, places: Sequence[int]) -> "RolloutBatch":
        """The completions at some places, before `score`."""
        return RolloutBatch(
            group_size=self.group_size,
            problems=[self.problems[n] for n in places],
            prompts=[self.prompts[n] for n in places],
            completions=[self.completions[n] for n in places],
            parsed=[self.parsed[n] for n in places],
        )

    def take_scores(self, parts: Sequence[Scores]) -> None:
        """Set what `score` finds out, from the scores of the ranks, in their order."""
        self.log_probs = [values_T for part in parts for values_T in part.log_probs]
        self.sampled_elsewhere = any(part.sampled_elsewhere for part in parts)
        self.reward_table = RewardTable.joined([part.reward_table for part in parts])

    def compare_with_sampler(self, correction: Correction) -> None:
        """Set `sampler_ratios`, from `log_probs` and what the rollout engine has told.

        Raises:
            ValueError: the correction needs the engine's log-probs, and it did not give them.
        """
        if any(len(c.log_probs) != len(c.ids) for c in self.completions):
            if correction != "none":
                raise ValueError(
                    f"algorithm.correction={correction} needs the log-probs that completions were "
                    "sampled with, and this rollout engine does not give them; set it to none"
                )
            return
        own = [values_T.cpu() for values_T in self.log_probs]
        self.sampler_ratios = sampler_ratios(
            own, [torch.tensor(c.log_probs) for c in self.completions]
        )

    def minibatches(self, iterations: int, count: int) -> Iterator[list[int]]:
        """Places of the completions of each optimizer step: all of them in each iteration.

        Args:
            iterations: passes over the completions.
            count: minibatches that a pass is cut into; several are cut from a random order.

        Raises:
            ValueError: there are more minibatches than completions.
        """
        N = len(self)
        if count > N:
            raise ValueError(
                f"algorithm.minibatches={count} exceeds the {N} completions of a step; lower it, "
                "or raise datamodule.batch_size"
            )
        for _ in range(iterations):
            order = torch.randperm(N) if count > 1 else torch.arange(N)
            for picked in order.tensor_split(count):
                yield picked.tolist()

    def token_mask(self, picked: Sequence[int]) -> Tensor:
        """Mask `[B, T]`, True at the tokens of the completions at `picked`."""
        lengths_B = torch.tensor([len(self.completions[n].ids) for n in picked])
        return torch.arange(max(1, int(lengths_B.max()))) < lengths_B[:, None]

    def overlong(self, picked: Sequence[int]) -> Tensor:
        """`[B]`, True where the completion at `picked` was cut by the limit on its length."""
        return torch.tensor([self.completions[n].finish == "length" for n in picked])
