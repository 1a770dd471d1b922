"""Supervised fine-tuning on given targets: pretraining, the teacher's warm-up, distillation.

The loss is the mean negative log-likelihood of the target tokens of the whole batch; prompts get
none. Run by `rlt stage=pretrain`, `stage=teacher_sft` and `stage=distill`.
"""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from rlt.data.batches import Batch
from rlt.data.renderer import Renderer
from rlt.llm.batching import Row, pad_rows
from rlt.llm.finite_checks import require_finite
from rlt.llm.logprobs import batch_log_probs
from rlt.llm.shards import run, whole_weights
from rlt.runs import ranks
from rlt.training.policy import PolicyModule, names_the_step


@dataclass(frozen=True)
class Example:
    """Token ids of a prompt (no loss) and of the target that follows it (loss).

    Attributes:
        id: its problem's.
    """

    prompt: list[int]
    target: list[int]
    id: str


class SFT(PolicyModule):
    """Trains a model on examples.

    Args:
        answer_accuracy: called at each validation with the policy; gives the share of held-out
            questions it answers right, or None to leave that out. For the rest, see `PolicyModule`.
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
        answer_accuracy: Callable[[PreTrainedModel], float] | None = None,
    ) -> None:
        super().__init__(
            policy, renderer, optim, schedule, optimizer_steps, max_grad_norm,
            tokens_per_micro_batch, gradient_checkpointing,
        )  # fmt: skip
        self.answer_accuracy = answer_accuracy

    @names_the_step
    def training_step(self, batch: Batch, batch_idx: int) -> None:
        """One optimizer step over the examples of a batch."""
        started = time.perf_counter()
        rows, ids = rows_of(batch.items), [example.id for example in batch.items]
        target_tokens = sum(len(target) for _, target in rows)
        own = ranks.own_part(len(rows))
        own_rows = [rows[i] for i in own]

        def gradient() -> tuple[float, list[dict[str, Tensor]]]:
            for attempt in self.gradient_attempts(own_rows):
                with attempt:  # where memory runs out, this begins again with smaller micro-batches
                    loss, sums = 0.0, []
                    for indices in attempt.micro_batches:
                        part = self.micro_batch(
                            [own_rows[i] for i in indices],
                            target_tokens,
                            [ids[own[i]] for i in indices],
                        )
                        loss += part[0]
                        sums.append(part[1])
            return loss, sums

        stats = self.take_step(own_rows, ids, gradient, started)
        seconds = time.perf_counter() - started
        self.log_dict(
            {
                "train/grad_norm": stats["grad_norm"],
                "train/lr": stats["lr"],
                "train/entropy": stats["entropy"],
                "train/target_tokens": float(target_tokens),
                "train/padding_fraction": stats["padding_fraction"],
                "train/tokens_per_micro_batch": stats["tokens_per_micro_batch"],
                "time/train_mfu": stats["mfu"],
            },
            batch_size=len(batch),
        )
        self.log("train/loss", stats["loss"], prog_bar=True, batch_size=len(batch))
        tokens = sum(len(prompt) + len(target) for prompt, target in rows)
        self.log("time/train_tokens_per_second", tokens / seconds, prog_bar=True, batch_size=1)

    def micro_batch(
        self, rows: Sequence[Row], target_tokens: int, ids: Sequence[str]
    ) -> tuple[float, dict[str, Tensor]]:
        """Add the gradient of a micro-batch; its loss, and sums over its tokens.

        Args:
            rows: the micro-batch.
            target_tokens: of the whole batch, over which the loss is a mean.
            ids: of the rows' problems.
        """
        padded = pad_rows(rows, self.pad_id, self.device)
        log_probs_BC, entropy_BC = run(self.policy, batch_log_probs, padded, self.temperature)
        sums = {"tokens": padded.mask_BC.sum(), "entropy": entropy_BC.sum()}
        return self.backward_on(-log_probs_BC.sum() / target_tokens, ids), sums

    @names_the_step
    def validation_step(self, batch: Batch, batch_idx: int) -> None:
        """Log the mean loss over the target tokens of held-out examples."""
        rows = rows_of(batch.items)
        own = [rows[i] for i in ranks.own_part(len(rows))]
        with whole_weights(self.policy):
            log_probs = ranks.gather_parts(
                lambda: [values.cpu() for values in self.row_log_probs(self.policy, own)],
                "computing the validation loss",
            )
        require_finite("a log-prob", log_probs, [example.id for example in batch.items])
        tokens = sum(len(values) for values in log_probs)
        loss = -sum(float(values.sum()) for values in log_probs) / tokens
        self.log("validation/loss", loss, prog_bar=True, batch_size=tokens)

    def on_validation_epoch_end(self) -> None:
        """Log the share of held-out questions that the policy answers right."""
        if self.answer_accuracy is not None:
            self.policy.eval()
            with whole_weights(self.policy):
                accuracy = self.answer_accuracy(self.policy)
            self.log("validation/answer_accuracy", accuracy, prog_bar=True, batch_size=1)


def rows_of(examples: Sequence[Example]) -> list[Row]:
    """Prompt and target of each example, as token ids."""
    return [(example.prompt, example.target) for example in examples]
