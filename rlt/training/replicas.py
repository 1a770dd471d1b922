"""Lightning's strategy for several devices that each hold a whole copy of the model."""

import torch
from lightning.pytorch.strategies import DDPStrategy


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
