"""RL of a policy with group-relative advantages: sample, score, assign credit, update.

One `RL.training_step` is one rollout and all optimizer steps on it. What is rewarded is the task's
business (`rlt.training.tasks`): a teacher's explanations (arXiv 2506.08388, section 3), by what
they do for the student, or a student's answers.

Run by `rlt stage=teacher_rl` and `rlt stage=student_rl`. Log-probs of policy, reference and student
are all taken at the sampling temperature, as the published code takes them.
Shapes: P problem, G completion in its group, N = P × G, B completion of a micro-batch, T token.
"""

import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from rlt.data.batches import Batch
from rlt.data.dataset import Behaviour
from rlt.data.problem import Problem
from rlt.data.renderer import Renderer
from rlt.llm.device import on_device
from rlt.llm.finite_checks import require_finite
from rlt.llm.shards import run, whole, whole_weights
from rlt.runs import ranks
from rlt.sampling import Completion, Rollout, draw_seeds, known_log_probs
from rlt.training.algorithms import Algorithm, move_reference_
from rlt.training.credit import CompletionCredit, Credit
from rlt.training.policy import PolicyModule, names_the_step
from rlt.training.rl_logging import HeldOutRewards, log_rollout, log_step
from rlt.training.rl_loss import TokenWeights, micro_batch_loss, token_weights
from rlt.training.rollout_batch import RolloutBatch, Scores
from rlt.training.rollout_metrics import best_and_worst
from rlt.training.tasks import Task


class RL(PolicyModule):
    """Trains a policy on the rewards of its own completions.

    Args:
        reference: frozen reference model, or None if nothing needs one.
        task: prompts and rewards; its `scoring_model` may be the `reference` object itself.
        rollout: samples completions.
        algorithm: loss settings.
        group_size: G, completions of each problem; at least 2.
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
        policy: PreTrainedModel,
        renderer: Renderer,
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
        samples_per_step: int,
        monitor_every_steps: int,
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
        errors = self.settings_errors(group_size, samples_per_step, monitor_every_steps)
        if errors:
            raise ValueError(f"module.{errors[0]}")
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
        self._held_out = HeldOutRewards()

    @staticmethod
    def settings_errors(
        group_size: int, samples_per_step: int, monitor_every_steps: int
    ) -> list[str]:
        """What is wrong with settings that need no model, a line each."""
        errors = []
        if group_size < 2:
            errors.append(
                f"group_size={group_size}: advantages compare completions of one problem, so it "
                "must be at least 2"
            )
        for name, value, least in (
            ("samples_per_step", samples_per_step, 0),
            ("monitor_every_steps", monitor_every_steps, 1),
        ):
            if isinstance(value, bool) or not isinstance(value, int) or value < least:
                errors.append(f"{name}={value}: must be a whole number of at least {least}")
        return errors

    @property
    def reference(self) -> PreTrainedModel | None:
        """The frozen reference model, or None."""
        return self._frozen["reference"]

    @property
    def temperature(self) -> float:
        """At which log-probs are taken: the sampling temperature."""
        return self.rollout.temperature or 1.0

    def setup(self, stage: str) -> None:
        """Bring the frozen models to the policy's device."""
        for model in self._frozen.values():
            if model is not None:
                on_device(model, self.trainer.strategy.root_device)

    @names_the_step
    def training_step(self, batch: Batch, batch_idx: int) -> None:
        """One step of RL on the problems of a batch."""
        with whole_weights(self.policy):
            rollout = self.sample(batch.items)
            self.score(rollout)
        self.assign_credit(rollout)
        stats = self.update(rollout)
        log_step(self, rollout, stats, monitored=batch_idx % self.monitor_every_steps == 0)
        if self.on_samples is not None and self.samples_per_step:
            self.on_samples(batch_idx, best_and_worst(rollout, self.task, self.samples_per_step))

    @torch.no_grad()
    def sample(self, problems: list[Problem]) -> RolloutBatch:
        """Sample G completions of each problem."""
        started = time.perf_counter()
        self.policy.eval()
        prompts = [self.task.prompt(problem) for problem in problems]
        seeds = draw_seeds(len(problems))
        own = ranks.own_part(len(problems))
        self.rollout.prepare(self.policy, self.renderer.tokenizer)

        def sample_own() -> list[list[Completion]]:
            return self.rollout.sample(
                self.policy, self.renderer.tokenizer, [prompts[p] for p in own], self.group_size,
                self.task.stop, [seeds[p] for p in own],
            )  # fmt: skip

        groups = ranks.gather_parts(sample_own, self._phase("sampling"))
        rollout = RolloutBatch.of_groups(problems, prompts, groups, self.task.parse)
        rollout.seconds["rollout"] = time.perf_counter() - started
        return rollout

    @torch.no_grad()
    def score(self, rollout: RolloutBatch) -> None:
        """Take the policy's log-probs of what it wrote, and reward it.

        Raises:
            NotFiniteError: a log-prob, a reward or one of its terms is NaN or infinite.
            ValueError: a correction needs log-probs that the rollout engine does not give.
        """
        started = time.perf_counter()
        parts = ranks.gather(lambda: self._score_own(rollout), self._phase("rewarding"))
        rollout.take_scores([part for part in parts if part is not None])
        if rollout.sampled_elsewhere:
            rollout.compare_with_sampler(self.algorithm.correction)
        rollout.seconds["reward"] = time.perf_counter() - started

    def _score_own(self, rollout: RolloutBatch) -> Scores | None:
        """Scores of this rank's completions; None if it has none."""
        own = rollout.own
        if not own:
            return None
        part = rollout.part(own)
        log_probs = known_log_probs(self.policy, part.completions)
        part.sampled_elsewhere = log_probs is None
        part.log_probs = (
            self.row_log_probs(self.policy, part.rows) if log_probs is None else log_probs
        )
        require_finite("a log-prob of the policy", part.log_probs, part.problem_ids)
        table = self.task.score(part, self.policy, self.temperature)
        return Scores(part.log_probs, part.sampled_elsewhere, table)

    def assign_credit(self, rollout: RolloutBatch) -> None:
        """Give each token its advantage, and each completion the weight of its exact KL."""
        rewards_PG, scale = rollout.rewards_PG, self.algorithm.scale_rewards
        rollout.advantages_NT = self.credit.advantages(
            rewards_PG, rollout.reward_table.token_rewards, rollout.lengths, scale
        )
        rollout.exact_kl_weights_N = self.credit.kl_weights(rewards_PG, scale)

    def update(self, rollout: RolloutBatch) -> dict[str, float]:
        """All optimizer steps on one rollout: `num_iterations` × `minibatches` of them.

        Returns:
            What `PolicyModule.take_step` tells of the last one.

        Raises:
            ValueError: there are more minibatches than completions.
            NotFiniteError: a log-prob of the reference, the loss or the gradient is not finite.
        """
        started = time.perf_counter()
        if self.algorithm.needs_reference:
            rollout.reference_log_probs = self._reference_log_probs(rollout)
        stats: dict[str, float] = {}
        iterations, minibatches = self.algorithm.num_iterations, self.algorithm.minibatches
        for picked in rollout.minibatches(iterations, minibatches):
            stats = self.minibatch_step(rollout, picked)
        rollout.seconds["update"] = time.perf_counter() - started
        return stats

    def _reference_log_probs(self, rollout: RolloutBatch) -> list[Tensor]:
        """Log-probs of this rank's completions under the reference; empty ones for the others'."""
        assert self.reference is not None
        part = rollout.part(rollout.own)
        found = self.row_log_probs(self.reference, part.rows)
        require_finite("a log-prob of the reference", found, part.problem_ids)
        own = dict(zip(rollout.own, found, strict=True))
        nothing = torch.empty(0)
        return [own.get(n, nothing) for n in range(len(rollout))]

    def _phase(self, doing: str) -> str:
        """What the ranks do at the same time, for messages."""
        return f"{doing} after {self.global_step} optimizer steps"

    def minibatch_step(self, rollout: RolloutBatch, picked: list[int]) -> dict[str, float]:
        """One optimizer step over the completions at `picked`; see `update`."""
        started = time.perf_counter()
        weights = token_weights(rollout, picked, self.algorithm, self.rollout.max_new_tokens)
        places = [place for place, n in enumerate(picked) if n in rollout.own]
        rows = [rollout.rows[picked[place]] for place in places]

        def gradient() -> tuple[float, list[dict[str, Tensor]]]:
            for attempt in self.gradient_attempts(rows):
                with attempt:  # where memory runs out, this begins again with smaller micro-batches
                    loss, sums = 0.0, []
                    for indices in attempt.micro_batches:
                        here = [places[i] for i in indices]
                        own = [picked[place] for place in here]
                        part = self.micro_batch(rollout, own, weights.of(here))
                        loss += part[0]
                        sums.append(part[1])
            return loss, sums

        problems = [rollout.problems[n].id for n in picked]
        stats = self.take_step(rows, problems, gradient, started)
        if self.reference is not None and self.algorithm.moves_reference_after(self.global_step):
            self._move_reference(self.reference)
        return stats

    def _move_reference(self, reference: PreTrainedModel) -> None:
        """Move the reference towards the policy, in the weights that are trained."""
        both = zip(reference.parameters(), self.policy.parameters(), strict=True)
        trained = [(ours, p) for ours, p in both if p.requires_grad]
        move_reference_(
            [ours for ours, _ in trained],
            (whole(p.detach()) for _, p in trained),
            self.algorithm.reference_mix_up,
        )

    def micro_batch(
        self, rollout: RolloutBatch, own: list[int], weights: TokenWeights
    ) -> tuple[float, dict[str, Tensor]]:
        """Add the gradient of the completions at `own`; arguments and result of the loss."""
        loss, sums = run(
            self.policy, micro_batch_loss, self._frozen["judge"], rollout, own, weights,
            self.algorithm, self.temperature, self.pad_id,
        )  # fmt: skip
        return self.backward_on(loss, [rollout.problems[n].id for n in own]), sums

    @names_the_step
    @torch.no_grad()
    def validation_step(self, batch: Batch, batch_idx: int) -> None:
        """Sample and score the held-out problems of a batch."""
        with whole_weights(self.policy):
            rollout = self.sample(batch.items)
            self.score(rollout)
        log_rollout(self, "validation", rollout)
        self._held_out.add(rollout, self.behaviour)

    def on_validation_epoch_end(self) -> None:
        """Hand the held-out rewards on, and begin anew."""
        held_out, self._held_out = self._held_out, HeldOutRewards()
        if self.on_held_out is not None:
            self.on_held_out(self.global_step, held_out.rows)
        if (area := held_out.area()) is not None:
            self.log("validation/reward_area", area)

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Save the reference's weights if they move."""
        if self.reference is not None and self.algorithm.reference_update_every_steps:
            checkpoint["reference"] = self.reference.state_dict()

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Load the reference's weights if they were saved."""
        if "reference" in checkpoint:
            assert self.reference is not None
            self.reference.load_state_dict(checkpoint["reference"])
