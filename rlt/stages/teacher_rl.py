"""`rlt stage=teacher_rl`: the teacher learns to write what teaches its student best.

The student in the reward is the reference model (`reward_student=reference`, as the published
code has it) or `model@student`. Weights that are the same are in memory once.
"""

import copy
import logging
from collections.abc import Mapping

import torch
from omegaconf import DictConfig
from transformers import PreTrainedModel

from rlt.config.build import build
from rlt.data.dataset import ProblemData
from rlt.data.problem import Problem
from rlt.data.renderer import Renderer
from rlt.llm.device import device_of, on_device
from rlt.llm.models import LanguageModel, context_tokens, fingerprint, freeze
from rlt.rewards import Reward, RewardScorer
from rlt.rewards.preflight import Area, Preflight
from rlt.runs.files import read_json
from rlt.runs.folder import RunFolder
from rlt.stages.common import (
    load_data,
    load_model,
    load_renderer,
    require_same_tokenizer,
    source_of,
)
from rlt.stages.preflight import PREFLIGHT_FILE, metrics_of, preflight_areas, tell_areas
from rlt.stages.rl import fit_rl, record_weights
from rlt.training import Teaching
from rlt.training.algorithms import Algorithm
from rlt.training.credit import Credit

log = logging.getLogger(__name__)


def run(cfg: DictConfig, run: RunFolder) -> dict[str, float]:
    renderer = load_renderer(cfg, "teacher")
    check_student_choice(cfg)
    if cfg.reward_student == "student":
        require_same_tokenizer(renderer.tokenizer, source_of(cfg, "student").tokenizer())
    algorithm: Algorithm = build(cfg.algorithm)
    reward: Reward = build(cfg.reward)
    credit: Credit = build(cfg.credit)
    check_credit(credit, reward)
    data: ProblemData = build(cfg.data)
    split = load_data(data, renderer)
    run.record(data=split.report)
    rollout = build(cfg.rollout)
    datamodule = build(
        cfg.datamodule, train=split.train, validation=split.validation, seed=cfg.seed
    )
    teacher = load_model(cfg, "teacher")
    reference, student = frozen_models(cfg, teacher, algorithm)
    problems = split.train + split.validation
    contexts = {"teacher": context_tokens(teacher.model), "student": context_tokens(student)}
    check_context(contexts, renderer, problems, rollout.max_new_tokens)
    record_weights(run, {"teacher": teacher.model, "reference": reference, "student": student})
    scorer = RewardScorer(
        reward,
        student,
        renderer,
        temperature=rollout.temperature or 1.0,
        token_budget=cfg.hardware.tokens_per_micro_batch,
        grader=data.grader,
        keep_hidden=credit.exact,
    )
    told = preflight(cfg, run, split.train, data, scorer)
    task = Teaching(renderer, scorer)
    metrics = fit_rl(
        cfg, run, renderer, teacher, reference, task, rollout, algorithm, data, datamodule, credit
    )
    return told | metrics


def preflight(
    cfg: DictConfig,
    run: RunFolder,
    problems: list[Problem],
    data: ProblemData,
    scorer: RewardScorer,
) -> dict[str, float]:
    """Tell, before the first step, how well the reward tells good explanations from bad.

    The data's own explanations are scored beside damaged copies of them. A run that goes on has
    been told already. Random numbers are left as they were.
    """
    file = run.folder / PREFLIGHT_FILE
    if file.is_file():
        return metrics_of([Area.read(row) for row in read_json(file)])
    explained = any(problem.explanation is not None for problem in problems)
    if cfg.preflight is None or not explained:
        return {}
    settings: Preflight = build(cfg.preflight)
    on_device(scorer.student, device_of(cfg))
    with torch.random.fork_rng():
        found = preflight_areas(settings, problems, data, scorer, cfg.seed)
    return tell_areas(found, settings, run.folder)


def check_credit(credit: Credit, reward: Reward) -> None:
    """Raises ValueError when tokens are to be paid for by a reward that has no share for them."""
    by_k1 = reward.is_dense_by_k1_alone and reward.temperature is None
    if credit.exact and reward.credits_tokens and not by_k1:
        raise ValueError(
            "credit.exact=true takes the place of the sampled log-ratio: it needs a reward whose "
            "only mean over the explanation is thought_kl's with the estimator k1, without "
            "transform, clip and sum, and reward.temperature=null; choose reward=rlt, or "
            "credit.exact=false"
        )
    if credit.needs_token_rewards and not reward.credits_tokens:
        raise ValueError(
            "credit=token shares out the part of the reward that is a mean or a sum over the "
            f"explanation's tokens, and this reward has none ({', '.join(reward.terms)}): choose "
            "a reward with thought_kl, such as reward=rlt, or credit=completion"
        )


def check_student_choice(cfg: DictConfig) -> None:
    """Raises ValueError when `reward_student` and `model@student` contradict each other."""
    if cfg.reward_student not in ("reference", "student"):
        raise ValueError(f"reward_student={cfg.reward_student!r}: choose reference or student")
    if cfg.reward_student == "student" and cfg.student is None:
        raise ValueError("reward_student=student needs a student: set model@student=…")
    if cfg.reward_student == "reference" and cfg.student is not None:
        raise ValueError(
            "model@student is set, but reward_student=reference does not use it; set "
            "reward_student=student, or leave model@student out"
        )
    if cfg.reward_student == "reference" and cfg.student_path is not None:
        raise ValueError(
            f"student_path={cfg.student_path} is not used with reward_student=reference; set "
            "reward_student=student and model@student, or leave it out"
        )


def check_context(
    contexts: Mapping[str, int], renderer: Renderer, problems: list[Problem], new_tokens: int
) -> None:
    """Raises ValueError when prompt and explanation may outgrow a model's context.

    Args:
        contexts: of `teacher` and `student`, in tokens.
    """
    for role, context in contexts.items():
        for problem in problems:
            if role == "teacher":
                needed = len(renderer.teacher_prompt(problem)) + new_tokens
            else:
                text = renderer.student_text(problem, [])
                needed = len(text.prompt) + len(text.continuation) + new_tokens
            if needed > context:
                raise ValueError(
                    f"problem {problem.id} with an explanation of {new_tokens} tokens needs "
                    f"{needed} tokens, the {role}'s context holds {context}; lower "
                    "rollout.max_new_tokens or data.max_tokens"
                )


def frozen_models(
    cfg: DictConfig, teacher: LanguageModel, algorithm: Algorithm
) -> tuple[PreTrainedModel | None, PreTrainedModel]:
    """(reference or None, student of the reward), sharing one object where they may."""
    wants_reference = algorithm.needs_reference or cfg.reward_student == "reference"
    reference = freeze(copy.deepcopy(teacher.model)) if wants_reference else None
    if cfg.reward_student == "reference":
        assert reference is not None
        return reference, reference
    student = freeze(load_model(cfg, "student").model)
    moves = algorithm.reference_update_every_steps is not None
    if reference is not None and not moves and fingerprint(student) == fingerprint(reference):
        log.info("student and reference have the same weights: kept in memory once")
        return reference, reference
    return reference, student
