"""Cuts rows of token ids into micro-batches and pads each micro-batch for a forward pass.

A row is a `(prefix, continuation)` pair of token-id sequences. Rows can have the same prefix: all
completions of one question do. Such rows are laid out around a single copy of their prefix. The
tokens that all prefixes of a batch begin with (a system prompt, for example) are the batch's trunk;
the model may run the trunk once for the whole batch. Rows are sorted by length and cut into
batches by a token budget.

Capital letters in names are dimensions: B rows, Q different prefixes, P prefix tokens (padded),
C continuation tokens (padded).
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

Row = tuple[Sequence[int], Sequence[int]]


@dataclass(frozen=True)
class PaddedRows:
    """B rows of one micro-batch that begin with Q different prefixes.

    Attributes:
        prefix_ids_QP: token ids of the prefixes, padded on the left.
        prefix_mask_QP: True where `prefix_ids_QP` is a real token.
        trunk_tokens: number of tokens that all Q prefixes begin with. Every prefix is at least one
            token longer than the trunk.
        owner_B: index of the prefix that each row begins with.
        targets_BC: token ids of the continuations, padded on the right.
        mask_BC: True where `targets_BC` is a real token.
    """

    prefix_ids_QP: Tensor
    prefix_mask_QP: Tensor
    trunk_tokens: int
    owner_B: Tensor
    targets_BC: Tensor
    mask_BC: Tensor


def pad_rows(rows: Sequence[Row], pad_id: int, device: torch.device | str) -> PaddedRows:
    """Lay rows out for a forward pass. Rows of the same prefix share one copy of it.

    Args:
        rows: the B rows, at least one.
        pad_id: token id at padded places.
        device: where the tensors are put.

    Raises:
        ValueError: a prefix is empty, so that nothing predicts the first continuation token.
    """
    if any(len(prefix) == 0 for prefix, _ in rows):
        raise ValueError(
            "a row has an empty prefix, so nothing would predict its first token; give every row "
            "a prefix of at least one token"
        )
    owner_of: dict[tuple[int, ...], int] = {}
    owners = [owner_of.setdefault(tuple(prefix), len(owner_of)) for prefix, _ in rows]
    P = max(len(prefix) for prefix in owner_of)
    C = max(1, *(len(continuation) for _, continuation in rows))
    prefix_ids_QP = torch.full((len(owner_of), P), pad_id, dtype=torch.long)
    prefix_mask_QP = torch.zeros(prefix_ids_QP.shape, dtype=torch.bool)
    for q, prefix in enumerate(owner_of):
        prefix_ids_QP[q, P - len(prefix) :] = torch.tensor(prefix)
        prefix_mask_QP[q, P - len(prefix) :] = True
    targets_BC = torch.full((len(rows), C), pad_id, dtype=torch.long)
    mask_BC = torch.zeros(targets_BC.shape, dtype=torch.bool)
    for b, (_, continuation) in enumerate(rows):
        targets_BC[b, : len(continuation)] = torch.tensor(list(continuation), dtype=torch.long)
        mask_BC[b, : len(continuation)] = True
    return PaddedRows(
        prefix_ids_QP.to(device),
        prefix_mask_QP.to(device),
        trunk_tokens(list(owner_of)),
        torch.tensor(owners).to(device),
        targets_BC.to(device),
        mask_BC.to(device),
    )


def trunk_tokens(prefixes: Sequence[Sequence[int]]) -> int:
    """Number of tokens that all prefixes begin with. It is less than the length of any prefix."""
    shared = 0
    for tokens in zip(*(prefix[:-1] for prefix in prefixes), strict=False):
        if any(token != tokens[0] for token in tokens):
            break
        shared += 1
    return shared


def micro_batches(lengths: Sequence[int], token_budget: int) -> list[list[int]]:
    """Cut rows of known lengths into batches, longest row first.

    The number of rows of a batch times the length of its longest row is at most the budget. A row
    longer than the budget gets a batch of its own.

    Returns:
        The row indices of each batch.

    Raises:
        ValueError: the budget is less than 1.
    """
    return cut_rows([((), range(length)) for length in lengths], token_budget, shared=False)


def cut_rows(rows: Sequence[Row], token_budget: int, shared: bool) -> list[list[int]]:
    """Cut rows into batches whose padded tokens, as `pad_rows` lays them out, fit the budget.

    A row longer than the budget gets a batch of its own.

    Args:
        rows: the rows to cut.
        token_budget: most padded tokens of a batch: those of the prefixes and the continuations.
        shared: whether the model can share prefixes (`rlt.llm.logprobs.shares_prefixes`). If so,
            rows of the same prefix stay together, and each prefix of a batch counts once.

    Returns:
        The row indices of each batch, the longest rows first.

    Raises:
        ValueError: the budget is less than 1.
    """
    if token_budget < 1:
        raise ValueError(f"tokens_per_micro_batch={token_budget} must be at least 1")
    prefixes = [tuple(prefix) if shared else (index,) for index, (prefix, _) in enumerate(rows)]
    lengths = [(len(prefix), len(continuation)) for prefix, continuation in rows]
    longest_row: dict[tuple[int, ...], int] = {}  # prefix -> tokens of its longest row
    for prefix, pair in zip(prefixes, lengths, strict=True):
        longest_row[prefix] = max(longest_row.get(prefix, 0), sum(pair))
    order = sorted(
        range(len(rows)), key=lambda i: (-longest_row[prefixes[i]], prefixes[i], -lengths[i][1])
    )
    batches: list[list[int]] = []
    P = C = 0  # longest prefix and continuation of the last batch
    batch_prefixes: set[tuple[int, ...]] = set()  # prefixes of the last batch
    for index in order:
        p, c = lengths[index]
        wider_P, wider_C, more = max(P, p), max(C, c), batch_prefixes | {prefixes[index]}
        if batches and len(more) * wider_P + (len(batches[-1]) + 1) * wider_C <= token_budget:
            batches[-1].append(index)
            P, C, batch_prefixes = wider_P, wider_C, more
        else:
            batches.append([index])
            P, C, batch_prefixes = p, c, {prefixes[index]}
    return batches


def padding_fraction(rows: Sequence[Row], batches: Sequence[Sequence[int]], shared: bool) -> float:
    """Fraction of the tokens of padded batches that is padding, from 0 to 1.

    Args:
        rows: all rows.
        batches: the row indices of each batch, as `cut_rows` returns them.
        shared: whether rows of the same prefix share one copy of it.
    """
    padded = real = 0
    for indices in batches:
        prefixes = [tuple(rows[i][0]) for i in indices]
        prefixes = list(dict.fromkeys(prefixes)) if shared else prefixes
        lengths = [len(rows[i][1]) for i in indices]
        padded += len(prefixes) * max(map(len, prefixes)) + len(lengths) * max(lengths)
        real += sum(map(len, prefixes)) + sum(lengths)
    return 1 - real / padded
