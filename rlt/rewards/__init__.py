"""Teacher rewards: one small pure function per term, one class that combines them."""

from rlt.rewards.reward import Reward, RewardTable, TokenScores
from rlt.rewards.scorer import RewardScorer, ScoredExplanation
from rlt.rewards.terms import Correctness, Length, Random, SolutionLogProb, ThoughtKL

__all__ = [
    "Correctness",
    "Length",
    "Random",
    "Reward",
    "RewardScorer",
    "RewardTable",
    "ScoredExplanation",
    "SolutionLogProb",
    "ThoughtKL",
    "TokenScores",
]
