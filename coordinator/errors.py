"""Errors of the control plane: each names the rule it enforces, its stable code and its HTTP status."""

from seqr.errors import SeqrError


class CoordinatorError(SeqrError):
    """Base class. ``status`` is the HTTP status the REST API answers with."""

    code = "coordinator_error"
    status = 400


class SettingsInvalid(CoordinatorError):
    code = "settings_invalid"
    status = 500


class DatabaseUnusable(CoordinatorError):
    code = "database_unusable"
    status = 503


class SchemaOutdated(CoordinatorError):
    code = "schema_outdated"
    status = 503


class StateDirMissing(CoordinatorError):
    code = "state_dir_missing"
    status = 500


class StateDirExists(CoordinatorError):
    code = "state_dir_exists"
    status = 409


class NotFound(CoordinatorError):
    code = "not_found"
    status = 404


class SiloUnknown(NotFound):
    code = "silo_unknown"


class PlanUnknown(NotFound):
    code = "plan_unknown"


class JobUnknown(NotFound):
    code = "job_unknown"


class RevisionUnknown(NotFound):
    code = "revision_unknown"


class DeletionUnknown(NotFound):
    code = "deletion_request_unknown"


class ReceiptNotReady(NotFound):
    code = "receipt_not_ready"


class Conflict(CoordinatorError):
    code = "conflict"
    status = 409


class IllegalTransition(Conflict):
    """A state change that the transition table does not list."""

    code = "illegal_transition"

    def __init__(self, what: str, current: str, wanted: str) -> None:
        super().__init__(f"{what} is '{current}' and cannot become '{wanted}'")


class SiloAlreadyEnrolled(Conflict):
    code = "silo_already_enrolled"


class SiloNotApproved(Conflict):
    code = "silo_not_approved"


class SiloQuarantined(Conflict):
    code = "silo_quarantined"


class KeyInUse(Conflict):
    code = "key_in_use"


class EnrolmentQueueFull(CoordinatorError):
    code = "enrolment_queue_full"
    status = 429


class EnrolmentProofInvalid(CoordinatorError):
    code = "enrolment_proof_invalid"
    status = 422


class SiloIdInvalid(CoordinatorError):
    code = "silo_id_invalid"
    status = 422


class NodeKeyInvalid(CoordinatorError):
    code = "node_key_invalid"
    status = 422


class SigningKeyInvalid(CoordinatorError):
    code = "signing_key_invalid"
    status = 422


class FingerprintMismatch(CoordinatorError):
    code = "fingerprint_mismatch"
    status = 409


class JobAlreadyLive(Conflict):
    code = "job_already_live"


class JobKindInvalid(CoordinatorError):
    code = "job_kind_invalid"
    status = 422


class PlanMissing(Conflict):
    code = "plan_missing"


class PlanUnreadable(CoordinatorError):
    code = "plan_unreadable"
    status = 422


class RevisionSuperseded(Conflict):
    code = "revision_superseded"


class AdapterTombstoned(Conflict):
    code = "adapter_tombstoned"


class AttestationInvalid(Conflict):
    code = "attestation_invalid"


class AttestationMismatch(Conflict):
    code = "attestation_mismatch"


class BundleDestroyed(CoordinatorError):
    code = "bundle_destroyed"
    status = 410


class BundleCorrupt(CoordinatorError):
    code = "bundle_corrupt"
    status = 500


class PurgeInvalid(CoordinatorError):
    code = "purge_acknowledgement_invalid"
    status = 422


class DigestInvalid(CoordinatorError):
    code = "digest_invalid"
    status = 422


class SubjectInvalid(CoordinatorError):
    code = "subject_invalid"
    status = 422


class SubjectInReason(CoordinatorError):
    code = "subject_in_reason"
    status = 422


class DeletionTooFarToWithdraw(Conflict):
    code = "deletion_in_progress"


class Unauthenticated(CoordinatorError):
    code = "key_missing"
    status = 401


class NotYours(CoordinatorError):
    code = "not_your_silo"
    status = 403


class BodyInvalid(CoordinatorError):
    code = "body_invalid"
    status = 422


class PreconditionRequired(CoordinatorError):
    code = "precondition_required"
    status = 428


class RemoteProblem(CoordinatorError):
    """A problem+json answer of the coordinator, carried to the command line with the code it came with."""

    def __init__(self, code: str, detail: str) -> None:
        super().__init__(detail)
        self.code = code


class RemoteUnreachable(CoordinatorError):
    code = "coordinator_unreachable"
    status = 503


class InsecureListen(CoordinatorError):
    code = "tls_required"
    status = 500


class CertificateExists(Conflict):
    code = "certificate_exists"


class GatewayKeyInvalid(CoordinatorError):
    code = "gateway_key_invalid"
    status = 422


class LauncherRunning(Conflict):
    code = "launcher_running"
