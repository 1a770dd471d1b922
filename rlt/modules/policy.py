"""What both modules share: one trained model, stepped by hand so that a batch may be cut anywhere.

Loss weights are computed over the whole optimizer batch before it is cut into micro-batches by
token budget; micro-batches then add up to the same gradient, whatever the cut.
"""

import time
from collections.abc import Callable, Sequence
from typing import Any

import lightning as L
import torch
from torch import Tensor, nn

from rlt.batching import Row, cut_rows, padding_share
from rlt.flops import forward_flops, matmul_flops_per_second
from rlt.logprobs import shares_prefixes


class PolicyModule(L.LightningModule):
    """Holds the trained model under the name `policy` and steps its optimizer.

    Args:
        policy: the trained language model.
        views: prompt style and tokenizer.
        optim: makes the optimizer from parameters (config: `_partial_`).
        schedule: makes the schedule from optimizer and `num_training_steps` (config: `_partial_`).
        optimizer_steps: length of the schedule.
        max_grad_norm: gradients are clipped to this norm; None leaves them.
        tokens_per_micro_batch: padded tokens per forward and backward pass.
        gradient_checkpointing: trade time for memory in the backward pass.
    """

    def __init__(
        self,
        policy: Any,
        views: Any,
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
        self.views = views
        self.optim = optim
        self.schedule = schedule
        self.optimizer_steps = optimizer_steps
        self.max_grad_norm = max_grad_norm
        self.tokens_per_micro_batch = tokens_per_micro_batch
        if gradient_checkpointing:
            # transformers renames the method, and warns of the old name
            name = "activation_checkpointing_enable"
            enable = getattr(policy, name, None) or policy.gradient_checkpointing_enable
            enable({"use_reentrant": False})

    def configure_optimizers(self) -> Any:
        optimizer = self.optim(self.policy.parameters())
        schedule = self.schedule(optimizer=optimizer, num_training_steps=self.optimizer_steps)
        return {"optimizer": optimizer, "lr_scheduler": schedule}

    def on_fit_start(self) -> None:
        self.policy.train()  # where Lightning expects it; every phase then sets its own mode

    @property
    def pad_id(self) -> int:
        return int(self.views.tokenizer.pad_token_id)

    def optimizer_step_on(
        self, rows: Sequence[Row], loss_of: Callable[[list[int]], Tensor]
    ) -> dict[str, float]:
        """One optimizer step over `rows`.

        Args:
            loss_of: weighted loss of the rows at the given indices, to be summed over all of them.

        Raises:
            ValueError: the loss or the gradient's norm is NaN or infinite; no step was taken.
        """
        started = time.perf_counter()
        self.policy.train()
        optimizer: Any = self.optimizers()
        optimizer.zero_grad()
        total = 0.0
        shared = shares_prefixes(self.policy)
        batches = cut_rows(rows, self.tokens_per_micro_batch, shared)
        for indices in batches:
            loss = loss_of(indices)
            total += float(loss.detach())
            self.manual_backward(loss)
        limit = float("inf") if self.max_grad_norm is None else self.max_grad_norm
        norm = float(nn.utils.clip_grad_norm_(self.policy.parameters(), limit))
        if not (torch.isfinite(torch.tensor([total, norm])).all()):
            raise ValueError(
                f"step {self.global_step}: loss {total}, gradient norm {norm}; no step was taken. "
                "Lower optim.lr, or look at the last samples and reward terms"
            )
        lr = float(optimizer.param_groups[0]["lr"])
        optimizer.step()
        scheduler: Any = self.lr_schedulers()
        scheduler.step()
        self.policy.eval()
        flops = 3 * forward_flops(self.policy, rows, shared)  # forward, and twice that backward
        seconds = time.perf_counter() - started
        return {
            "loss": total,
            "grad_norm": norm,
            "lr": lr,
            "padding_share": padding_share(rows, batches, shared),
            "mfu": flops / seconds / self.peak_flops_per_second,
        }

    @property
    def peak_flops_per_second(self) -> float:
        """Of a large matrix product in the precision that the policy computes in."""
        dtype = torch.bfloat16 if "bf16" in str(self.trainer.precision) else self.policy.dtype
        return matmul_flops_per_second(self.device, dtype)
