"""Teacher RL in one script: your own problems, your own reward term, and a loop that you can read.

    python examples/teacher_rl.py

A tiny teacher with random weights sees a question and its solution, and writes an explanation. A
frozen student with the same weights scores it: the reward is the mean log-prob (nats a token) that
the student gives the solution after the explanation, less a price for each token of it. The teacher
learns within seconds on a CPU that short explanations pay. A model of this size knows no arithmetic
and so learns nothing else; `rlt experiment=quickstart` shows a teacher that really teaches.

Everything is a function or a class of `rlt`. `rlt stage=teacher_rl` runs the same four steps with
configs, checkpoints, logs and micro-batches that fit the memory (`rlt.training.rl`).
"""

import copy
from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from rlt.data.problem import make_problem
from rlt.data.renderer import PromptStyle, Renderer
from rlt.llm.batching import cut_rows
from rlt.llm.logprobs import row_log_probs, shares_prefixes
from rlt.llm.models import freeze
from rlt.llm.random_llama import RandomLlama
from rlt.llm.tokenizers import digit_words
from rlt.rewards import Reward, RewardScorer, SolutionLogProb, TokenScores
from rlt.sampling import HFRollout, known_log_probs
from rlt.training import Teaching
from rlt.training.algorithms import Algorithm
from rlt.training.credit import CompletionCredit
from rlt.training.rl_loss import micro_batch_loss, token_weights
from rlt.training.rollout_batch import RolloutBatch

# Own data: sums modulo 10, in words of the tokenizer.
PROBLEMS = [
    make_problem(question, solution)
    for question, solution in [("3 5", "8"), ("1 1", "2"), ("9 4", "3"), ("2 7 6", "5")]
]
GROUP_SIZE = 16  # explanations of each problem
TEMPERATURE = 1.0
MAX_NEW_TOKENS = 12
TOKENS_PER_MICRO_BATCH = 1024

STYLE = PromptStyle(
    thought=["<think>", "</think>"],
    solution=["<answer>", "</answer>"],
    explanation=["<think>", "</think>"],
    teacher_opening="{solution} {explanation_open}",
    student_opening="? {thought_open}",
    thought_text="{explanation}",
    solution_text="{solution}",
    student_bridge="{thought_close} {solution_open}",
    student_closing="{solution_close}",
    system_from_data=False,
)

# GRPO as the paper has it, but without a reference model (beta=0).
GRPO = Algorithm(
    aggregation="sequence_mean", objective="clip", ratio="token", epsilon_low=0.2,
    epsilon_high=0.2, beta=0.0, importance_weighted_k3=True, scale_rewards=True,
    negative_weight=1.0, mask_overlong=False, correction="none", correction_cap=2.0,
    num_iterations=1, minibatches=1,
    reference_update_every_steps=None, reference_mix_up=0.9,
)  # fmt: skip


@dataclass
class Price:
    """Own reward term: each token of an explanation costs `weight`."""

    weight: float = 0.2
    coefficients: Mapping[str, float] = field(default_factory=lambda: {"sum": 1.0})
    sign: float = -1.0
    of_explanation: bool = True
    needs: frozenset[str] = frozenset()

    def values(self, scores: TokenScores) -> Tensor:
        """Ones `[T]` at the explanation's tokens."""
        return torch.ones_like(scores.student_log_probs_T)


def train(steps: int = 30) -> list[float]:
    """Train a teacher and return the mean reward of each step."""
    torch.manual_seed(0)
    made = RandomLlama(
        digit_words, hidden_size=64, layers=2, heads=4, intermediate_size=256, max_tokens=64,
        initializer_range=0.08, seed=0,
    ).load()  # fmt: skip
    teacher, tokenizer = made.model, made.tokenizer
    student = freeze(copy.deepcopy(teacher))
    renderer = Renderer(STYLE, tokenizer)
    reward = Reward({"solution": SolutionLogProb({"mean": 1.0}), "price": Price()})
    scorer = RewardScorer(
        reward, student, renderer, temperature=TEMPERATURE, token_budget=TOKENS_PER_MICRO_BATCH
    )
    task, credit = Teaching(renderer, scorer), CompletionCredit()
    rollout = HFRollout(TEMPERATURE, MAX_NEW_TOKENS)
    optimizer = torch.optim.AdamW(teacher.parameters(), lr=1e-3)
    pad_id = tokenizer.pad_token_id

    means = []
    for step in range(1, steps + 1):
        # Sample: G explanations of each problem.
        teacher.eval()
        prompts = [task.prompt(problem) for problem in PROBLEMS]
        groups = rollout.sample(teacher, tokenizer, prompts, GROUP_SIZE, task.stop)
        batch = RolloutBatch.of_groups(PROBLEMS, prompts, groups, task.parse)

        # Score: the teacher's log-probs of what it wrote, and one forward of the student.
        log_probs = known_log_probs(teacher, batch.completions)
        batch.log_probs = log_probs or row_log_probs(
            teacher, batch.rows, temperature=TEMPERATURE, pad_id=pad_id,
            token_budget=TOKENS_PER_MICRO_BATCH,
        )  # fmt: skip
        batch.reward_table = task.score(batch, teacher, TEMPERATURE)

        # Advantages [N, T]: each explanation against the others of its problem.
        batch.advantages_NT = credit.advantages(
            batch.rewards_PG, batch.reward_table.token_rewards, batch.lengths, GRPO.scale_rewards
        )

        # Update: one optimizer step, micro-batch by micro-batch.
        teacher.train()
        optimizer.zero_grad()
        everyone = range(len(batch))
        weights = token_weights(batch, everyone, GRPO, MAX_NEW_TOKENS)
        for own in cut_rows(batch.rows, TOKENS_PER_MICRO_BATCH, shares_prefixes(teacher)):
            loss, _ = micro_batch_loss(
                teacher, student, batch, own, weights.of(own), GRPO, TEMPERATURE, pad_id,
            )  # fmt: skip
            loss.backward()
        torch.nn.utils.clip_grad_norm_(teacher.parameters(), 1.0)
        optimizer.step()

        means.append(float(batch.rewards_PG.mean()))
        tokens = sum(batch.lengths) / len(batch)
        print(f"step {step:2d}: reward {means[-1]:6.3f}, {tokens:4.1f} tokens", flush=True)
    return means


if __name__ == "__main__":
    train()
