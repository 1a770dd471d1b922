"""Lightning's strategy for several devices that each hold a whole copy of the model."""

from typing import Any

import torch
from lightning.fabric.plugins.environments.slurm import SLURMEnvironment
from lightning.pytorch.strategies import DDPStrategy

STRATEGIES = ("auto", "ddp")
OTHER_STRATEGY = (
    "hardware.strategy: training divides its work among devices by ddp alone yet; choose "
    "hardware=ddp"
)


class Replicas(DDPStrategy):
    """A copy of the model on each rank, whose gradients the module itself sums.

    `DistributedDataParallel` would sum gradients in each backward pass, so that every rank would
    need as many micro-batches as the others. `PolicyModule` sums them once an optimizer step.
    """

    def setup_environment(self) -> None:
        """Leave random numbers as they are; Lightning would set them back to the seed."""
        with torch.random.fork_rng(devices=[]):
            super().setup_environment()

    def configure_ddp(self) -> None:
        """Nothing is wrapped; all ranks begin with the weights of rank 0."""
        assert self.model is not None
        for tensor in [*self.model.parameters(), *self.model.buffers()]:
            torch.distributed.broadcast(tensor.data, src=0)


def settings_of_ranks(strategy: Any) -> dict[str, Any]:
    """Arguments of the Trainer for several ranks, which the module divides the work among.

    Args:
        strategy: the config's.

    Raises:
        ValueError: training is not made for it.
    """
    if strategy not in STRATEGIES:
        raise ValueError(OTHER_STRATEGY)
    # Lightning's own requeueing would write checkpoints beside these.
    environment = SLURMEnvironment(auto_requeue=False) if SLURMEnvironment.detect() else None
    replicas = Replicas(cluster_environment=environment)
    return {"strategy": replicas, "use_distributed_sampler": False}
