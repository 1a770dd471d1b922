"""Rows are cut into batches within a budget of padded tokens."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rlt.llm.batching import Row, cut_rows, micro_batches, pad_rows


def test_layout_of_padded_rows() -> None:
    batch = pad_rows([([1, 2], [3]), ([4], [5, 6]), ((1, 2), [7, 8])], 9, "cpu")
    assert batch.prefix_ids_QP.tolist() == [[1, 2], [9, 4]]
    assert batch.prefix_mask_QP.tolist() == [[True, True], [False, True]]
    assert batch.owner_B.tolist() == [0, 1, 0]
    assert batch.targets_BC.tolist() == [[3, 9], [5, 6], [7, 8]]
    assert batch.mask_BC.tolist() == [[True, False], [True, True], [True, True]]


def test_an_empty_prefix_is_refused() -> None:
    with pytest.raises(ValueError, match="empty prefix"):
        pad_rows([([1], [2]), ([], [3])], 0, "cpu")


ROW_LENGTHS = st.lists(st.tuples(st.integers(1, 30), st.integers(0, 30)), min_size=1, max_size=20)


@given(ROW_LENGTHS, st.integers(1, 200))
def test_every_row_once_and_padded_area_within_the_budget(
    lengths: list[tuple[int, int]], token_budget: int
) -> None:
    rows: list[Row] = [([1] * p, [2] * c) for p, c in lengths]
    batches = cut_rows(rows, token_budget, shared=False)
    assert sorted(i for batch in batches for i in batch) == list(range(len(rows)))
    totals = [sum(lengths[batch[0]]) for batch in batches]
    assert totals == sorted(totals, reverse=True)
    for batch in batches:
        P, C = (max(lengths[i][side] for i in batch) for side in (0, 1))
        assert len(batch) == 1 or len(batch) * (P + C) <= token_budget


@given(ROW_LENGTHS, st.integers(1, 200))
def test_shared_prefixes_count_once(lengths: list[tuple[int, int]], token_budget: int) -> None:
    rows: list[Row] = [([1] * (p % 3 + 1), [2] * c) for p, c in lengths]
    batches = cut_rows(rows, token_budget, shared=True)
    assert sorted(i for batch in batches for i in batch) == list(range(len(rows)))
    for batch in batches:
        prefixes = {len(rows[i][0]) for i in batch}
        C = max(len(rows[i][1]) for i in batch)
        assert len(batch) == 1 or len(prefixes) * max(prefixes) + len(batch) * C <= token_budget


def test_rows_of_a_prefix_stay_together() -> None:
    # Two prefixes of 4 and rows of 2: 4 + 3 × 2 = 10 for one group, 2 × 4 + 6 × 2 = 20 for both.
    a, b = [1, 1, 1, 1], [2, 2, 2, 2]
    rows: list[Row] = [(prefix, [9, 9]) for prefix in (a, b, a, b, a, b)]
    assert cut_rows(rows, 10, shared=True) == [[0, 2, 4], [1, 3, 5]]
    assert cut_rows(rows, 20, shared=True) == [[0, 2, 4, 1, 3, 5]]
    assert cut_rows(rows, 20, shared=False) == [[0, 1, 2], [3, 4, 5]]


def test_micro_batches_by_hand() -> None:
    # The longest rows come first. A row of 20 exceeds the budget and gets its own batch; then come
    # two rows of 5, which make 10, and three rows of 2.
    assert micro_batches([2, 5, 20, 4, 2, 1], 10) == [[2], [1, 3], [0, 4, 5]]
    # 6 + 1 and 1 + 6 tokens are 7 each, but side by side they are padded to 12.
    assert cut_rows([([1] * 6, [1]), ([1], [1] * 6)], 20, shared=False) == [[0], [1]]
    assert cut_rows([([1] * 6, [1]), ([1], [1] * 6)], 24, shared=False) == [[0, 1]]
    assert micro_batches([], 10) == []
    with pytest.raises(ValueError, match="tokens_per_micro_batch=0"):
        micro_batches([1], 0)
