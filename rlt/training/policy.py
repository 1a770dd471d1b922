"""What both modules share: one trained model, stepped by hand so that a batch may be cut anywhere.

Loss weights are computed over the whole optimizer batch before it is cut into micro-batches by
token budget; micro-batches then add up to the same gradient, whatever the cut.
"""

import functools
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import lightning as L
import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from rlt.data.batches import Batch
from rlt.data.renderer import Renderer
from rlt.llm import shards
from rlt.llm.adapter_layers import is_partly_trained
from rlt.llm.batching import Row, cut_rows, pad_rows, padding_fraction
from rlt.llm.finite_checks import NotFiniteError, require_finite_sum
from rlt.llm.flop_count import forward_flops, matmul_flops_per_second
from rlt.llm.logprobs import batch_log_probs, row_log_probs, shares_prefixes
from rlt.llm.token_budget import Attempt, OutOfMemoryError, TokenBudget
from rlt.runs import ranks
from rlt.training.algorithms import token_means
from rlt.training.lightning_private import forget_logged_values
from rlt.training.strategies import Shards

Step = Callable[[Any, Batch, int], None]
# The loss as a sum over micro-batches, and of each of them, sums over its tokens.
Gradient = tuple[float, list[dict[str, Tensor]]]

_SHARDS_SHORTAGE = (
    "not enough memory ({}) for hardware.tokens_per_micro_batch={}, which the ranks of sharded "
    "weights cannot lower while they run; give a lower value"
)


def names_the_step(step: Step) -> Step:
    """Has a `NotFiniteError` that a training or validation step raises tell which step it was."""

    @functools.wraps(step)
    def named(self: Any, batch: Batch, batch_idx: int) -> None:
        try:
            step(self, batch, batch_idx)
        except NotFiniteError as error:
            phase = "training" if self.trainer.training else "validation"
            where = f"{phase} step {batch_idx}, after {self.global_step} optimizer steps"
            problems = error.problems or [item.id for item in batch.items]
            raise NotFiniteError(error.what, problems, where) from error

    return named


class PolicyModule(L.LightningModule):
    """Holds the trained model under the name `policy` and steps its optimizer.

    Args:
        policy: the trained language model.
        renderer: prompt style and tokenizer.
        optim: makes the optimizer from parameters (config: `_partial_`).
        schedule: makes the schedule from optimizer and `num_training_steps` (config: `_partial_`).
        optimizer_steps: length of the schedule.
        max_grad_norm: gradients are clipped to this norm; None leaves them.
        tokens_per_micro_batch: padded tokens per forward and backward pass, to begin with: too
            many for the memory are lowered (`rlt.llm.token_budget`).
        gradient_checkpointing: trade time for memory in the backward pass.

    Attributes:
        weights_moved: whether a step of the optimizer was begun since it was last set to False.
    """

    def __init__(
        self,
        policy: PreTrainedModel,
        renderer: Renderer,
        optim: Callable[..., torch.optim.Optimizer],
        schedule: Callable[..., Any],
        optimizer_steps: int,
        max_grad_norm: float | None,
        tokens_per_micro_batch: int,
        gradient_checkpointing: bool = False,
    ) -> None:
        super().__init__()
        self.automatic_optimization = False
        self.policy = policy
        self.renderer = renderer
        self.optim = optim
        self.schedule = schedule
        self.optimizer_steps = optimizer_steps
        self.max_grad_norm = max_grad_norm
        self.token_budget = TokenBudget(tokens_per_micro_batch, "hardware.tokens_per_micro_batch")
        self.weights_moved = False
        self._skeletons: list[PreTrainedModel] = []  # of a sharded policy; in no module tree
        if gradient_checkpointing:
            # transformers renames the method, and warns of the old name
            name = "activation_checkpointing_enable"
            enable = getattr(policy, name, None) or policy.gradient_checkpointing_enable
            enable({"use_reentrant": False})

    def configure_model(self) -> None:
        """Divide the policy among the ranks, if the strategy says so."""
        strategy = self.trainer.strategy
        if isinstance(strategy, Shards) and not self._skeletons:
            self._skeletons.append(strategy.shard_(self.policy))

    def plain_policy(self) -> PreTrainedModel | None:
        """The policy as a plain model. All ranks call it together; None but on rank 0."""
        if not self._skeletons:
            return self.policy
        return shards.plain_copy(self.policy, self._skeletons[0])

    def configure_optimizers(self) -> Any:
        """Make optimizer and schedule from the config, for Lightning."""
        optimizer = self.optim([p for p in self.policy.parameters() if p.requires_grad])
        schedule = self.schedule(optimizer=optimizer, num_training_steps=self.optimizer_steps)
        self._configured = [
            {name: value for name, value in group.items() if name != "params"}
            for group in optimizer.param_groups
        ]
        return {"optimizer": optimizer, "lr_scheduler": schedule}

    def state_dict(self, *args: Any, **kwargs: Any) -> Any:
        """The weights of a checkpoint: all of them, or the adapter's where only that is trained."""
        state = super().state_dict(*args, **kwargs)
        if not is_partly_trained(self.policy):
            return state
        trained = self._trained_names()
        return {name: value for name, value in state.items() if name in trained}

    def load_state_dict(self, state_dict: Mapping[str, Any], *args: Any, **kwargs: Any) -> Any:
        """Take over the weights of a checkpoint.

        Raises:
            ValueError: an adapter's weights are missing, or there are others.
        """
        if not is_partly_trained(self.policy):
            return super().load_state_dict(state_dict, *args, **kwargs)
        if set(state_dict) != (expected := self._trained_names()):
            odd = sorted(set(state_dict) ^ expected)
            raise ValueError(
                f"the checkpoint's adapter has {len(state_dict)} weights, the config's has "
                f"{len(expected)} (first difference: {odd[0]}); give the config that it was "
                "written with"
            )
        return super().load_state_dict(state_dict, strict=False)

    def _trained_names(self) -> set[str]:
        return {name for name, p in self.named_parameters() if p.requires_grad}

    def on_fit_start(self) -> None:
        """Begin in train mode."""
        self.policy.train()  # where Lightning expects it; every phase then sets its own mode

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
        """Have this step log nothing that an earlier step measured."""
        # Lightning would log what only some steps measure again at every other step, and, after a
        # checkpoint, would not: a resumed run's curves would differ.
        forget_logged_values(self.trainer)

    def use_configured_hyperparameters(self) -> None:
        """Put the config's learning rate, betas, … in place of those that a checkpoint brought.

        They are the same unless a run goes on with others. Schedules multiply the learning rate.
        """
        optimizer: Any = self.optimizers()
        scheduler: Any = self.lr_schedulers()
        for group, configured in zip(optimizer.param_groups, self._configured, strict=True):
            before = group["initial_lr"]
            lr = group["lr"] * (configured["initial_lr"] / before if before else 1.0)
            group.update(configured | {"lr": lr})
        scheduler.base_lrs = [configured["initial_lr"] for configured in self._configured]

    @property
    def pad_id(self) -> int:
        """Token id of padding."""
        return int(self.renderer.tokenizer.pad_token_id)

    @property
    def temperature(self) -> float:
        """At which log-probs are taken."""
        return 1.0

    def row_log_probs(self, model: PreTrainedModel, rows: Sequence[Row]) -> list[Tensor]:
        """Log-probs of every row's continuation tokens, without gradient."""
        if not rows:
            return []
        return self.token_budget.fit(
            lambda tokens: row_log_probs(
                model, rows, temperature=self.temperature, pad_id=self.pad_id, token_budget=tokens
            ),
            lambda tokens: cut_rows(rows, tokens, shares_prefixes(model)),
        )

    def gradient_attempts(self, rows: Sequence[Row]) -> Iterator[Attempt]:
        """Attempts at the gradient of one optimizer step, each begun from a gradient of zero.

        Args:
            rows: the rows that the step is over; `Attempt.micro_batches` are indices of them.

        Raises:
            OutOfMemoryError: not even one row at a time fits into memory.
        """
        self.policy.train()
        optimizer: Any = self.optimizers()
        with ranks.own_random_numbers():
            for attempt in self.token_budget.attempts(self._cut(rows)):
                optimizer.zero_grad()
                yield attempt
                if attempt.shortage is not None and shards.is_sharded(self.policy):
                    told = _SHARDS_SHORTAGE.format(attempt.shortage, attempt.tokens)
                    raise OutOfMemoryError(told)

    def backward_on(self, loss: Tensor, problems: Sequence[str]) -> float:
        """Add the gradient of a micro-batch's loss.

        Args:
            loss: a scalar.
            problems: the id of each row's problem.

        Returns:
            The value of the loss.

        Raises:
            NotFiniteError: the loss is NaN or infinite; its gradient was not added.
        """
        value = float(loss.detach())
        require_finite_sum("the loss", value, problems)
        self.manual_backward(loss)
        return value

    def take_step(
        self,
        rows: Sequence[Row],
        problems: Sequence[str],
        gradient: Callable[[], Gradient],
        started: float,
    ) -> dict[str, float]:
        """Compute the gradient on every rank, sum and clip it, step the optimizer and the schedule.

        Args:
            rows: this rank's rows of the step.
            problems: the id of each row's problem, of all ranks.
            gradient: adds the gradient of this rank's rows; returns the loss as a sum over its
                micro-batches, and of each of them, sums over its tokens (see `token_means`).
            started: `time.perf_counter()` at the beginning of the step.

        Returns:
            Loss, norm of the gradient before clipping, learning rate, share of padding, token
            budget, model FLOPs utilisation (`mfu`, of the peak rate), means over tokens.

        Raises:
            NotFiniteError: the gradient's norm is NaN or infinite; no step was taken.
            RankStoppedError: another rank failed or is gone; no step was taken.
        """
        phase = f"computing the gradient of optimizer step {self.global_step + 1}"
        if shards.is_sharded(self.policy):
            # A failure is raised at once: the others wait for this rank within a backward pass.
            done = self._in_equal_passes(rows, gradient, phase)
            outcomes = ranks.gather(lambda: self._on_cpu(*done), phase)
        else:
            outcomes = ranks.gather(lambda: self._on_cpu(*gradient()), phase)
        loss = sum(part for part, _, _ in outcomes)
        sums = [one for _, parts, _ in outcomes for one in parts]
        # Ranks that ran out of memory have lowered their budget; all go on with the lowest.
        self.token_budget.tokens = min(tokens for _, _, tokens in outcomes)
        if not shards.is_sharded(self.policy):  # else backward passes have summed them
            self._sum_gradients(phase)
        optimizer: Any = self.optimizers()
        limit = float("inf") if self.max_grad_norm is None else self.max_grad_norm
        norm = float(shards.whole(nn.utils.clip_grad_norm_(self.policy.parameters(), limit)))
        require_finite_sum("the gradient norm", norm, problems)
        lr = float(optimizer.param_groups[0]["lr"])
        self.weights_moved = True
        optimizer.step()
        scheduler: Any = self.lr_schedulers()
        scheduler.step()
        shared = shares_prefixes(self.policy)  # in train mode, as the step ran
        micro_batches = cut_rows(rows, self.token_budget.tokens, shared)
        self.policy.eval()
        # One forward, one backward through activations, and one for weights if all have gradient.
        passes = 2 if is_partly_trained(self.policy) else 3
        flops = passes * forward_flops(self.policy, rows, shared) if rows else 0.0
        seconds = time.perf_counter() - started
        return {
            "loss": loss,
            "grad_norm": norm,
            "lr": lr,
            "padding_fraction": padding_fraction(rows, micro_batches, shared) if rows else 0.0,
            "tokens_per_micro_batch": float(self.token_budget.tokens),
            "mfu": flops / seconds / self.peak_flops_per_second,
            **token_means(sums),
        }

    def _in_equal_passes(
        self, rows: Sequence[Row], gradient: Callable[[], Gradient], phase: str
    ) -> Gradient:
        """Compute the gradient of this rank's rows in as many passes as every other rank makes."""
        self.policy.train()
        own = len(self._cut(rows)(self.token_budget.tokens)) if rows else 0
        most = max(ranks.gather(lambda: own, phase))
        found = gradient()
        idle = pad_rows([([self.pad_id], [self.pad_id])], self.pad_id, self.device)
        for _ in range(most - own):
            log_probs_BC, _ = shards.run(self.policy, batch_log_probs, idle, 1.0)
            self.manual_backward(0.0 * log_probs_BC.sum())
        return found

    def _on_cpu(
        self, loss: float, sums: list[dict[str, Tensor]]
    ) -> tuple[float, list[dict[str, Tensor]], int]:
        """What the other ranks are told of this rank's gradient, its token budget last."""
        if ranks.world_size() > 1:
            sums = [{name: value.cpu() for name, value in one.items()} for one in sums]
        return loss, sums, self.token_budget.tokens

    def _sum_gradients(self, phase: str) -> None:
        """Sum the gradient over ranks; a rank without rows adds zeros."""
        if ranks.world_size() == 1:
            return
        trained = [p for p in self.policy.parameters() if p.requires_grad]
        for parameter in trained:
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
        ranks.add_up([p.grad for p in trained if p.grad is not None], phase)

    def _cut(self, rows: Sequence[Row]) -> Callable[[int], list[list[int]]]:
        shared = shares_prefixes(self.policy)
        return lambda tokens: cut_rows(rows, tokens, shared)

    @property
    def peak_flops_per_second(self) -> float:
        """Of a large matrix product in the precision that the policy computes in."""
        dtype = torch.bfloat16 if "bf16" in str(self.trainer.precision) else self.policy.dtype
        return matmul_flops_per_second(self.device, dtype)
