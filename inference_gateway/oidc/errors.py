"""What can go wrong with a log-in, one class per rule. No message says whether a user exists."""

from inference_gateway.errors import GatewayError


class LoginError(GatewayError):
    """A log-in that does not count (HTTP 401)."""

    code = "login_failed"


class TokenInvalid(LoginError):
    """A token that is not the identity provider's, not for this gateway, or not valid now."""

    code = "token_invalid"

    def __init__(self, reason: str):
        super().__init__(f"the token is not accepted: {reason}; log in again with the identity provider")


class LoginExpired(LoginError):
    """An answer of the identity provider that this browser did not ask for, or that came too late or twice."""

    code = "login_expired"


class LoginDenied(LoginError):
    """The identity provider did not let the person in."""

    code = "login_denied"


class SessionEnded(LoginError):
    """A cookie of a log-in that is over."""

    code = "session_ended"


class IssuerUnreachable(GatewayError):
    """The identity provider did not answer, or not as one does (HTTP 503)."""

    code = "issuer_unreachable"
