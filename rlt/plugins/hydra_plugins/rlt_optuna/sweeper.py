"""A Hydra sweeper that keeps its Optuna study: a stopped study resumes when it is started again.

The values of a trial name the folder of its job, so an interrupted trial resumes from its last
checkpoint. A failed trial is recorded as failed and does not stop the study; the sweep's jobs.jsonl
has the reason. (The published hydra-optuna-sweeper requires Optuna below 3, starts every trial
again, and ends if a trial has no number.)
"""

import logging
import math
from collections.abc import Iterable, Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import IntervalSweep, Override, Transformer
from hydra.core.plugins import Plugins
from hydra.core.utils import JobReturn
from hydra.errors import HydraException
from hydra.plugins.launcher import Launcher
from hydra.plugins.sweeper import Sweeper
from hydra.types import HydraContext, TaskFunction
from omegaconf import DictConfig, OmegaConf

from rlt.config.suggestions import did_you_mean
from rlt.runs.jobs import JobFailedError

log = logging.getLogger(__name__)

_SAMPLERS = ("TPESampler", "RandomSampler", "GPSampler")


class NoSuchMetricError(ValueError):
    """A job has finished, without the metric that the study is about."""


class OptunaSweeper(Sweeper):
    """Proposes values for the swept keys and learns from the metric that came out.

    Args:
        params: swept key → `interval(low, high)`, `tag(log, interval(low, high))`, or a choice
            `a,b,c`; other keys have one value each. The same may stand on the command line.
        metric: name of the final metric.
        direction: `maximize` or `minimize` it.
        n_trials: trials in all, those of an earlier start counted.
        n_jobs: trials proposed at once; take the launcher's number of jobs.
        seeds: each trial runs once with each; its value is their mean.
        sampler: class of `optuna.samplers`.
        sampler_seed: with a trial's number, it seeds what is proposed.
        storage: where the study is kept (any URL that Optuna takes).
        study_name: its name there.

    Raises:
        ValueError: an option that Optuna does not know, a sweep that it cannot propose, a metric
            that a finished job has not, or Optuna is not installed.
        HydraException: a choice that does not compose.
    """

    def __init__(
        self,
        params: dict[str, str] | None,
        metric: str,
        direction: str,
        n_trials: int,
        n_jobs: int,
        seeds: list[int],
        sampler: str,
        sampler_seed: int,
        storage: str,
        study_name: str,
    ) -> None:
        if direction not in ("maximize", "minimize"):
            raise ValueError(
                f"hydra.sweeper.direction={direction}: choose maximize or minimize"
                f"{did_you_mean(direction, ('maximize', 'minimize'))}"
            )
        if sampler not in _SAMPLERS:
            raise ValueError(
                f"hydra.sweeper.sampler={sampler}: choose {', '.join(_SAMPLERS)}"
                f"{did_you_mean(sampler, _SAMPLERS)}"
            )
        for name, value in {"n_trials": n_trials, "n_jobs": n_jobs, "seeds": len(seeds)}.items():
            if value < 1:
                raise ValueError(f"hydra.sweeper.{name}={value}: must be at least 1")
        self.params = params or {}
        self.metric = metric
        self.direction = direction
        self.n_trials = n_trials
        self.n_jobs = n_jobs
        self.seeds = seeds
        self.sampler = sampler
        self.sampler_seed = sampler_seed
        self.storage = storage
        self.study_name = study_name
        self.launcher: Launcher
        self.config: DictConfig

    def setup(
        self, *, hydra_context: HydraContext, task_function: TaskFunction, config: DictConfig
    ) -> None:
        """Keep the config and make the launcher that Hydra was asked for."""
        self.config = config
        self.hydra_context = hydra_context
        self.launcher = Plugins.instance().instantiate_launcher(
            hydra_context=hydra_context, task_function=task_function, config=config
        )

    def sweep(self, arguments: list[str]) -> Any:
        """Run the study until it has `n_trials` trials.

        Args:
            arguments: overrides of the command line, besides `params`.

        Raises:
            ValueError: Optuna is not installed, nothing is swept, or the study began otherwise.
            JobFailedError: a trial failed before this start.
            Exception: the first error of a trial that failed now, once the study is done.
        """
        try:
            import optuna
        except ImportError as error:
            raise ValueError(
                "hydra/sweeper=optuna needs Optuna: pip install 'rlt[sweep]'"
            ) from error
        given = [f"{key}={value}" for key, value in self.params.items()] + arguments
        fixed, space = _fixed_and_swept(OverridesParser.create().parse_overrides(given))
        if "seed" in space or any(one.startswith("seed=") for one in fixed):
            raise ValueError("seed: a study names its seeds by hydra.sweeper.seeds=[0,1]")
        if not space:
            raise ValueError(
                "hydra/sweeper=optuna: nothing to propose values for; give hydra.sweeper.params "
                "such as {optim.lr: 'tag(log, interval(1e-6, 1e-4))'}"
            )
        self._require_that_choices_compose(fixed, space)
        optuna.logging.set_verbosity(optuna.logging.WARNING)
        checking = bool(self.config.get("check"))  # one trial of no study: nothing is written
        folder = Path(self.config.hydra.sweep.dir)
        if not checking:
            folder.mkdir(parents=True, exist_ok=True)
        study = optuna.create_study(
            storage=None if checking else self.storage,
            study_name=self.study_name,
            direction=optuna.study.StudyDirection[self.direction.upper()],
            load_if_exists=True,
        )
        self._require_the_same(study, fixed)
        if not checking:  # the command of a study that it goes on with, or begins
            OmegaConf.save(self.config, folder / "multirun.yaml")
        errors: list[Exception] = []
        while numbers := self._next_trials(study, space):
            trials = self._composed(study, numbers, fixed, errors)
            if not trials:
                continue
            flat = [job for jobs in trials.values() for job in jobs]
            ended = self.launcher.launch(flat, initial_job_idx=numbers[0] * len(self.seeds))
            if checking:
                return [job.return_value for job in ended]
            returns = iter(ended)
            for number, jobs in trials.items():
                self._tell(study, number, [next(returns) for _ in jobs], errors)
        done = study.get_trials(deepcopy=False, states=[optuna.trial.TrialState.COMPLETE])
        if done:
            best = study.best_trial
            values = ", ".join(f"{key}={value}" for key, value in best.params.items())
            log.info("best of %d: trial %d with %s", len(done), best.number, values)
        failed = study.get_trials(deepcopy=False, states=[optuna.trial.TrialState.FAIL])
        if errors:
            raise errors[0]
        if failed:
            told = f"{len(failed)} of {len(study.trials)} trials failed before this start"
            raise JobFailedError(told, str(folder), str(folder))
        return None

    def _next_trials(self, study: Any, space: dict[str, Any]) -> list[int]:
        """Numbers of the trials to run now: those under way, and new ones beside them."""
        import optuna

        begun = study.get_trials(deepcopy=False)
        running = optuna.trial.TrialState.RUNNING
        numbers = [trial.number for trial in begun if trial.state == running]
        left = self.n_trials - len(begun)
        # Seeded by the trial's number: a study that goes on proposes what it would have.
        study.sampler = getattr(optuna.samplers, self.sampler)(
            seed=self.sampler_seed * 1_000_003 + len(begun)
        )
        new = min(self.n_jobs - len(numbers), left)
        return numbers + [study.ask(space).number for _ in range(new)]

    def _composed(
        self, study: Any, numbers: list[int], fixed: list[str], errors: list[Exception]
    ) -> dict[int, list[list[str]]]:
        """Overrides of each trial's jobs; a trial whose values do not go together has failed."""
        trials = {}
        for number in numbers:
            jobs = self._jobs_of(study.trials[number].params, fixed)
            try:
                self._compose(jobs[0])
                trials[number] = jobs
            except HydraException as error:
                self._fail(study, number, error, errors)
        return trials

    def _tell(
        self, study: Any, number: int, returns: list[JobReturn], errors: list[Exception]
    ) -> None:
        """Tell the study what came out of a trial.

        Raises:
            NoSuchMetricError: nor has any other trial had it. It may be misspelt: nothing is lost.
        """
        from optuna.trial import TrialState

        try:
            value = self._value_of(returns)
            study.tell(number, value)
            log.info("trial %d: %s = %.6g", number, self.metric, value)
        except Exception as error:  # whatever a job may raise
            known = study.get_trials(deepcopy=False, states=[TrialState.COMPLETE])
            if isinstance(error, NoSuchMetricError) and not known:
                raise
            self._fail(study, number, error, errors)

    def _fail(self, study: Any, number: int, error: Exception, errors: list[Exception]) -> None:
        from optuna.trial import TrialState

        errors.append(error)
        study.tell(number, state=TrialState.FAIL)
        log.warning("trial %d failed: %s", number, error)

    def _compose(self, overrides: list[str]) -> DictConfig:
        """A job's config; raises HydraException if there is none."""
        assert self.hydra_context is not None
        return self.hydra_context.config_loader.load_sweep_config(self.config, overrides)

    def _require_that_choices_compose(self, fixed: list[str], space: dict[str, Any]) -> None:
        """Raises HydraException for a choice that gives no config, beside the others' first."""
        first = {key: d.choices[0] if hasattr(d, "choices") else d.low for key, d in space.items()}
        for key, distribution in space.items():
            for value in getattr(distribution, "choices", (first[key],)):
                self._compose(self._jobs_of(first | {key: value}, fixed)[0])

    def _require_the_same(self, study: Any, fixed: list[str]) -> None:
        """Raises ValueError when the study has values of something else than is asked for now.

        As long as it has none, another metric may be named.
        """
        from optuna.trial import TrialState

        begun = bool(study.get_trials(deepcopy=False, states=[TrialState.COMPLETE]))
        asked = {
            "metric": self.metric,
            "direction": self.direction,
            "seeds": list(self.seeds),
            "fixed": sorted(one for one in fixed if not one.startswith("output_dir=")),
        }
        for name, value in asked.items():
            known = study.user_attrs.get(name, value)
            if known != value and (begun or name != "metric"):
                raise ValueError(
                    f"hydra.sweeper: the study in {self.storage} was begun with {name} {known}, "
                    f"not {value}; give the sweep another output_dir"
                )
            study.set_user_attr(name, value)

    def _jobs_of(self, values: dict[str, Any], fixed: Sequence[str]) -> list[list[str]]:
        """The overrides of a trial's jobs, one for each seed."""
        proposed = [f"{key}={value}" for key, value in values.items()]
        return [[*fixed, *proposed, f"seed={seed}"] for seed in self.seeds]

    def _value_of(self, returns: Iterable[JobReturn]) -> float:
        """Mean of the metric over a trial's jobs.

        Raises:
            Exception: what a job has raised.
            NoSuchMetricError: a job has no such metric.
            ValueError: it is no number.
        """
        values = []
        for job in list(returns):
            metrics: dict[str, float] = job.return_value
            if self.metric not in metrics:
                raise NoSuchMetricError(
                    f"hydra.sweeper.metric={self.metric}: the job has no such metric"
                    f"{did_you_mean(self.metric, metrics)}"
                )
            if not math.isfinite(metrics[self.metric]):
                raise ValueError(f"{self.metric} is {metrics[self.metric]}")
            values.append(float(metrics[self.metric]))
        return fmean(values)


def _fixed_and_swept(overrides: Sequence[Override]) -> tuple[list[str], dict[str, Any]]:
    """Overrides that are the same in each job, and Optuna's distribution of each swept key."""
    fixed: dict[str, str] = {}
    space: dict[str, Any] = {}
    for override in overrides:
        key = override.get_key_element()
        fixed.pop(key, None)  # the command line comes last
        space.pop(key, None)
        if override.is_sweep_override():
            space[key] = _distribution(override)
        else:
            fixed[key] = f"{key}={override.get_value_element_as_str()}"
    return list(fixed.values()), space


def _distribution(override: Override) -> Any:
    from optuna.distributions import (
        CategoricalDistribution,
        FloatDistribution,
        IntDistribution,
    )

    value = override.value()
    if isinstance(value, IntervalSweep):
        low, high, is_log = value.start, value.end, "log" in value.tags
        assert low is not None and high is not None
        if isinstance(low, int) and isinstance(high, int):
            return IntDistribution(low, high, log=is_log)
        return FloatDistribution(low, high, log=is_log)
    choices: list[Any] = list(override.sweep_iterator(transformer=Transformer.encode))
    return CategoricalDistribution(choices)
