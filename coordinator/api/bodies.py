"""Shapes of request bodies. Unknown fields are refused, so that a misspelt one is not silently ignored."""

from typing import Annotated, Any, Literal

from pydantic import AwareDatetime, BaseModel, ConfigDict, Field, StringConstraints

Id = Annotated[str, StringConstraints(min_length=1, max_length=200)]
Reason = Annotated[str, StringConstraints(strip_whitespace=True, min_length=1, max_length=2000)]
Name = Annotated[str, StringConstraints(max_length=200)]


class Body(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)


class WithReason(Body):
    reason: Reason


class EnrolmentBody(Body):
    silo_id: Id
    display_name: Name = ""
    signing_key: Annotated[str, StringConstraints(max_length=512)]
    node_key: Annotated[str, StringConstraints(max_length=2048)]
    proof: dict[str, Any]


class ApprovalBody(WithReason):
    fingerprint: Annotated[str, StringConstraints(min_length=1, max_length=100)]


class RejectionBody(WithReason):
    fingerprint: Annotated[str, StringConstraints(min_length=1, max_length=100)] | None = None


class JobBody(Body):
    silo_id: Id
    kind: Literal["train", "ping"]
    reason: Reason = "asked for by an admin"


class DeletionBody(WithReason):
    silo_id: Id
    subject: Annotated[str, StringConstraints(max_length=2000)]
    requested_by: Annotated[str, StringConstraints(max_length=500)] = ""


class AdmissionBody(Body):
    adapter_digest: Annotated[str, StringConstraints(max_length=100)]


class QuarantineBody(Body):
    code: Annotated[str, StringConstraints(pattern=r"^[a-z][a-z0-9_]{0,63}$")]
    message: Annotated[str, StringConstraints(max_length=2000)]


class PurgeBody(Body):
    acknowledgement: dict[str, Any]


class UserBody(WithReason):
    user_id: Id
    display_name: Name = ""
    roles: list[str] = Field(default=["analyst"], max_length=10)


class UserChangeBody(WithReason):
    roles: list[str] | None = Field(default=None, max_length=10)
    status: Literal["active", "disabled"] | None = None


class GroupBody(WithReason):
    group_id: Id
    display_name: Name = ""


class MemberBody(WithReason):
    member: Annotated[str, StringConstraints(min_length=1, max_length=210)]


class GrantBody(WithReason):
    subject: Annotated[str, StringConstraints(min_length=1, max_length=210)]
    silo_id: Id
    effect: Literal["allow", "deny"] = "allow"
    not_before: Annotated[AwareDatetime, Field(strict=False)] | None = None
    expires_at: Annotated[AwareDatetime, Field(strict=False)] | Literal["never"] | None = None
