"""The policy version as ETag: reads carry it, writes must name the one they were decided on."""

import re
from collections.abc import Callable
from dataclasses import asdict
from typing import Annotated, Any, TypeVar

from fastapi import Depends, Header, Query, Response
from sqlalchemy import Connection

from coordinator.api.state import Services
from coordinator.errors import BodyInvalid, PreconditionRequired
from policy.decision import policy_version
from policy.diff import Diff
from policy.keys import Principal
from policy.store import Write
from policy.transaction import named_database_errors

T = TypeVar("T")
_ETAG = re.compile(r'"(\d{1,18})"')


def _expected(if_match: Annotated[str | None, Header()] = None) -> int | None:
    """The version in If-Match; None for ``*``. Raises PreconditionRequired, BodyInvalid."""
    if if_match is None:
        raise PreconditionRequired(
            'send If-Match with the ETag of what you decided on, such as "17", or If-Match: * to take any'
        )
    if if_match.strip() == "*":
        return None
    match = _ETAG.fullmatch(if_match.strip())
    if match is None:
        raise BodyInvalid('If-Match must be a policy version in quotes, such as "17", or *')
    return int(match[1])


def _preview(dry_run: Annotated[bool, Query()] = False) -> bool:
    """Whether the write is only to be previewed (``?dry_run=true``)."""
    return dry_run


def change(caller: Principal, reason: str, expected: int | None) -> Write:
    """Who writes, why, and on which version."""
    return {"actor": caller.user_id, "reason": reason, "expected_version": expected}


Expected = Annotated[int | None, Depends(_expected)]
Preview = Annotated[bool, Depends(_preview)]


def read(s: Services, response: Response, query: Callable[[Connection], T]) -> T:
    """The answer of ``query``, with the policy version it belongs to as ETag."""
    with named_database_errors(), s.coordinator.policy_engine.begin() as connection:
        response.headers["ETag"] = f'"{policy_version(connection)}"'
        return query(connection)


def answer(response: Response, done: int | Diff, **more: Any) -> dict[str, Any]:
    """The body after a write: the new version as ETag, or what a preview found."""
    if isinstance(done, Diff):
        response.headers["ETag"] = f'"{done.policy_version}"'
        return {"dry_run": True, **asdict(done)}
    response.headers["ETag"] = f'"{done}"'
    return {"policy_version": done, **more}
