"""A coordinator in memory, with the gateway's part of its REST interface and real sealed bundles."""

import hashlib
from dataclasses import dataclass, field
from datetime import timedelta
from typing import Any

import httpx
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from seqr import dsse
from seqr.adapter import Adapter
from seqr.bundle import Manifest, seal, sign_manifest
from seqr.document import utc_now, utc_text
from seqr.keys import SigningKey
from seqr.plan import Plan, sign_plan

API_KEY = "seqr_gateway0_test"


@dataclass
class Revision:
    """One row of the registry. ``cut``: each download of its bundle breaks off; ``gone``: its data key is destroyed."""

    revision_id: str
    silo_id: str
    revision: int
    nonce: str
    blob: bytes
    sealed_sha256: str
    state: str = "staged"
    adapter_digest: str | None = None
    verdict: tuple[str, str] | None = None
    purges: list[dsse.Envelope] = field(default_factory=list)
    cut: bool = False
    gone: bool = False


class FakeCoordinator:
    """Holds the plan and the revisions; tests stage bundles and read the verdicts."""

    def __init__(self, plan: Plan):
        self.plan = plan
        self.key = SigningKey.generate()
        self.envelope = sign_plan(plan, self.key)
        self.silo_keys: dict[str, SigningKey] = {}
        self.revisions: dict[str, Revision] = {}
        self.tombstones: set[str] = set()
        self.down = False
        self.app = Starlette(
            routes=[
                Route("/v1/gateway/plan", self._plan),
                Route("/v1/gateway/revisions", self._revisions),
                Route("/v1/gateway/revisions/{rid}/bundle", self._bundle),
                Route("/v1/gateway/revisions/{rid}/{verb}", self._report, methods=["POST"]),
            ]
        )

    def silo_key(self, silo_id: str) -> SigningKey:
        return self.silo_keys.setdefault(silo_id, SigningKey.generate())

    def bundle(self, silo_id: str, revision: int, adapter: Adapter, **changes: Any) -> tuple[bytes, Manifest]:
        """A sealed bundle; ``changes`` replace fields of the manifest, and ``signer`` its signing key."""
        signer = changes.pop("signer", None) or self.silo_key(silo_id)
        fields: dict[str, Any] = {
            "plan_id": self.plan.plan_id,
            "silo_id": silo_id,
            "revision": revision,
            "job_nonce": f"nonce-{silo_id}-{revision}",
            "tensors": adapter.tensor_digests(),
            "adapter_digest": adapter.digest,
            "records": None,
            "tokens": None,
            "environment": {},
            "dataset_root": "0" * 64,
            "expires_at": utc_text(utc_now() + timedelta(days=1)),
        }
        manifest = Manifest(**{**fields, **changes})
        return seal(adapter, sign_manifest(manifest, signer), self.plan.gateway_keys), manifest

    def stage(
        self, silo_id: str, revision: int, adapter: Adapter, blob: bytes | None = None, **changes: Any
    ) -> Revision:
        """Register a bundle as staged; ``blob`` stands in for the silo's, but its digest is registered all the same."""
        sealed, _ = self.bundle(silo_id, revision, adapter, **changes)
        sealed = sealed if blob is None else blob
        row = Revision(
            revision_id=f"rev-{silo_id}-{revision}",
            silo_id=silo_id,
            revision=revision,
            nonce=f"nonce-{silo_id}-{revision}",
            blob=sealed,
            sealed_sha256=hashlib.sha256(sealed).hexdigest(),
        )
        self.revisions[row.revision_id] = row
        return row

    async def _plan(self, request: Request) -> Response:
        return self._refused(request) or Response(self.envelope.to_json(), media_type="application/json")

    async def _revisions(self, request: Request) -> Response:
        listed = [
            {
                "revision_id": row.revision_id,
                "silo_id": row.silo_id,
                "plan_id": self.plan.plan_id,
                "revision": row.revision,
                "state": row.state,
                "sealed_sha256": row.sealed_sha256,
                "sealed_bytes": len(row.blob),
                "adapter_digest": row.adapter_digest,
                "expectation": {
                    "silo_keys": [self.silo_key(row.silo_id).public.to_b64()],
                    "job_nonce": row.nonce,
                    "revision": row.revision,
                    "tombstoned_digests": sorted(self.tombstones),
                },
            }
            for row in sorted(self.revisions.values(), key=lambda row: (row.silo_id, row.revision))
            if row.state in ("staged", "active", "retired")
        ]
        return self._refused(request) or JSONResponse(listed)

    async def _bundle(self, request: Request) -> Response:
        row = self.revisions[request.path_params["rid"]]
        if row.cut:
            raise httpx.ReadError("the peer closed the connection")
        if row.gone:
            return JSONResponse({"code": "bundle_destroyed", "detail": "its data key is destroyed"}, status_code=410)
        return self._refused(request) or Response(row.blob, media_type="application/octet-stream")

    async def _report(self, request: Request) -> Response:
        refused = self._refused(request)
        if refused is not None:
            return refused
        row, body = self.revisions[request.path_params["rid"]], await request.json()
        match request.path_params["verb"]:
            case "admitted":
                for other in self.revisions.values():
                    if other.silo_id == row.silo_id and other.state == "active":
                        other.state = "retired"
                row.state, row.adapter_digest = "active", body["adapter_digest"]
            case "quarantined":
                row.state, row.verdict = "quarantined", (body["code"], body["message"])
            case "purged":
                row.purges.append(dsse.Envelope.from_dict(body["acknowledgement"]))
                row.state = "destroyed"
        return JSONResponse({"state": row.state})

    def _refused(self, request: Request) -> Response | None:
        if self.down:
            return JSONResponse({"code": "internal", "detail": "down"}, 503)
        if request.headers.get("authorization") != f"Bearer {API_KEY}":
            return JSONResponse({"code": "key_unknown", "detail": "unknown key"}, 401)
        return None
