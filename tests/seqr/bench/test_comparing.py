"""Intervals and paired tests agree with what can be worked out by hand or by trying everything."""

from itertools import product

import numpy as np
import pytest

from seqr.bench.paper.comparing import bootstrap_interval, paired_p, wilson


def test_wilson_gives_the_textbook_interval() -> None:
    assert wilson(8, 10) == pytest.approx((0.4902, 0.9433), abs=1e-4)
    assert wilson(0, 0) == (0.0, 1.0)
    assert wilson(10, 10)[1] == pytest.approx(1.0)


def test_methods_that_never_differ_are_not_told_apart() -> None:
    assert paired_p([np.zeros(50)]) == 1.0


def test_the_sign_flip_test_agrees_with_trying_every_sign() -> None:
    rows = np.array([1.0, 1.0, 1.0, -1.0, 1.0, 1.0, 0.0, 1.0])
    every = [abs(np.mean(rows * np.array(signs))) for signs in product([1, -1], repeat=len(rows))]
    exact = np.mean(np.array(every) >= abs(rows.mean()) - 1e-12)
    assert paired_p([rows], draws=50_000) == pytest.approx(exact, abs=0.01)


def test_a_difference_in_every_row_is_as_sure_as_the_draws_allow() -> None:
    assert paired_p([np.ones(60), np.ones(60)], draws=2000) == 1 / 2001


def test_tasks_count_alike_however_many_rows_they_have() -> None:
    big, small = np.zeros(1000), np.ones(10)
    low, high = bootstrap_interval([big, small])
    assert low == high == 0.5
