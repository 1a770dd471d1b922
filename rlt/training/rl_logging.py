"""What a module of RL logs at its steps; docs/metrics.md defines each metric."""

from typing import TYPE_CHECKING, Any

from rlt.data.dataset import Behaviour
from rlt.evaluation.statistics import roc_area_interval
from rlt.training.correction import mismatch
from rlt.training.credit import within_completions
from rlt.training.rollout_batch import RolloutBatch
from rlt.training.rollout_metrics import behaviours, completion_metrics, hacking_monitors

if TYPE_CHECKING:
    from rlt.training.rl import RL


def log_rollout(module: "RL", prefix: str, rollout: RolloutBatch) -> None:
    """Log rewards, means over the completions and seconds of a scored rollout.

    Args:
        module: logs to its trainer.
        prefix: `train` or `validation`.
        rollout: scored completions.
    """
    N, rewards_PG = len(rollout), rollout.rewards_PG
    values = {f"{prefix}/reward_std": float(rewards_PG.std(1).mean())}
    for name, value in completion_metrics(rollout, module.behaviour).items():
        values[f"{prefix}/{name}"] = value
    for name, seconds in rollout.seconds.items():
        values[f"time/{prefix}_{name}_seconds"] = seconds
    module.log_dict(values, batch_size=N)
    module.log(f"{prefix}/reward", float(rewards_PG.mean()), prog_bar=True, batch_size=N)


def log_step(module: "RL", rollout: RolloutBatch, stats: dict[str, float], monitored: bool) -> None:
    """Log a training step.

    Args:
        module: logs to its trainer.
        rollout: that the policy was updated on.
        stats: of the update's last optimizer step.
        monitored: look for reward hacking, which runs the reward's student once more.
    """
    log_rollout(module, "train", rollout)
    module.log("time/train_mfu", stats["mfu"])
    values = {f"policy/{name}": value for name, value in stats.items() if name != "mfu"}
    module.log_dict(values, batch_size=1)
    speed = sum(rollout.lengths) / sum(rollout.seconds.values())
    module.log("time/train_tokens_per_second", speed, prog_bar=True)
    P = len(rollout) // rollout.group_size
    idle_P = (rollout.advantages_NT.reshape(P, -1) == 0).all(1)
    module.log("policy/zero_advantage_rate", idle_P.float().mean())
    inside = within_completions(rollout.advantages_NT, rollout.lengths)
    module.log("policy/token_credit_fraction", inside)
    if rollout.sampler_ratios is not None:
        values = mismatch(rollout.sampler_ratios, module.algorithm.correction_cap)
        module.log_dict({f"policy/mismatch_{name}": value for name, value in values.items()})
    if monitored:
        values = hacking_monitors(rollout, module.task)
        if "entropy" in stats:  # no token had a loss if every completion was left out
            values["entropy"] = stats["entropy"]
        module.log_dict({f"monitor/{name}": value for name, value in values.items()})


class HeldOutRewards:
    """Rewards of held-out problems in one validation.

    Attributes:
        rows: `problem_id` and the mean `reward` of its group, of each problem.
    """

    def __init__(self) -> None:
        self.rows: list[dict[str, Any]] = []
        self._judged: list[tuple[str, bool, float]] = []  # problem, is good, reward

    def add(self, rollout: RolloutBatch, behaviour: Behaviour | None) -> None:
        """Take in a scored rollout; `behaviour` says which of its completions are good."""
        firsts = rollout.problems[:: rollout.group_size]
        self.rows += [
            {"problem_id": problem.id, "reward": float(rewards_G.mean())}
            for problem, rewards_G in zip(firsts, rollout.rewards_PG, strict=True)
        ]
        if behaviour is not None:
            marks = [name in behaviour.good for name in behaviours(rollout, behaviour)]
            rewards = rollout.reward_table.rewards
            self._judged += zip(rollout.problem_ids, marks, rewards, strict=True)

    def area(self) -> float | None:
        """How well the reward tells good completions from bad: the area under the ROC curve.

        None where there are not both good and bad ones.
        """
        marks = [is_good for _, is_good, _ in self._judged]
        if not 0 < sum(marks) < len(marks):
            return None
        rewards, problems = [row[2] for row in self._judged], [row[0] for row in self._judged]
        return roc_area_interval(rewards, marks, problems, resamples=1).mean
