"""`rlt stage=pretrain`: a base model from scratch, with the SFT module."""

from omegaconf import DictConfig

from rlt.config.build import build
from rlt.runs.folder import RunFolder
from rlt.stages.common import fit_sft, load_data, load_renderer
from rlt.stages.examples import require_explanations, student_examples, without_explanation


def run(cfg: DictConfig, run: RunFolder) -> dict[str, float]:
    renderer = load_renderer(cfg, "student")
    split = load_data(build(cfg.data), renderer)
    run.record(data=split.report | {"without_explanation": without_explanation(split.train)})
    require_explanations(split.train)
    validation = student_examples(split.validation, renderer)
    return fit_sft(
        cfg, run, "student", renderer, student_examples(split.train, renderer), validation
    )
