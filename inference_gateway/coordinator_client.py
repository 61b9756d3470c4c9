"""The gateway's side of the coordinator's REST interface."""

import ssl
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import httpx

from inference_gateway.errors import CoordinatorRefused, CoordinatorUnreachable, SettingsInvalid
from seqr import dsse
from seqr.document import Fields
from seqr.keys import KeyInvalid, VerifyKey

TIMEOUT_S = 30.0
STATES = ("staged", "admitted", "active", "retired", "quarantined", "destroyed")
_REVISION = {"revision_id", "silo_id", "plan_id", "revision", "state", "sealed_sha256", "expectation"}
_EXPECTATION = {"silo_keys", "job_nonce", "revision", "tombstoned_digests"}


@dataclass(frozen=True)
class RemoteRevision:
    """One revision as the coordinator lists it, with what intake has to expect of it."""

    revision_id: str
    silo_id: str
    plan_id: str
    revision: int
    state: str
    sealed_sha256: str
    adapter_digest: str | None
    silo_keys: tuple[VerifyKey, ...]
    job_nonce: str
    tombstoned_digests: frozenset[str]

    @classmethod
    def of(cls, document: Any) -> Self:
        """Read one entry; unknown fields are left alone, so that a newer coordinator can say more."""
        named = {k: v for k, v in document.items() if k in _REVISION} if isinstance(document, dict) else document
        entry = Fields(named, "a revision of the coordinator", CoordinatorUnreachable, _REVISION)
        raw = entry.raw("expectation")
        wanted = {k: v for k, v in raw.items() if k in _EXPECTATION} if isinstance(raw, dict) else raw
        expectation = Fields(wanted, "the expectation of a revision", CoordinatorUnreachable, _EXPECTATION)
        try:
            keys = tuple(VerifyKey.from_b64(str(key)) for key in expectation.items("silo_keys", 64))
        except KeyInvalid as error:
            raise CoordinatorUnreachable(f"the coordinator names a silo key that is none: {error}") from None
        digest = document.get("adapter_digest")
        return cls(
            revision_id=entry.identifier("revision_id"),
            silo_id=entry.identifier("silo_id"),
            plan_id=entry.identifier("plan_id"),
            revision=entry.integer("revision", 1, 2**53),
            state=entry.choice("state", STATES),
            sealed_sha256=entry.digest("sealed_sha256"),
            adapter_digest=digest if isinstance(digest, str) else None,
            silo_keys=keys,
            job_nonce=expectation.identifier("job_nonce"),
            tombstoned_digests=frozenset(expectation.digests("tombstoned_digests", 1_000_000)),
        )


class CoordinatorClient:
    """One coordinator, one API key. Every method raises CoordinatorUnreachable or CoordinatorRefused."""

    def __init__(self, base_url: str, api_key: str, ca_file: Path | None = None, transport: Any = None):
        try:
            verify = ssl.create_default_context(cafile=str(ca_file)) if ca_file is not None else True
        except (OSError, ssl.SSLError) as error:
            raise SettingsInvalid(f"coordinator_ca_file {ca_file} is not a certificate file: {error}") from None
        self._http = httpx.AsyncClient(
            base_url=base_url,
            headers={"Authorization": f"Bearer {api_key}"},
            timeout=TIMEOUT_S,
            verify=verify,
            transport=transport,
        )

    async def aclose(self) -> None:
        await self._http.aclose()

    async def plan(self) -> dsse.Envelope:
        """The current plan's envelope, not verified."""
        response = await self._request("GET", "/v1/gateway/plan")
        try:
            return dsse.Envelope.from_json(response.content)
        except dsse.EnvelopeMalformed as error:
            raise CoordinatorUnreachable(f"the coordinator's plan is no envelope: {error}") from None

    async def revisions(self) -> list[RemoteRevision]:
        """Every revision that a gateway has to know of."""
        listed = _json(await self._request("GET", "/v1/gateway/revisions"))
        if not isinstance(listed, list):
            raise CoordinatorUnreachable("the coordinator's list of revisions is not a list")
        return [RemoteRevision.of(item) for item in listed]

    async def bundle(self, revision_id: str, max_bytes: int) -> bytes:
        """The sealed bundle. Stops reading once it is beyond ``max_bytes`` and returns what it has, which
        ``seqr.bundle.open_sealed`` refuses by its size.
        """
        parts: list[bytes] = []
        size = 0
        try:
            async with self._http.stream("GET", f"/v1/gateway/revisions/{revision_id}/bundle") as response:
                if response.is_error:
                    await response.aread()
                    raise _refusal(response)
                async for part in response.aiter_bytes():
                    parts.append(part)
                    size += len(part)
                    if size > max_bytes:
                        break
        except httpx.HTTPError as error:
            raise _unreachable(self._http, error) from None
        return b"".join(parts)

    async def admitted(self, revision_id: str, adapter_digest: str) -> None:
        await self._post(revision_id, "admitted", {"adapter_digest": adapter_digest})

    async def quarantined(self, revision_id: str, code: str, message: str) -> None:
        await self._post(revision_id, "quarantined", {"code": code, "message": message})

    async def purged(self, revision_id: str, acknowledgement: dsse.Envelope) -> None:
        await self._post(revision_id, "purged", {"acknowledgement": acknowledgement.to_dict()})

    async def _post(self, revision_id: str, verb: str, body: Mapping[str, Any]) -> None:
        await self._request("POST", f"/v1/gateway/revisions/{revision_id}/{verb}", json=body)

    async def _request(self, method: str, path: str, **options: Any) -> httpx.Response:
        try:
            response = await self._http.request(method, path, **options)
        except httpx.HTTPError as error:
            raise _unreachable(self._http, error) from None
        if response.is_error:
            raise _refusal(response)
        return response


def _unreachable(http: httpx.AsyncClient, error: httpx.HTTPError) -> CoordinatorUnreachable:
    reason = str(error) or type(error).__name__
    return CoordinatorUnreachable(f"the coordinator at {http.base_url} does not answer: {reason}")


def _refusal(response: httpx.Response) -> CoordinatorRefused:
    problem = _json(response, lenient=True)
    told = problem if isinstance(problem, dict) else {}
    code, detail = str(told.get("code", "unknown")), str(told.get("detail", response.reason_phrase))
    return CoordinatorRefused(
        f"the coordinator answered {response.status_code} ({code}): {detail}"[:500], response.status_code, code
    )


def _json(response: httpx.Response, lenient: bool = False) -> Any:
    try:
        return response.json()
    except ValueError:
        if lenient:
            return None
        raise CoordinatorUnreachable("the coordinator's answer is not JSON") from None
