"""The policy file: YAML in, checked dataclasses out. No database here.

users:  {alice: {roles: [analyst], display_name: Alice}}
groups: {finance: {members: [user:alice, group:staff]}}
silos:  {bank: {display_name: The bank, owners: [olga]}}
grants: [{subject: group:finance, silo: bank, effect: allow, expires_at: 2027-01-01T00:00:00Z, reason: audit season}]
tests:  [{user: alice, permitted: [bank]}, {user: bob, denied: [bank]}]
"""

from __future__ import annotations

from collections.abc import Hashable, Mapping
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any, Final, cast

import yaml

from policy.errors import PolicyError, PolicyFileInvalid
from policy.ids import check_id, check_reason, check_text, parse_subject
from policy.limits import NAMES, Limits, check_limits
from policy.models import EFFECTS, SILO_STATUSES
from policy.times import Never, parse_time
from policy.users import check_roles

MAX_BYTES: Final = 16 * 1024 * 1024


@dataclass(frozen=True)
class UserEntry:
    roles: tuple[str, ...] | None
    display_name: str
    disabled: bool
    limits: Limits


@dataclass(frozen=True)
class GroupEntry:
    members: tuple[str, ...]
    display_name: str


@dataclass(frozen=True)
class SiloEntry:
    display_name: str
    status: str
    owners: tuple[str, ...]
    vetoed_by: str | None
    veto_reason: str | None


@dataclass(frozen=True)
class GrantEntry:
    subject: str
    silo: str
    effect: str
    not_before: datetime | None
    expires_at: datetime | Never | None
    reason: str | None
    id: str | None


@dataclass(frozen=True)
class Assertion:
    """`permitted`: the exact set; `allowed` and `denied`: silos in it and not in it. `at` None: when it is run."""

    user: str
    at: datetime | None
    permitted: tuple[str, ...] | None
    allowed: tuple[str, ...]
    denied: tuple[str, ...]

    @property
    def wanted(self) -> str:
        parts = [] if self.permitted is None else [f"permitted exactly {', '.join(self.permitted) or 'no silo'}"]
        parts += [f"allowed {', '.join(self.allowed)}"] if self.allowed else []
        parts += [f"denied {', '.join(self.denied)}"] if self.denied else []
        return " and ".join(parts)


@dataclass(frozen=True)
class PolicyDocument:
    users: dict[str, UserEntry]
    groups: dict[str, GroupEntry]
    silos: dict[str, SiloEntry]
    grants: tuple[GrantEntry, ...]
    tests: tuple[Assertion, ...]


class _Loader(yaml.SafeLoader):
    """YAML's last key wins; in a policy a second entry of one name is a mistake to be told of."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Hashable, Any]:
        seen: set[str] = set()
        for key, _ in node.value:
            if isinstance(key, yaml.ScalarNode):
                if key.value in seen:
                    raise PolicyFileInvalid(f"line {key.start_mark.line + 1}", f"{key.value!r} stands there twice")
                seen.add(key.value)
        return super().construct_mapping(node, deep)


def parse(content: str | bytes) -> PolicyDocument:
    """Raises PolicyFileInvalid, naming the place, for anything that is not a policy; nothing unknown is skipped."""
    try:
        raw = yaml.load(content, _Loader)
    except yaml.MarkedYAMLError as error:
        line = error.problem_mark.line + 1 if error.problem_mark else 1
        raise PolicyFileInvalid(f"line {line}", f"it is not YAML ({error.problem})") from None
    except (yaml.YAMLError, ValueError, RecursionError):
        raise PolicyFileInvalid("its start", "it is not YAML text in UTF-8") from None
    top = _fields("the top", raw if raw is not None else {}, {"users", "groups", "silos", "grants", "tests"})
    return PolicyDocument(
        users=_named("users", "user", top, _user),
        groups=_named("groups", "group", top, _group),
        silos=_named("silos", "silo", top, _silo),
        grants=tuple(_grant(f"grants[{n}]", entry) for n, entry in enumerate(_list("grants", top.get("grants")))),
        tests=tuple(_assertion(f"tests[{n}]", entry) for n, entry in enumerate(_list("tests", top.get("tests")))),
    )


def read(path: Path) -> PolicyDocument:
    """`parse` of a file."""
    try:
        if path.stat().st_size > MAX_BYTES:
            raise PolicyFileInvalid(str(path), f"it has more than {MAX_BYTES} bytes")
        return parse(path.read_bytes())
    except OSError as error:
        raise PolicyFileInvalid(str(path), f"it cannot be read ({error.strerror})") from None


def _named(section: str, kind: str, top: Mapping[str, Any], build: Any) -> dict[str, Any]:
    entries = top.get(section)
    if entries is None:
        return {}
    if not isinstance(entries, dict):
        raise PolicyFileInvalid(section, "it must map ids to entries")
    found = {}
    for name, entry in entries.items():
        where = f"{section}.{name}"
        found[_checked(where, check_id, kind, name)] = build(where, {} if entry is None else entry)
    return found


def _user(where: str, entry: Any) -> UserEntry:
    fields = _fields(where, entry, {"roles", "display_name", "disabled", "limits"})
    roles = None if "roles" not in fields else tuple(_checked(where, check_roles, _texts(where, fields["roles"])))
    disabled = fields.get("disabled", False)
    if not isinstance(disabled, bool):
        raise PolicyFileInvalid(f"{where}.disabled", "it must be true or false")
    numbers = _fields(f"{where}.limits", fields.get("limits", {}), set(NAMES))
    limits = _checked(f"{where}.limits", check_limits, Limits(**numbers))
    return UserEntry(roles, _text(where, fields, "display_name") or "", disabled, limits)


def _group(where: str, entry: Any) -> GroupEntry:
    fields = _fields(where, entry, {"members", "display_name"})
    members = _texts(f"{where}.members", fields.get("members"))
    for member in members:
        _checked(f"{where}.members", parse_subject, member)
    return GroupEntry(tuple(members), _text(where, fields, "display_name") or "")


def _silo(where: str, entry: Any) -> SiloEntry:
    fields = _fields(where, entry, {"display_name", "status", "owners", "vetoed_by", "veto_reason"})
    status = _text(where, fields, "status") or "active"
    if status not in SILO_STATUSES:
        raise PolicyFileInvalid(f"{where}.status", f"{status!r} is none of {', '.join(SILO_STATUSES)}")
    owners = tuple(_ids(f"{where}.owners", "user", fields.get("owners")))
    vetoed_by, reason = _text(where, fields, "vetoed_by"), _text(where, fields, "veto_reason")
    return SiloEntry(_text(where, fields, "display_name") or "", status, owners, vetoed_by, reason)


def _grant(where: str, entry: Any) -> GrantEntry:
    fields = _fields(where, entry, {"id", "subject", "silo", "effect", "not_before", "expires_at", "reason"})
    for needed in ("subject", "silo"):
        if needed not in fields:
            raise PolicyFileInvalid(where, f"it has no {needed}")
    effect = fields.get("effect", "allow")
    if effect not in EFFECTS:
        raise PolicyFileInvalid(f"{where}.effect", f"{effect!r} is neither allow nor deny")
    name, reason = _text(where, fields, "id"), _text(where, fields, "reason")
    return GrantEntry(
        subject=str(_checked(f"{where}.subject", parse_subject, fields["subject"])),
        silo=_checked(f"{where}.silo", check_id, "silo", fields["silo"]),
        effect=effect,
        not_before=_time(f"{where}.not_before", fields.get("not_before")),
        expires_at="never"
        if fields.get("expires_at") == "never"
        else _time(f"{where}.expires_at", fields.get("expires_at")),
        reason=None if reason is None else _checked(f"{where}.reason", check_reason, reason),
        id=None if name is None else _checked(f"{where}.id", check_id, "grant", name),
    )


def _assertion(where: str, entry: Any) -> Assertion:
    fields = _fields(where, entry, {"user", "at", "permitted", "allowed", "denied"})
    if "user" not in fields or not fields.keys() & {"permitted", "allowed", "denied"}:
        raise PolicyFileInvalid(where, "it needs a user, and permitted, allowed or denied")
    exact = tuple(_ids(f"{where}.permitted", "silo", fields["permitted"])) if "permitted" in fields else None
    return Assertion(
        user=_checked(f"{where}.user", check_id, "user", fields["user"]),
        at=_time(f"{where}.at", fields.get("at")),
        permitted=exact,
        allowed=tuple(_ids(f"{where}.allowed", "silo", fields.get("allowed"))),
        denied=tuple(_ids(f"{where}.denied", "silo", fields.get("denied"))),
    )


def _fields(where: str, entry: Any, known: set[str]) -> dict[str, Any]:
    if not isinstance(entry, dict):
        raise PolicyFileInvalid(where, f"it must hold {', '.join(sorted(known))}")
    for name in entry:
        if name not in known:
            raise PolicyFileInvalid(where, f"{name!r:.60} is not known there, only {', '.join(sorted(known))}")
    return cast(dict[str, Any], entry)


def _list(where: str, value: Any) -> list[Any]:
    if value is None:
        return []
    if not isinstance(value, list):
        raise PolicyFileInvalid(where, "it must be a list")
    return value


def _texts(where: str, value: Any) -> list[str]:
    values = _list(where, value)
    for one in values:
        if not isinstance(one, str):
            raise PolicyFileInvalid(where, f"{one!r:.60} is not text; put it in quotes")
    return values


def _ids(where: str, kind: str, value: Any) -> list[str]:
    return [_checked(where, check_id, kind, one) for one in _texts(where, value)]


def _text(where: str, fields: Mapping[str, Any], name: str) -> str | None:
    value = fields.get(name)
    if value is None:
        return None
    if not isinstance(value, str):
        raise PolicyFileInvalid(f"{where}.{name}", f"{value!r:.60} is not text; put it in quotes")
    return cast(str, _checked(f"{where}.{name}", check_text, name.replace("_", " "), value))


def _time(where: str, value: Any) -> datetime | None:
    return None if value is None else cast(datetime, _checked(where, parse_time, "time", value))


def _checked(where: str, check: Any, *arguments: Any) -> Any:
    """Runs a check of the policy package and says where in the file it failed."""
    try:
        return check(*arguments)
    except PolicyFileInvalid:
        raise
    except PolicyError as error:
        raise PolicyFileInvalid(where, str(error).rstrip(".")) from None
