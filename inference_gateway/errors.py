"""What can go wrong in the gateway, one class per rule. Routes map families to HTTP statuses, not single classes."""

from seqr.errors import SeqrError


class GatewayError(SeqrError):
    """An error of the gateway."""

    code = "gateway_error"


class SettingsInvalid(GatewayError):
    """A setting is missing or unusable; the gateway does not start."""

    code = "settings_invalid"


class TelemetryNotInstalled(GatewayError):
    """Traces are asked for, and the packages for them are not there; the gateway does not start."""

    code = "telemetry_not_installed"


class InsecureListen(GatewayError):
    """API keys would cross a network in the clear; the gateway does not start."""

    code = "tls_required"


class StartFailed(GatewayError):
    """Something unforeseen kept the gateway from starting."""

    code = "start_failed"


class EngineIncompatible(GatewayError):
    """The installed transformers, or the base model, is not one that this gateway can drive."""

    code = "engine_incompatible"


class EngineStopped(GatewayError):
    """The engine's worker is gone: nothing can be generated until the gateway is restarted."""

    code = "engine_stopped"


class NotReady(GatewayError):
    """The gateway has not loaded its library yet."""

    code = "not_ready"


class Refused(GatewayError):
    """A request that the gateway does not take now. ``retry_after``: whole seconds; None where waiting cannot help."""

    status = 503
    kind = "server_error"

    def __init__(self, message: str, retry_after: int | None = 1):
        super().__init__(message)
        self.retry_after = retry_after


class RateLimited(Refused):
    """A limit of the user or of the key is reached. ``limit`` is its name in ``policy.limits.Limits``."""

    code = "rate_limit_exceeded"
    status = 429

    def __init__(self, message: str, limit: str, retry_after: int | None):
        super().__init__(message, retry_after)
        self.limit = limit
        self.kind = "tokens" if limit.startswith("tokens") else "requests"


class Overloaded(Refused):
    """Too many requests wait already."""

    code = "overloaded"


class QueueTimeout(Refused):
    """No place became free while the request was willing to wait."""

    code = "queue_timeout"


class BaseModelMismatch(GatewayError):
    """The base model on this machine is not the one the plan was made for."""

    code = "base_model_mismatch"


class GatewayKeyNotInPlan(GatewayError):
    """Nothing is sealed for this gateway under the current plan."""

    code = "gateway_key_not_in_plan"


class CoordinatorUnreachable(GatewayError):
    """The coordinator did not answer, or not as a coordinator does."""

    code = "coordinator_unreachable"


class CoordinatorRefused(GatewayError):
    """The coordinator answered with an error of its own."""

    code = "coordinator_refused"

    def __init__(self, message: str, status: int, remote_code: str):
        super().__init__(message)
        self.status = status
        self.remote_code = remote_code


class BundleDigestMismatch(GatewayError):
    """The bytes that arrived are not the sealed bundle that the coordinator registered."""

    code = "bundle_digest_mismatch"


class GrammarInvalid(GatewayError):
    """A schema or grammar that cannot be turned into something an answer can be held to."""

    code = "grammar_invalid"


class GrammarTooComplex(GatewayError):
    """A grammar turned out to be too complex while the answer was being written."""

    code = "grammar_too_complex"
