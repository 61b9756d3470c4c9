"""All that ever leaves the silo about its records, made in one place: the sealed bundle and the erasure attestation."""

from dataclasses import dataclass
from datetime import timedelta
from typing import Any

from seqr.bundle import Manifest, seal, sign_manifest
from seqr.document import utc_now, utc_text
from seqr.job import ErasureAttestation, JobOrder, sign_attestation
from seqr.plan import Plan
from silo_client.adapters import TrainedAdapter
from silo_client.config import SiloConfig
from silo_client.erased import Tombstone
from silo_client.state import State

# A bundle that no gateway admits within this time is void, so that an old one cannot be kept back and used later.
VALIDITY = timedelta(days=7)


@dataclass(frozen=True)
class Part:
    """One thing that leaves: where it stands, what it is, and its value where that is short."""

    place: str
    name: str
    value: str


def build_manifest(trained: TrainedAdapter, config: SiloConfig, *, revision: int, nonce: str) -> Manifest:
    """What the silo signs about an adapter; counts only where the owner shares them."""
    return Manifest(
        plan_id=trained.plan_id,
        silo_id=config.silo_id,
        revision=revision,
        job_nonce=nonce,
        tensors=trained.adapter.tensor_digests(),
        adapter_digest=trained.adapter.digest,
        records=trained.records if config.share_counts else None,
        tokens=trained.tokens if config.share_counts else None,
        environment=trained.environment,
        dataset_root=trained.dataset_root,
        expires_at=utc_text(utc_now() + VALIDITY),
    )


def sealed_bundle(trained: TrainedAdapter, config: SiloConfig, state: State, plan: Plan, order: JobOrder) -> bytes:
    """The adapter and its signed manifest, readable by the plan's gateways alone."""
    manifest = build_manifest(trained, config, revision=order.revision, nonce=order.nonce)
    return seal(trained.adapter, sign_manifest(manifest, state.signing_key()), plan.gateway_keys)


def attestation(
    order: JobOrder,
    plan: Plan,
    tombstone: Tombstone,
    state: State,
    dataset_root_after: str,
    new_adapter_digest: str | None,
    environment: dict[str, str],
) -> bytes:
    """The silo's signed word on an erasure. It says how many records went, which ``share_counts`` does not withhold."""
    claim = ErasureAttestation(
        request_id=str(order.request_id),
        silo_id=order.silo_id,
        plan_id=plan.plan_id,
        removed_commitments=tombstone.removed_commitments,
        dataset_root_before=tombstone.dataset_root_before,
        dataset_root_after=dataset_root_after,
        records_removed=len(tombstone.removed_commitments),
        old_adapter_digest=tombstone.old_adapter_digest,
        new_adapter_digest=new_adapter_digest,
        base_model_digest=plan.base_model_digest,
        seed=plan.seed,
        environment=environment,
        completed_at=utc_text(utc_now()),
    )
    return sign_attestation(claim, state.signing_key()).to_json()


def what_leaves(trained: TrainedAdapter, config: SiloConfig) -> list[Part]:
    """Everything in the bundle of ``trained``: taken from the very manifest and tensors that would be sealed."""
    manifest = build_manifest(trained, config, revision=1, nonce="given-by-the-job")
    decided_by_job = {
        "revision": "given by the job",
        "job_nonce": "given by the job",
        "expires_at": "7 days after the job",
    }
    parts = [
        Part("manifest", name, decided_by_job.get(name, _short(value))) for name, value in manifest.to_dict().items()
    ]
    for name, tensor in sorted(trained.adapter.tensors().items()):
        shape = " x ".join(str(size) for size in tensor.shape) or "one number"
        parts.append(Part("tensor", name, f"{shape}, fp32, sha256 {manifest.tensors[name][:16]}…"))
    return parts


def _short(value: Any) -> str:
    if value is None:
        return "not given"
    if isinstance(value, dict):
        few = len(value) <= 16 and all(len(str(item)) <= 40 for item in value.values())
        return (
            ", ".join(f"{key} {item}" for key, item in value.items())
            if few
            else f"one SHA-256 for each of {len(value)} tensors"
        )
    return str(value)
