"""Rows of token ids, cut into micro-batches and laid out for a forward pass.

A row is a `(prefix, continuation)` pair. Rows that begin alike, as the completions of one question
do, are laid out around one copy of their prefix. What all prefixes of a batch begin with, a system
prompt say, is its trunk, which may be run once for all of them. Batches are cut by a token budget
from rows sorted by length.
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
        prefix_ids_QP, prefix_mask_QP: prefixes, padded on the left.
        trunk_tokens: tokens that all Q prefixes begin with; each has at least one more.
        owner_B: which prefix a row begins with.
        targets_BC: continuation tokens, padded on the right.
        mask_BC: True where `targets_BC` is a real token.
    """

    prefix_ids_QP: Tensor
    prefix_mask_QP: Tensor
    trunk_tokens: int
    owner_B: Tensor
    targets_BC: Tensor
    mask_BC: Tensor


def pad_rows(rows: Sequence[Row], pad_id: int, device: torch.device | str) -> PaddedRows:
    """Lay rows out for a forward pass, rows of the same prefix around one copy of it.

    Raises:
        ValueError: a prefix is empty, so that nothing predicts the first continuation token.
    """
    if any(len(prefix) == 0 for prefix, _ in rows):
        raise ValueError("a row has an empty prefix: nothing would predict its first token")
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
    """How many tokens all prefixes begin with, short of the whole of any of them."""
    shared = 0
    for place in zip(*(prefix[:-1] for prefix in prefixes), strict=False):
        if any(token != place[0] for token in place):
            break
        shared += 1
    return shared


def micro_batches(lengths: Sequence[int], token_budget: int) -> list[list[int]]:
    """Indices of rows, longest first, cut so that rows × longest row stays within the budget.

    A row longer than the budget gets a batch of its own.

    Raises:
        ValueError: the budget is not positive.
    """
    return cut_rows([((), range(length)) for length in lengths], token_budget, shared=False)


def cut_rows(rows: Sequence[Row], token_budget: int, shared: bool) -> list[list[int]]:
    """The same for rows as `pad_rows` lays them out: longest prefix beside longest continuation.

    Args:
        shared: rows of the same prefix stay together, and each prefix of a batch counts once, as
            it does for a model that `shares_prefixes`.

    Raises:
        ValueError: the budget is not positive.
    """
    if token_budget < 1:
        raise ValueError(f"tokens_per_micro_batch={token_budget} must be at least 1")
    prefixes = [tuple(prefix) if shared else (index,) for index, (prefix, _) in enumerate(rows)]
    lengths = [(len(prefix), len(continuation)) for prefix, continuation in rows]
    longest: dict[tuple[int, ...], int] = {}  # row of a prefix
    for prefix, pair in zip(prefixes, lengths, strict=True):
        longest[prefix] = max(longest.get(prefix, 0), sum(pair))
    order = sorted(
        range(len(rows)), key=lambda i: (-longest[prefixes[i]], prefixes[i], -lengths[i][1])
    )
    batches: list[list[int]] = []
    P = C = 0  # longest of the last batch
    held: set[tuple[int, ...]] = set()  # prefixes of the last batch
    for index in order:
        p, c = lengths[index]
        wider_P, wider_C, more = max(P, p), max(C, c), held | {prefixes[index]}
        if batches and len(more) * wider_P + (len(batches[-1]) + 1) * wider_C <= token_budget:
            batches[-1].append(index)
            P, C, held = wider_P, wider_C, more
        else:
            batches.append([index])
            P, C, held = p, c, {prefixes[index]}
    return batches


def padding_fraction(rows: Sequence[Row], batches: Sequence[Sequence[int]], shared: bool) -> float:
    """Share of the places of `cut_rows`' batches, as `pad_rows` lays them out, that are padding."""
    places = real = 0
    for indices in batches:
        prefixes = [tuple(rows[i][0]) for i in indices]
        prefixes = list(dict.fromkeys(prefixes)) if shared else prefixes
        lengths = [len(rows[i][1]) for i in indices]
        places += len(prefixes) * max(map(len, prefixes)) + len(lengths) * max(lengths)
        real += sum(map(len, prefixes)) + sum(lengths)
    return 1 - real / places
