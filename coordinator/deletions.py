"""Deletion requests as data: which state may follow which, and what has to happen next. No IO.

The driver reads a ``Situation`` from the databases, asks ``next_move`` and carries the move out. Because a move depends
on nothing but persisted facts, a coordinator that was killed asks again and goes on where it stopped.
"""

from dataclasses import dataclass
from enum import StrEnum

from coordinator.errors import IllegalTransition


class State(StrEnum):
    """Where a request stands; the main line from top to bottom, then the ways to end early, then the side states."""

    RECEIVED = "received"
    VERIFIED = "verified"
    ACCEPTED = "accepted"
    QUARANTINED = "quarantined"
    DATA_REMOVED = "data_removed"
    RETRAINING = "retraining"
    VALIDATING = "validating"
    PUBLISHED = "published"
    PURGED = "purged"
    CERTIFIED = "certified"
    REJECTED = "rejected"
    DUPLICATE = "duplicate"
    WITHDRAWN = "withdrawn"
    NEEDS_INPUT = "needs_input"
    WAITING_FOR_SILO = "waiting_for_silo"
    FAILED = "failed"


S = State

TRANSITIONS: dict[State, frozenset[State]] = {
    S.RECEIVED: frozenset({S.VERIFIED, S.DUPLICATE}),
    S.VERIFIED: frozenset({S.ACCEPTED}),
    S.ACCEPTED: frozenset({S.QUARANTINED}),
    S.QUARANTINED: frozenset(
        {S.DATA_REMOVED, S.WAITING_FOR_SILO, S.NEEDS_INPUT, S.REJECTED, S.FAILED, S.WITHDRAWN},
    ),
    S.NEEDS_INPUT: frozenset({S.QUARANTINED, S.WITHDRAWN}),
    S.WAITING_FOR_SILO: frozenset(
        {S.QUARANTINED, S.DATA_REMOVED, S.NEEDS_INPUT, S.REJECTED, S.FAILED, S.WITHDRAWN},
    ),
    # Straight to published when no record is left: nothing takes the old adapter's place.
    S.DATA_REMOVED: frozenset({S.RETRAINING, S.PUBLISHED}),
    S.RETRAINING: frozenset({S.VALIDATING}),
    S.VALIDATING: frozenset({S.PUBLISHED, S.FAILED}),
    S.PUBLISHED: frozenset({S.PURGED}),
    S.PURGED: frozenset({S.CERTIFIED}),
    S.FAILED: frozenset({S.QUARANTINED, S.WITHDRAWN}),
    S.CERTIFIED: frozenset(),
    S.REJECTED: frozenset(),
    S.DUPLICATE: frozenset(),
    S.WITHDRAWN: frozenset(),
}

CLOSED = frozenset(state for state, following in TRANSITIONS.items() if not following)
# While a request is here, its silo serves nobody. That includes published: a gateway that has not yet acknowledged the
# purge may still hold the old adapter, and lifting the quarantine would let it answer from it.
HOLDING = frozenset(
    {
        S.ACCEPTED,
        S.QUARANTINED,
        S.NEEDS_INPUT,
        S.WAITING_FOR_SILO,
        S.DATA_REMOVED,
        S.RETRAINING,
        S.VALIDATING,
        S.PUBLISHED,
        S.FAILED,
    }
)
# A silo works for one request at a time; these states, or a live erase job, occupy it.
WORKING = frozenset({S.DATA_REMOVED, S.RETRAINING, S.VALIDATING, S.PUBLISHED, S.PURGED})
# States whose obligation to lift the quarantine falls due.
LIFTING = frozenset({S.PURGED, S.CERTIFIED, S.REJECTED, S.WITHDRAWN})

SUBJECT_UNKNOWN = "subject_unknown"


def require(current: State, wanted: State) -> None:
    """Raises IllegalTransition unless the table lists ``wanted`` after ``current``."""
    if wanted not in TRANSITIONS[current]:
        raise IllegalTransition("the deletion request", current, wanted)


class Act(StrEnum):
    """What a move does besides changing the state."""

    NONE = "none"
    QUARANTINE = "quarantine"
    START_JOB = "start_job"
    TAKE_ATTESTATION = "take_attestation"
    PURGE = "purge"
    CERTIFY = "certify"


@dataclass(frozen=True)
class Move:
    """One step: an act, then the state to enter (None: stay), with the code and sentence to record."""

    act: Act = Act.NONE
    to: State | None = None
    code: str | None = None
    message: str | None = None


@dataclass(frozen=True)
class Job:
    """The facts of the request's erase job. ``first_order``: no earlier order for it can have reached the silo."""

    state: str
    overdue: bool = False
    code: str | None = None
    message: str | None = None
    first_order: bool = True


@dataclass(frozen=True)
class Situation:
    """All that ``next_move`` may look at."""

    state: State
    its_turn: bool = True
    has_plan: bool = True
    job: Job | None = None
    nothing_left: bool = False
    revision_state: str | None = None
    revision_code: str | None = None
    revision_message: str | None = None
    all_destroyed: bool = False


def next_move(s: Situation) -> Move | None:
    """The next step, or None when the request waits for somebody else (silo, gateway, officer) or is closed."""
    match s.state:
        case S.RECEIVED:
            return Move(to=S.VERIFIED)
        case S.VERIFIED:
            return Move(to=S.ACCEPTED)
        case S.ACCEPTED:
            return Move(Act.QUARANTINE, S.QUARANTINED)
        case S.NEEDS_INPUT:
            return Move(to=S.QUARANTINED) if s.has_plan else None
        case S.QUARANTINED | S.WAITING_FOR_SILO:
            return _with_the_silo(s)
        case S.DATA_REMOVED if s.nothing_left:
            return Move(to=S.PUBLISHED, message="no record is left, so no adapter takes the old one's place")
        case S.DATA_REMOVED:
            return Move(to=S.RETRAINING)
        case S.RETRAINING:
            return Move(to=S.VALIDATING)
        case S.VALIDATING:
            return _with_the_gateway(s)
        case S.PUBLISHED:
            return Move(to=S.PURGED) if s.all_destroyed else Move(Act.PURGE)
        case S.PURGED:
            return Move(Act.CERTIFY, S.CERTIFIED)
        case _:
            return None


def _with_the_silo(s: Situation) -> Move | None:
    job = s.job
    if job is None:
        if not s.its_turn:
            return None
        if not s.has_plan:
            return Move(
                to=S.NEEDS_INPUT,
                code="plan_missing",
                message="there is no plan to retrain under; create one and the request goes on by itself",
            )
        return Move(Act.START_JOB)
    match job.state:
        case "queued":
            waits = s.state is S.QUARANTINED and job.overdue
            return Move(to=S.WAITING_FOR_SILO, message="the silo is not connected") if waits else None
        case "dispatched":
            return Move(to=S.QUARANTINED) if s.state is S.WAITING_FOR_SILO else None
        case "succeeded":
            return Move(Act.TAKE_ATTESTATION, S.DATA_REMOVED)
        case "failed" if job.code == SUBJECT_UNKNOWN and job.first_order:
            return Move(to=S.REJECTED, code=SUBJECT_UNKNOWN, message="the silo holds no record of this subject")
        case _:
            # An earlier order may have removed the records already: 'unknown' is then no ground to reopen the silo.
            code = job.code or "job_cancelled"
            return Move(to=S.FAILED, code=code, message=job.message or "the erase job was cancelled")


def _with_the_gateway(s: Situation) -> Move | None:
    match s.revision_state:
        case "staged" | "admitted":
            return None
        case "active":
            return Move(to=S.PUBLISHED)
        case "quarantined":
            return Move(to=S.FAILED, code=s.revision_code, message=s.revision_message)
        case _:
            return Move(
                to=S.FAILED,
                code="revision_lost",
                message="the retrained revision is no longer staged; retry the request",
            )
