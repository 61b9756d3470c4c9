"""Checks of a JSON Web Token (RFC 7519, RFC 8725; OpenID Connect Core 1.0, section 3.1.3.7). No IO is done here."""

import hmac
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any

import jwt

from inference_gateway.oidc.errors import TokenInvalid
from inference_gateway.oidc.settings import OidcSettings
from policy.ids import is_valid_id

LEEWAY_S = 30
MAX_BYTES = 16 * 1024
# ID tokens and access tokens (RFC 9068). Others, such as log-out tokens, are signed with the same keys.
ACCESS_TYPES = ("at+jwt", "application/at+jwt")
TYPES = ("jwt", *ACCESS_TYPES)
KEY_TYPES = {"RS": "RSA", "PS": "RSA", "ES": "EC", "Ed": "OKP"}
REASONS: tuple[tuple[type[jwt.PyJWTError], str], ...] = (
    (jwt.ExpiredSignatureError, "it has expired"),
    (jwt.ImmatureSignatureError, "it is not valid yet"),
    (jwt.InvalidAudienceError, "it was issued for somebody else than this gateway"),
    (jwt.InvalidIssuerError, "it was issued by somebody else than this gateway's identity provider"),
    (jwt.InvalidSignatureError, "its signature is wrong"),
    (jwt.InvalidKeyError, "its key is too short or of another kind than its algorithm"),
)


@dataclass(frozen=True)
class Header:
    """What a token says about its own signature, before anybody has checked it."""

    algorithm: str
    key_id: str | None


def is_token(presented: str) -> bool:
    """Whether this is a JWT in compact form and no API key: a JWT has two dots, an API key none."""
    return presented.count(".") == 2


def header_of(token: str, algorithms: Sequence[str]) -> Header:
    """Raises TokenInvalid unless it names one of ``algorithms``."""
    if len(token) > MAX_BYTES:
        raise TokenInvalid(f"it is longer than {MAX_BYTES} bytes")
    try:
        header = jwt.get_unverified_header(token)
    except (jwt.PyJWTError, UnicodeError):
        raise TokenInvalid("it is no JSON Web Token") from None
    algorithm, kind = header.get("alg"), header.get("typ", "JWT")
    if algorithm not in algorithms:
        raise TokenInvalid("its algorithm is not one that this gateway allows")
    if not isinstance(kind, str) or kind.lower() not in TYPES:
        raise TokenInvalid("it is neither an ID token nor an access token")
    return Header(str(algorithm), header.get("kid"))


def find_key(keys: Sequence[Mapping[str, Any]], header: Header) -> jwt.PyJWK | None:
    """The key that the header names; for a header that names none, the only one of its algorithm. None: no such key."""
    found = [
        key
        for key in keys
        if key.get("kty") == KEY_TYPES[header.algorithm[:2]]
        and key.get("use", "sig") == "sig"
        and key.get("alg", header.algorithm) == header.algorithm
        and header.key_id in (None, key.get("kid"))
    ]
    if len(found) != 1:
        return None
    try:
        return jwt.PyJWK(dict(found[0]), header.algorithm)
    except jwt.PyJWTError:
        return None


def verify(
    token: str, key: jwt.PyJWK, settings: OidcSettings, audience: str, nonce: str | None = None
) -> dict[str, Any]:
    """The claims of a token for ``audience``, and of the log-in with ``nonce`` where one is given.

    Raises TokenInvalid.
    """
    try:
        decoded = jwt.decode_complete(
            token,
            key,
            algorithms=settings.algorithms,
            audience=audience,
            issuer=settings.issuer,
            leeway=LEEWAY_S,
            options={"require": ["iss", "aud", "exp", "iat"], "enforce_minimum_key_length": True},
        )
    except jwt.MissingRequiredClaimError as error:
        raise TokenInvalid(f"its claim {error.claim} is missing") from None
    except jwt.PyJWTError as error:
        raise TokenInvalid(next((why for kind, why in REASONS if isinstance(error, kind)), "it is malformed")) from None
    claims: dict[str, Any] = decoded["payload"]
    several = isinstance(claims["aud"], list) and len(claims["aud"]) > 1
    if claims.get("azp", None if several else settings.client_id) != settings.client_id:
        raise TokenInvalid("it was issued to another client (azp)")
    # RFC 9068, section 2.2: an access token calls its client client_id.
    access = str(decoded["header"].get("typ")).lower() in ACCESS_TYPES
    if access and claims.get("client_id", claims.get("azp")) != settings.client_id:
        raise TokenInvalid("it was issued to another client (client_id)")
    if "cnf" in claims:
        raise TokenInvalid("it is bound to a key of its owner's (cnf), which this gateway cannot ask for")
    if "events" in claims:
        raise TokenInvalid("it tells of an event and logs nobody in")
    if nonce is not None and not _equal(claims.get("nonce"), nonce):
        raise TokenInvalid("it belongs to another log-in (nonce)")
    return claims


def user_of(claims: Mapping[str, Any], claim: str) -> str:
    """The policy's id of the user, exactly as the token has it. Raises TokenInvalid."""
    user_id = claims.get(claim)
    if claim == "email" and claims.get("email_verified") is not True:
        raise TokenInvalid("its e-mail address is not verified")
    if not isinstance(user_id, str) or not is_valid_id(user_id):
        raise TokenInvalid(f"its claim {claim} is missing or no user id")
    return user_id


def end_of(claims: Mapping[str, Any]) -> datetime | None:
    """When the token of these verified claims stops counting; None beyond the calendar."""
    try:
        return datetime.fromtimestamp(int(claims["exp"]) + LEEWAY_S, UTC)
    except (ValueError, OverflowError, OSError):
        return None


def _equal(found: Any, wanted: str) -> bool:
    return isinstance(found, str) and hmac.compare_digest(found.encode("utf-8", "surrogatepass"), wanted.encode())
