"""RL of a policy with group-relative advantages: sample completions, reward them, move the policy.
One `training_step` is one rollout and all optimizer steps on it. What is rewarded is the task's
business (`rlt.training.tasks`): a teacher's explanations (arXiv 2506.08388, section 3), by what
they do for the student, or a student's answers.

Run by `rlt stage=teacher_rl` and `rlt stage=student_rl`. Log-probs of policy, reference and student
are all taken at the sampling temperature, as the published code takes them.
"""

import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from transformers import PreTrainedModel

from rlt.data.batches import Batch
from rlt.data.dataset import Behaviour
from rlt.data.problem import Problem
from rlt.evaluation.statistics import roc_area_interval
from rlt.llm.batching import Row, pad_rows
from rlt.llm.device import on_device
from rlt.llm.finite_checks import require_finite
from rlt.llm.logprobs import batch_log_probs, continuation_hidden
from rlt.sampling import Rollout, known_log_probs
from rlt.training.algorithms import (
    Algorithm,
    loss_mask,
    move_reference_,
    policy_loss_terms,
    token_sums,
    token_weights,
)
from rlt.training.credit import CompletionCredit, Credit, exact_kl_loss, within_completions
from rlt.training.experience import Experience
from rlt.training.policy import PolicyModule, names_the_step
from rlt.training.tasks import Task


class RL(PolicyModule):
    """Trains a policy on the rewards of its own completions.

    Args:
        reference: frozen reference model, or None if nothing needs one.
        task: prompts and rewards; its `scoring_model` may be the `reference` object itself.
        rollout: samples completions.
        algorithm: loss settings.
        group_size: G, the group size; at least 2.
        credit: how a completion's reward is shared out among its tokens.
        samples_per_step: completions handed to `on_samples` at each step (best and worst ones).
        monitor_every_steps: steps between two looks for reward hacking (`monitor/…`).
        on_samples: receives `(step, rows of text and reward terms)`.
        behaviour: names what an explanation does; its shares are then logged.
        on_held_out: receives `(optimizer steps so far, rows of problem_id and mean reward)` at
            each validation.
        For the rest, see `PolicyModule`.

    Raises:
        ValueError: the group is too small, or the algorithm needs a reference and there is none.
    """

    def __init__(
        self,
        policy: Any,
        renderer: Any,
        reference: PreTrainedModel | None,
        task: Task,
        rollout: Rollout,
        algorithm: Algorithm,
        optim: Callable[..., torch.optim.Optimizer],
        schedule: Callable[..., Any],
        optimizer_steps: int,
        group_size: int,
        max_grad_norm: float | None,
        tokens_per_micro_batch: int,
        samples_per_step: int = 2,
        monitor_every_steps: int = 5,
        credit: Credit | None = None,
        gradient_checkpointing: bool = False,
        behaviour: Behaviour | None = None,
        on_samples: Callable[[int, list[dict[str, Any]]], None] | None = None,
        on_held_out: Callable[[int, list[dict[str, Any]]], None] | None = None,
    ) -> None:
        super().__init__(
            policy, renderer, optim, schedule, optimizer_steps, max_grad_norm,
            tokens_per_micro_batch, gradient_checkpointing,
        )  # fmt: skip
        if group_size < 2:
            raise ValueError(
                f"module.group_size={group_size}: advantages compare "
                "completions of one problem, take at least 2"
            )
        if algorithm.needs_reference and reference is None:
            raise ValueError(f"algorithm.beta={algorithm.beta} needs a reference model")
        # Kept out of the module tree: frozen models are no part of a checkpoint's state.
        self._frozen = {"reference": reference, "judge": task.scoring_model}
        self.task = task
        self.rollout = rollout
        self.algorithm = algorithm
        self.group_size = group_size
        self.credit: Credit = credit or CompletionCredit()
        self.samples_per_step = samples_per_step
        self.monitor_every_steps = monitor_every_steps
        self.behaviour = behaviour
        self.on_samples = on_samples
        self.on_held_out = on_held_out
        self._held_out: list[dict[str, Any]] = []
        self._scored_held_out: list[tuple[str, bool, float]] = []  # problem, is good, reward

    @property
    def reference(self) -> PreTrainedModel | None:
        return self._frozen["reference"]

    def setup(self, stage: str) -> None:
        for model in self._frozen.values():
            if model is not None:
                on_device(model, self.trainer.strategy.root_device)

    @names_the_step
    def training_step(self, batch: Batch, batch_idx: int) -> None:
        experience = self.collect_experience(batch.items)
        G = self.group_size
        rewards_PG = torch.tensor(experience.table.rewards).view(-1, G)
        lengths = [len(ids) for _, ids in experience.rows]
        scale = self.algorithm.scale_rewards
        advantages_NT = self.credit.advantages(
            rewards_PG, experience.table.token_rewards, lengths, scale
        )
        started = time.perf_counter()
        kl_weights_N = self.credit.kl_weights(rewards_PG, scale)
        stats = self.update(experience, advantages_NT, kl_weights_N)
        experience.seconds["update"] = time.perf_counter() - started
        self.log_experience("train", experience, rewards_PG)
        self.log("time/train_mfu", stats.pop("mfu"))
        self.log_dict({f"policy/{name}": value for name, value in stats.items()}, batch_size=1)
        speed = sum(lengths) / sum(experience.seconds.values())
        self.log("time/train_tokens_per_second", speed, prog_bar=True)
        idle_P = (advantages_NT.reshape(len(rewards_PG), -1) == 0).all(1)
        self.log("policy/zero_advantage_rate", idle_P.float().mean())
        self.log("policy/token_credit_fraction", within_completions(advantages_NT, lengths))
        if batch_idx % self.monitor_every_steps == 0:
            values = experience.monitors(self.task, G) | {"entropy": stats["entropy"]}
            self.log_dict({f"monitor/{name}": value for name, value in values.items()})
        if self.on_samples is not None and self.samples_per_step:
            samples = experience.samples(self.task, self.samples_per_step, advantages_NT)
            self.on_samples(batch_idx, samples)

    @names_the_step
    @torch.no_grad()
    def validation_step(self, batch: Batch, batch_idx: int) -> None:
        experience = self.collect_experience(batch.items)
        rewards_PG = torch.tensor(experience.table.rewards).view(-1, self.group_size)
        self.log_experience("validation", experience, rewards_PG)
        self._held_out += [
            {"problem_id": problem.id, "reward": float(rewards_G.mean())}
            for problem, rewards_G in zip(batch.items, rewards_PG, strict=True)
        ]
        if self.behaviour is not None:
            marks = [name in self.behaviour.good for name in experience.behaviours(self.behaviour)]
            self._scored_held_out += zip(
                experience.problems, marks, experience.table.rewards, strict=True
            )

    def on_validation_epoch_end(self) -> None:
        if self.on_held_out is not None:
            self.on_held_out(self.global_step, self._held_out)
        self._held_out = []
        scored, self._scored_held_out = self._scored_held_out, []
        marks = [is_good for _, is_good, _ in scored]
        if 0 < sum(marks) < len(marks):
            rewards, problems = [row[2] for row in scored], [row[0] for row in scored]
            area = roc_area_interval(rewards, marks, problems, resamples=1).mean
            self.log("validation/reward_area", area)

    @torch.no_grad()
    def collect_experience(self, problems: list[Problem]) -> Experience:
        """Roll out, with the policy's log-probs of what it wrote, and reward it.

        Raises:
            NotFiniteError: a log-prob, a reward or one of its terms is NaN or infinite.
        """
        self.policy.eval()
        clock = [time.perf_counter()]
        prompts = [self.task.prompt(problem) for problem in problems]
        groups = self.rollout.sample(
            self.policy, self.renderer.tokenizer, prompts, self.group_size,
            self.task.stop,
        )  # fmt: skip
        clock.append(time.perf_counter())
        completions = [c for group in groups for c in group]
        owners = [p for p, group in enumerate(groups) for _ in group]
        rows: list[Row] = [(prompts[p], c.ids) for p, c in zip(owners, completions, strict=True)]
        log_probs = known_log_probs(self.policy, completions)
        if log_probs is None:
            log_probs = self.row_log_probs(self.policy, rows)
        owned = [problems[p] for p in owners]
        require_finite("a log-prob of the policy", log_probs, [problem.id for problem in owned])
        scored, table = self.task.score(self.policy, owned, rows, log_probs, self.temperature)
        clock.append(time.perf_counter())
        seconds = {"rollout": clock[1] - clock[0], "reward": clock[2] - clock[1]}
        return Experience(rows, completions, scored, log_probs, table, seconds)

    def update(
        self, experience: Experience, advantages_NT: Tensor, kl_weights_N: Tensor | None = None
    ) -> dict[str, float]:
        """All optimizer steps on one rollout: `num_iterations` × `minibatches` of them.

        Args:
            advantages_NT: of every token, or `[N, 1]` of every completion.
            kl_weights_N: weight of each completion's exact KL to the student (`credit.exact`).
        """
        algorithm = self.algorithm
        rows, N = experience.rows, len(experience.rows)
        reference = None
        if algorithm.needs_reference:
            assert self.reference is not None
            reference = self.row_log_probs(self.reference, rows)
            require_finite("a log-prob of the reference", reference, experience.problems)
        old = experience.log_probs if algorithm.needs_old_log_probs else None
        if algorithm.minibatches > N:
            raise ValueError(
                f"algorithm.minibatches={algorithm.minibatches} exceeds the {N} completions of a "
                "step; lower it, or raise datamodule.batch_size"
            )
        stats: dict[str, float] = {}
        for _ in range(algorithm.num_iterations):
            order = torch.randperm(N) if algorithm.minibatches > 1 else torch.arange(N)
            for picked in order.tensor_split(algorithm.minibatches):
                stats = self.update_on(
                    picked.tolist(), experience, advantages_NT, old, reference, kl_weights_N
                )
        return stats

    def update_on(
        self,
        picked: list[int],
        experience: Experience,
        advantages_NT: Tensor,
        old: list[Tensor] | None,
        reference: list[Tensor] | None,
        kl_weights_N: Tensor | None = None,
    ) -> dict[str, float]:
        """One optimizer step over the completions at `picked`."""
        algorithm = self.algorithm
        rows = [experience.rows[n] for n in picked]
        lengths = torch.tensor([len(ids) for _, ids in rows])
        mask_BT = torch.arange(max(1, int(lengths.max()))) < lengths[:, None]
        overlong_B = torch.tensor([experience.completions[n].finish == "length" for n in picked])
        mask_BT = loss_mask(mask_BT, overlong_B, algorithm)
        weights_BT = token_weights(mask_BT, algorithm.aggregation, self.rollout.max_new_tokens)

        def stacked(values: list[Tensor] | None, indices: list[int]) -> Tensor | None:
            if values is None:
                return None
            return pad_sequence([values[picked[i]] for i in indices], batch_first=True)

        def loss_of(indices: list[int]) -> tuple[Tensor, dict[str, Tensor]]:
            batch = pad_rows([rows[i] for i in indices], self.pad_id, self.device)
            hidden_ND = continuation_hidden(self.policy, batch)
            log_probs_BT, entropy_BT = batch_log_probs(
                self.policy, batch, self.temperature, hidden_ND
            )
            T = log_probs_BT.shape[1]
            mask = mask_BT[indices, :T].to(self.device)
            terms = policy_loss_terms(
                log_probs_BT,
                stacked(old, indices),
                advantages_NT[[picked[i] for i in indices], :T].to(self.device),
                mask,
                algorithm,
                stacked(reference, indices),
            )
            token_weights_BT = weights_BT[indices, :T].to(self.device)
            loss = (terms.per_token_BT * token_weights_BT).sum()
            if kl_weights_N is not None:
                own = [picked[i] for i in indices]
                loss = loss + exact_kl_loss(
                    self.policy,
                    hidden_ND.split(batch.mask_BC.sum(1).tolist()),
                    self._frozen["judge"],
                    [experience.table.scores[n].student_hidden_TD for n in own],
                    experience.table.kl_weight * kl_weights_N[own],
                    token_weights_BT,
                    self.temperature,
                )
            return loss, token_sums(terms, mask) | {"entropy": (entropy_BT * mask).sum()}

        problems = [experience.scored[n].problem.id for n in picked]
        stats = self.optimizer_step_on(rows, problems, loss_of)
        if algorithm.moves_reference_after(self.global_step) and self.reference is not None:
            move_reference_(
                self.reference.parameters(), self.policy.parameters(), algorithm.reference_mix_up
            )
        return stats

    @property
    def temperature(self) -> float:
        """At which log-probs are taken: the sampling temperature."""
        return self.rollout.temperature or 1.0

    def log_experience(self, prefix: str, experience: Experience, rewards_PG: Tensor) -> None:
        N = rewards_PG.numel()
        values = {f"{prefix}/reward_std": float(rewards_PG.std(1).mean())}
        for name, value in experience.metrics(self.behaviour).items():
            values[f"{prefix}/{name}"] = value
        for name, seconds in experience.seconds.items():
            values[f"time/{prefix}_{name}_seconds"] = seconds
        self.log_dict(values, batch_size=N)
        self.log(f"{prefix}/reward", float(rewards_PG.mean()), prog_bar=True, batch_size=N)

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        if self.reference is not None and self.algorithm.reference_update_every_steps:
            checkpoint["reference"] = self.reference.state_dict()

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        if "reference" in checkpoint:
            assert self.reference is not None
            self.reference.load_state_dict(checkpoint["reference"])
