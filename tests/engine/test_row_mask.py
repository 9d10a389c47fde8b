"""The mask of rows that step: what is marked, and when it is sent."""

from __future__ import annotations

import torch

from tunebench.engine.row_mask import RowMask


def test_only_a_change_is_sent_to_the_device() -> None:
    mask = RowMask(3, torch.device("cpu"))
    mask.set([True, False, True])
    assert mask.marked.tolist() == [True, False, True]
    sent = mask.marked._version
    mask.set([True, False, True])
    assert mask.marked._version == sent
    mask.set([True, True, True])
    assert mask.marked.tolist() == [True, True, True]


def test_a_cleared_row_is_marked_again_where_it_is_asked_for() -> None:
    mask = RowMask(2, torch.device("cpu"))
    mask.set([True, True])
    mask.clear(0)
    assert mask.marked.tolist() == [False, True]
    mask.set([True, True])
    assert mask.marked.tolist() == [True, True]


def test_the_mask_stays_at_its_address() -> None:
    mask = RowMask(2, torch.device("cpu"))
    address = mask.marked.data_ptr()
    mask.set([True, False])
    mask.clear(0)
    assert mask.marked.data_ptr() == address
