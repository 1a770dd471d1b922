"""Rollout engines: they sample completions of prompts, as token ids with their log-probs."""

from rlt.sampling.engine import Completion, Rollout, draw_seeds, known_log_probs
from rlt.sampling.hf import HFRollout

__all__ = ["Completion", "HFRollout", "Rollout", "draw_seeds", "known_log_probs"]
