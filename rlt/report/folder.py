"""The content of a run folder. Missing files read as empty, so any run can have a report."""

import json
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf

from rlt.config.allowed_targets import resolve_target
from rlt.evaluation.benchmark import AnswerRecord
from rlt.report.events import Scalars, read_scalars


def read_jsonl(file: Path) -> list[dict[str, Any]]:
    """Return the rows of a JSONL file, without a last line that was only partly written."""
    if not file.is_file():
        return []
    with file.open(encoding="utf-8", newline="\n") as lines:
        return [json.loads(line) for line in lines if line.endswith("\n") and line.strip()]


def read_traces(folder: Path) -> list[dict[str, Any]]:
    """Return the rows of traces.parquet, or of traces.jsonl if there is no such file."""
    parquet = folder / "traces.parquet"
    if parquet.is_file():
        import pyarrow.parquet

        rows: list[dict[str, Any]] = pyarrow.parquet.read_table(parquet).to_pylist()
        return rows
    return read_jsonl(folder / "traces.jsonl")


def read_json_object(file: Path) -> dict[str, Any]:
    """Return the object in a JSON file, or an empty one if there is no such file."""
    if not file.is_file():
        return {}
    content = json.loads(file.read_text(encoding="utf-8"))
    assert isinstance(content, dict), file
    return content


def read_json_list(file: Path) -> list[dict[str, Any]]:
    """Return the list of objects in a JSON file.

    Raises:
        FileNotFoundError: there is no such file.
    """
    content = json.loads(file.read_text(encoding="utf-8"))
    assert isinstance(content, list), file
    return content


@dataclass
class Run:
    """One run folder. Missing files read as empty.

    Args:
        metrics_given: the final metrics if they are already known; None reads metrics.json.
    """

    folder: Path
    metrics_given: dict[str, float] | None = field(default=None, repr=False)

    @cached_property
    def manifest(self) -> dict[str, Any]:
        """The content of manifest.json."""
        return read_json_object(self.folder / "manifest.json")

    @cached_property
    def stage_class(self) -> Any:
        """The class of the run's stage; None if it cannot be found."""
        try:
            return resolve_target(str(self.config.get("_target_")))
        except ValueError:
            return None

    @cached_property
    def metrics(self) -> dict[str, float]:
        """Final metrics by name."""
        return self.metrics_given or read_json_object(self.folder / "metrics.json")

    @cached_property
    def config(self) -> dict[str, Any]:
        """The resolved config that the run was started with."""
        file = self.folder / "config.yaml"
        content = OmegaConf.to_container(OmegaConf.load(file)) if file.is_file() else {}
        assert isinstance(content, dict), file
        return {str(key): value for key, value in content.items()}

    @cached_property
    def stage(self) -> str:
        """The name of the stage, or `run` if the folder does not tell."""
        return str(self.manifest.get("stage") or self.config.get("stage") or "run")

    @cached_property
    def scalars(self) -> Scalars:
        """Every TensorBoard scalar as (step, value) pairs with ascending steps."""
        return read_scalars(self.folder)

    @cached_property
    def traces(self) -> list[dict[str, Any]]:
        """Rows of the collected traces."""
        return read_traces(self.folder)

    @cached_property
    def scores(self) -> list[dict[str, Any]]:
        """Rows of `stage=score`, best first."""
        return read_jsonl(self.folder / "scores.jsonl")

    @cached_property
    def preflight(self) -> list[dict[str, Any]]:
        """Areas under the ROC curve of the reward and its terms (see `rlt.rewards.preflight`)."""
        file = self.folder / "preflight.json"
        return read_json_list(file) if file.is_file() else []

    @cached_property
    def samples(self) -> list[dict[str, Any]]:
        """Rows of samples.jsonl: explanations that were written during RL."""
        return read_jsonl(self.folder / "samples.jsonl")

    @cached_property
    def held_out_rewards(self) -> dict[int, dict[str, float]]:
        """Mean reward of each held-out problem, by step of the validation."""
        steps: dict[int, dict[str, float]] = {}
        for row in read_jsonl(self.folder / "held_out_rewards.jsonl"):
            steps.setdefault(int(row["step"]), {})[row["problem_id"]] = float(row["reward"])
        return steps

    @cached_property
    def answers(self) -> list[AnswerRecord]:
        """Graded answers of an evaluation; fields that this version does not know are dropped."""
        known = AnswerRecord.__dataclass_fields__
        return [
            AnswerRecord(**{key: value for key, value in row.items() if key in known})
            for row in read_jsonl(self.folder / "answers.jsonl")
        ]

    @property
    def note(self) -> str:
        """The note of the config on its numbers; empty if there is none."""
        return str(self.config.get("note") or "")

    @property
    def benchmark_name(self) -> str:
        """The name of the benchmark in the config; empty if there is none."""
        node = self.config.get("benchmark")
        return str(node.get("name", "")) if isinstance(node, dict) else ""
