"""From explanations to rewards: one student forward gives both terms' student half.

The student is frozen, and may be the very object that also serves as the reference model. The
teacher's half of the log-ratio is passed in by the caller, who has it from its own forward.
"""

import dataclasses
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import PreTrainedModel

from rlt.data.grader import Grader
from rlt.data.problem import Problem, content_hash
from rlt.data.renderer import Explanation, Renderer, StudentText
from rlt.evaluation.answers import extract_answer
from rlt.llm.batching import PaddedRows, Row, cut_rows, pad_rows
from rlt.llm.lm_head import chunked_exact_kl
from rlt.llm.logprobs import continuation_hidden, row_log_probs, shares_prefixes
from rlt.llm.token_budget import TokenBudget
from rlt.rewards.reward import Reward, RewardTable, TokenScores
from rlt.rewards.terms import Correctness
from rlt.sampling import draw_seeds

# Called with row indices, padded rows and hidden states `[N, D]` of each micro-batch.
Visit = Callable[[list[int], PaddedRows, Tensor], None]


@dataclass(frozen=True)
class ScoredExplanation:
    """One explanation with what scoring it needs.

    Attributes:
        teacher_prompt: the teacher's prompt token ids.
        teacher_log_probs_T: log-probs of `explanation.ids`, or of more tokens that begin with them;
            None if nobody asks for them.
    """

    problem: Problem
    explanation: Explanation
    teacher_prompt: Sequence[int]
    teacher_log_probs_T: Tensor | None


class RewardScorer:
    """Scores explanations with a frozen student.

    Args:
        reward: how terms combine.
        student: the frozen student model.
        renderer: prompt style and tokenizer; teacher and student share the tokenizer.
        temperature: sampling temperature of the teacher; `reward.temperature` overrides it.
        token_budget: tokens per scoring micro-batch, to begin with (see `rlt.llm.token_budget`).
        grader: verifies sampled answers; needed by the correctness term alone.
        keep_hidden: keep the student's hidden states at the explanation's tokens, for an exact KL
            with gradient (`credit.exact`).

    Raises:
        ValueError: the reward needs a grader and there is none.
    """

    def __init__(
        self,
        reward: Reward,
        student: PreTrainedModel,
        renderer: Renderer,
        *,
        temperature: float,
        token_budget: int,
        grader: Grader | None = None,
        keep_hidden: bool = False,
    ) -> None:
        if reward.correctness is not None and grader is None:
            raise ValueError("this reward verifies answers: set data.grader (it is null)")
        self.reward = reward
        self.student = student
        self.renderer = renderer
        self.temperature = temperature if reward.temperature is None else reward.temperature
        self.token_budget = TokenBudget(token_budget, "hardware.tokens_per_micro_batch")
        self.grader = grader
        self.keep_hidden = keep_hidden

    def token_scores(
        self, rows: Sequence[ScoredExplanation], teacher: PreTrainedModel | None = None
    ) -> list[TokenScores]:
        """Per-token scores; `teacher` is run again, if given, for the exact KL alone."""
        texts = [self.renderer.student_text(r.problem, r.explanation.ids) for r in rows]
        exact_kl: list[Tensor | None] = [None] * len(rows)

        hidden: list[Tensor | None] = [None] * len(rows)

        def visit(indices: list[int], batch: PaddedRows, hidden_ND: Tensor) -> None:
            if self.keep_hidden:
                parts = hidden_ND.split([len(texts[i].continuation) for i in indices])
                for index, part in zip(indices, parts, strict=True):
                    hidden[index] = part[: len(rows[index].explanation.ids)].clone()
            if teacher is not None and "exact_kl" in self.reward.needs:
                picked = [rows[i] for i in indices]
                kept = self._exact_kl(teacher, picked, [texts[i] for i in indices], hidden_ND)
                for index, values in zip(indices, kept, strict=True):
                    exact_kl[index] = values

        log_probs = self._student_log_probs(texts, visit)
        shares = self._correct_rates(rows)
        scores = []
        for n, (row, text) in enumerate(zip(rows, texts, strict=True)):
            T = len(row.explanation.ids)
            scores.append(
                TokenScores(
                    solution_log_probs_K=log_probs[n][slice(*text.solution_span)].cpu(),
                    student_log_probs_T=log_probs[n][slice(*text.thought_span)].cpu(),
                    teacher_log_probs_T=None
                    if row.teacher_log_probs_T is None
                    else row.teacher_log_probs_T[:T].cpu(),
                    end_tag_found=row.explanation.end_tag_found,
                    exact_kl_T=exact_kl[n],
                    correct_rate=shares[n],
                    student_hidden_TD=hidden[n],
                )
            )
        return scores

    def solution_log_probs(
        self, problems: Sequence[Problem], thoughts: Sequence[Sequence[int]]
    ) -> list[Tensor]:
        """Student's log-probs of each solution's tokens after a thought of these token ids."""
        texts = [
            self.renderer.student_text(p, ids) for p, ids in zip(problems, thoughts, strict=True)
        ]
        values = self._student_log_probs(texts)
        return [v[slice(*t.solution_span)].cpu() for v, t in zip(values, texts, strict=True)]

    def _student_log_probs(
        self, texts: Sequence[StudentText], visit: Visit | None = None
    ) -> list[Tensor]:
        rows = [(text.prompt, text.continuation) for text in texts]
        return self.row_log_probs(self.student, rows, visit)

    def row_log_probs(
        self, model: PreTrainedModel, rows: Sequence[Row], visit: Visit | None = None
    ) -> list[Tensor]:
        """A model's log-probs of rows at the reward's temperature (see `rlt.llm.logprobs`).

        Args:
            model: the language model.
            rows: token ids of prompt and continuation of each.
            visit: begins again with the first micro-batch where memory runs out.
        """
        return self.token_budget.fit(
            lambda tokens: row_log_probs(
                model,
                rows,
                temperature=self.temperature,
                pad_id=self.renderer.tokenizer.pad_token_id,
                token_budget=tokens,
                visit=visit,
            ),
            lambda tokens: cut_rows(rows, tokens, shares_prefixes(model)),
        )

    def __call__(
        self, rows: Sequence[ScoredExplanation], teacher: PreTrainedModel | None = None
    ) -> RewardTable:
        """Rewards of the explanations.

        Raises:
            ValueError: the reward takes the exact KL and no teacher is given.
            NotFiniteError: a reward or a term is NaN or infinite.
        """
        if "exact_kl" in self.reward.needs and teacher is None:
            raise ValueError("this reward takes the exact KL: pass the teacher's model")
        table = self.reward(self.token_scores(rows, teacher))
        table.require_finite([row.problem.id for row in rows])
        return table

    def as_if_certain(self, rows: Sequence[ScoredExplanation]) -> RewardTable:
        """Rewards as if a teacher were certain of these explanations.

        Its log-probs are then 0, and r_KL is the student's surprise alone. That makes texts
        comparable that no teacher at hand would write.

        Raises:
            NotFiniteError: a reward or a term is NaN or infinite.
        """
        scores = [
            dataclasses.replace(
                one,
                teacher_log_probs_T=torch.zeros_like(one.student_log_probs_T),
                exact_kl_T=-one.student_log_probs_T,
            )
            for one in self.token_scores(rows)
        ]
        table = self.reward(scores)
        table.require_finite([row.problem.id for row in rows])
        return table

    def _exact_kl(
        self,
        teacher: PreTrainedModel,
        rows: Sequence[ScoredExplanation],
        texts: Sequence[StudentText],
        student_hidden_ND: Tensor,
    ) -> list[Tensor]:
        """KL(teacher‖student) at every explanation token of one micro-batch."""
        lengths = [len(row.explanation.ids) for row in rows]
        parts = student_hidden_ND.split([len(t.continuation) for t in texts])
        student_hidden = torch.cat([p[:T] for p, T in zip(parts, lengths, strict=True)])
        batch = pad_rows(
            [(row.teacher_prompt, row.explanation.ids) for row in rows],
            self.renderer.tokenizer.pad_token_id,
            student_hidden_ND.device,
        )
        with torch.no_grad():
            teacher_hidden = continuation_hidden(teacher, batch)
        kl_N = chunked_exact_kl(
            teacher, teacher_hidden, self.student, student_hidden, self.temperature
        )
        return [values.cpu() for values in kl_N.split(lengths)]

    def _correct_rates(self, rows: Sequence[ScoredExplanation]) -> list[float | None]:
        term: Correctness | None = self.reward.correctness
        if term is None:
            return [None] * len(rows)
        tags = self.renderer.style.tags
        prompts = [self.renderer.answer_prompt(row.problem, row.explanation.ids) for row in rows]
        (base,) = draw_seeds(1)
        # A seed by the text, so that answers do not depend on which rows are scored together.
        seeds = [int(content_hash(str(base), str(ids))[:15], 16) for ids in prompts]
        answers = term.rollout.sample(
            self.student, self.renderer.tokenizer, prompts, term.samples, tags["solution_close"],
            seeds,
        )  # fmt: skip
        pairs = []
        for row, completions in zip(rows, answers, strict=True):
            for completion in completions:
                # The prompt ends in the opening tag of the solution: the answer follows it.
                text = tags["solution_open"] + self.renderer.decode(completion.ids)
                answer = extract_answer(text, tags["solution_open"], tags["solution_close"])
                pairs.append((row.problem, answer or ""))
        assert self.grader is not None, "checked when the scorer was made"
        verdicts = iter(self.grader.grade_all(pairs))
        return [sum(next(verdicts).correct for _ in c) / len(c) for c in answers]
