"""The transition tables are data: every pair of states is tried, and no closed state has a way out."""

import itertools

import pytest

from coordinator import deletions, job_queue, revisions
from coordinator.deletions import CLOSED, HOLDING, TRANSITIONS, Act, Job, Move, Situation, State, next_move
from coordinator.errors import IllegalTransition

DESIGN = {
    *("received", "verified", "accepted", "rejected", "duplicate", "quarantined", "data_removed", "retraining"),
    *("validating", "published", "purged", "certified", "needs_input", "waiting_for_silo", "failed", "withdrawn"),
}


def test_the_states_are_those_of_the_design() -> None:
    assert {state.value for state in State} == DESIGN
    assert set(TRANSITIONS) == set(State)


def test_every_move_that_the_table_does_not_list_is_refused() -> None:
    for current, wanted in itertools.product(State, State):
        if wanted in TRANSITIONS[current]:
            deletions.require(current, wanted)
        else:
            with pytest.raises(IllegalTransition, match=f"'{current}' and cannot become '{wanted}'"):
                deletions.require(current, wanted)


def test_what_is_closed_stays_closed() -> None:
    assert {state.value for state in CLOSED} == {"certified", "rejected", "duplicate", "withdrawn"}
    assert not CLOSED & HOLDING


def test_a_destroyed_revision_and_a_finished_job_never_come_back() -> None:
    assert revisions.TRANSITIONS[revisions.R.DESTROYED] == frozenset()
    assert all(not following for state, following in job_queue.TRANSITIONS.items() if state not in job_queue.LIVE)
    into_active = {state for state, following in revisions.TRANSITIONS.items() if revisions.R.ACTIVE in following}
    assert into_active == {revisions.R.ADMITTED}


def situations() -> list[Situation]:
    jobs_ = [
        None,
        *(
            Job(s, late, code)
            for s in job_queue.JobState
            for late in (False, True)
            for code in (None, "subject_unknown")
        ),
    ]
    revision_states = [None, *(state.value for state in revisions.R)]
    return [
        Situation(state, turn, plan, job, nothing, revision, "code", "message", destroyed)
        for state in State
        for turn, plan, nothing, destroyed in itertools.product((True, False), repeat=4)
        for job in jobs_
        for revision in revision_states
    ]


def test_no_situation_leads_to_a_move_that_the_table_refuses() -> None:
    for situation in situations():
        move = next_move(situation)
        if move is not None and move.to is not None:
            deletions.require(situation.state, move.to)


def test_a_closed_request_is_never_moved_and_a_failed_one_only_by_an_officer() -> None:
    for situation in situations():
        if situation.state in CLOSED or situation.state is State.FAILED:
            assert next_move(situation) is None


def test_nothing_but_an_active_revision_is_published() -> None:
    for situation in situations():
        move = next_move(situation)
        if move is not None and move.to is State.PUBLISHED:
            assert situation.revision_state == "active" or situation.nothing_left


def test_only_a_first_order_can_be_rejected_as_unknown() -> None:
    quarantined = Situation(State.QUARANTINED, job=Job("failed", code="subject_unknown", first_order=False))
    move = next_move(quarantined)
    assert move is not None and move.to is State.FAILED
    first = next_move(Situation(State.QUARANTINED, job=Job("failed", code="subject_unknown")))
    assert first is not None and first.to is State.REJECTED


def test_a_request_waits_for_its_turn_and_then_starts_its_job() -> None:
    assert next_move(Situation(State.QUARANTINED, its_turn=False)) is None
    assert next_move(Situation(State.QUARANTINED)) == Move(Act.START_JOB)
