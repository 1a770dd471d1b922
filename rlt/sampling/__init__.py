"""Rollout engines: they sample completions of prompts, as token ids with their log-probs."""

from rlt.sampling.engine import Completion, Rollout, draw_seeds, known_log_probs
from rlt.sampling.hf import HFRollout
from rlt.sampling.vllm import VLLMRollout

__all__ = ["Completion", "HFRollout", "Rollout", "VLLMRollout", "draw_seeds", "known_log_probs"]
