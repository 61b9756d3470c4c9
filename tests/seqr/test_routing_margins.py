"""The lead of a choice over the next one that was permitted."""

import math

import pytest
import torch

from seqr.frame import Frame
from seqr.library import Library, PermissionRows
from seqr.plan import Plan
from seqr.routing.margins import lead, mean_leads
from seqr.step import Segment, StepContext, StepMismatch

pytestmark = pytest.mark.usefixtures("either_way")
INF = float("inf")


def test_the_lead_is_over_the_next_allowed_column_only() -> None:
    value = torch.tensor([[5.0, 9.0, 4.0], [5.0, INF, 4.0], [5.0, math.nan, 4.0]])
    allowed = torch.tensor([[True, False, True]] * 3)
    assert lead(value, allowed, torch.tensor([0, 0, 0])).tolist() == [1.0, 1.0, 1.0]


def test_there_is_no_lead_where_nobody_was_chosen_or_nobody_else_allowed() -> None:
    value = torch.tensor([[5.0, 9.0], [5.0, 9.0]])
    allowed = torch.tensor([[False, True], [False, False]])
    assert all(math.isnan(one) for one in lead(value, allowed, torch.tensor([1, -1])).tolist())


def test_an_exact_choice_a_rounding_below_its_rival_has_a_lead_of_zero() -> None:
    assert lead(torch.tensor([[1.0, 1.0000001]]), torch.tensor([[True, True]]), torch.tensor([0])).tolist() == [0.0]


def test_modules_without_a_choice_do_not_count_in_the_mean() -> None:
    leads = [torch.tensor([1.0, math.nan]), torch.tensor([math.nan, math.nan]), torch.tensor([3.0, math.nan])]
    assert mean_leads(leads) == [2.0, None]


@pytest.mark.parametrize(
    "frame", [Frame(), Frame(5), Frame(3, range(9, 12)), Frame(4, range(2, 6)), Frame(8, range(0))]
)
def test_spoken_counts_the_positions_that_speak(frame: Frame) -> None:
    for end in range(20):
        assert frame.spoken(end) == sum(frame.speaks(position) for position in range(end))


def test_a_token_outside_the_step_cannot_be_watched(small_plan: Plan) -> None:
    rows = PermissionRows(Library.empty(small_plan))
    with pytest.raises(StepMismatch, match="token 7 is in no segment"):
        StepContext(rows, [Segment(0, 0, 4, mode="per_token")], tokens=8, watched=[7])
