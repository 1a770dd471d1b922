"""Lightning's strategies for several devices: whole copies of the model, or one in shards."""

from collections.abc import Mapping
from typing import Any

import torch
from lightning.fabric.plugins.environments.slurm import SLURMEnvironment
from lightning.pytorch.strategies import DDPStrategy, ModelParallelStrategy, Strategy
from transformers import PreTrainedModel

from rlt.llm import shards
from rlt.runs import ranks

STRATEGIES = ("auto", "ddp", "fsdp")
OTHER_STRATEGY = "hardware.strategy: on several devices, choose ddp or fsdp (auto is ddp)"


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


class Shards(ModelParallelStrategy):
    """Each rank holds a part of the policy (`rlt.llm.shards`); backward passes sum gradients.

    A checkpoint is that of one process. Here its tensors are the live parts; whoever writes them
    gathers them, and every rank cuts its own parts out of what is loaded.
    """

    def __init__(self) -> None:
        super().__init__(data_parallel_size=ranks.world_size(), tensor_parallel_size=1)

    def setup_environment(self) -> None:
        """Leave random numbers as they are; Lightning would set them back to the seed."""
        with torch.random.fork_rng(devices=[]):
            super().setup_environment()

    def shard_(self, model: PreTrainedModel) -> PreTrainedModel:
        """Divide a model among the ranks; what is returned is for `rlt.llm.shards.plain_copy`."""
        under_autocast = str(self.precision_plugin.precision) == "bf16-mixed"
        dtype = torch.bfloat16 if under_autocast else None
        return shards.shard_(model, self.device_mesh["data_parallel"], dtype)

    @property
    def lightning_restore_optimizer(self) -> bool:
        """Optimizers are restored from the checkpoint, by `load_optimizer_state_dict`."""
        return True

    def lightning_module_state_dict(self) -> dict[str, Any]:
        """The live weights, in parts."""
        return Strategy.lightning_module_state_dict(self)

    def optimizer_state(self, optimizer: torch.optim.Optimizer) -> dict[str, Any]:
        """The live state of an optimizer, in parts."""
        return Strategy.optimizer_state(self, optimizer)

    def load_checkpoint(self, checkpoint_path: Any, weights_only: bool | None = None) -> Any:
        """The whole checkpoint, on every rank."""
        return Strategy.load_checkpoint(self, checkpoint_path, weights_only)

    def load_model_state_dict(self, checkpoint: Mapping[str, Any], strict: bool = True) -> None:
        """Take this rank's parts of the weights."""
        assert self.lightning_module is not None
        own = self.lightning_module.state_dict()
        self.lightning_module.load_state_dict(shards.divided(checkpoint["state_dict"], own))

    def load_optimizer_state_dict(self, checkpoint: Mapping[str, Any]) -> None:
        """Take this rank's parts of the optimizers' states."""
        for optimizer, state in zip(self.optimizers, checkpoint["optimizer_states"], strict=True):
            optimizer.load_state_dict(shards.divided_optimizer_state(state, optimizer))


def trainer_settings(strategy: Any) -> dict[str, Any]:
    """Arguments of the Trainer by which a run's ranks divide the work.

    Args:
        strategy: the config's.

    Raises:
        ValueError: there are several ranks, and training is not made for this strategy.
    """
    if ranks.world_size() == 1:
        return {"strategy": "auto"} if strategy in STRATEGIES else {}
    if strategy not in STRATEGIES:
        raise ValueError(OTHER_STRATEGY)
    # Lightning's own requeueing would write checkpoints beside these.
    environment = SLURMEnvironment(auto_requeue=False) if SLURMEnvironment.detect() else None
    if strategy != "fsdp":
        replicas = Replicas(cluster_environment=environment)
        return {"strategy": replicas, "use_distributed_sampler": False}
    divided = Shards()
    divided.cluster_environment = environment
    # Weights that are gathered in inference mode could not be trained afterwards.
    return {"strategy": divided, "use_distributed_sampler": False, "inference_mode": False}
