"""Intake: every check a stranger's bundle must pass before its adapter may touch the base model. Pure: no IO, no clock.

The order is sizes, signature, freshness (the rollback and freeze rules of the TUF specification, section 5), digests,
names and shapes, numbers; each refusal is a class of ``seqr.refusals``. Recalibration on public text and behaviour
probes need the base model and belong to the gateway.
"""

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime

import torch

from seqr import dsse
from seqr.adapter import Adapter, AdapterMalformed, ModuleAdapter, adapter_digest, decode_tensors, digests_of
from seqr.bundle import MANIFEST_PAYLOAD_TYPE, MAX_MANIFEST_BYTES, Manifest, OpenedBundle, largest_tensors
from seqr.canonical import JsonMalformed, parse_json
from seqr.document import parse_utc
from seqr.keys import VerifyKey
from seqr.plan import Plan
from seqr.refusals import (
    BundleNotForThisGateway,
    BundleRefused,
    BundleTooLarge,
    BundleUnreadable,
    ManifestExpired,
    ManifestMalformed,
    ManifestSignatureInvalid,
    NonceMismatch,
    NonceReplayed,
    NormOutOfBounds,
    NotFinite,
    QNotOrthonormal,
    RankDegenerate,
    RDiagonalNegative,
    RevisionNotNext,
    RNotUpperTriangular,
    StatisticsInvalid,
    TensorDigestMismatch,
    TensorSetMismatch,
    TensorShapeMismatch,
    TombstonedAdapter,
    WrongPlan,
    WrongSilo,
)

__all__ = [
    "BundleNotForThisGateway",
    "BundleRefused",
    "BundleTooLarge",
    "BundleUnreadable",
    "Expectation",
    "LibraryNorms",
    "ManifestExpired",
    "ManifestMalformed",
    "ManifestSignatureInvalid",
    "NonceMismatch",
    "NonceReplayed",
    "NormOutOfBounds",
    "NotFinite",
    "QNotOrthonormal",
    "RDiagonalNegative",
    "RNotUpperTriangular",
    "RankDegenerate",
    "RevisionNotNext",
    "StatisticsInvalid",
    "TensorDigestMismatch",
    "TensorSetMismatch",
    "TensorShapeMismatch",
    "TombstonedAdapter",
    "WrongPlan",
    "WrongSilo",
    "adapter_norms",
    "check_bundle",
]

# A QR in fp64 stored as fp32 was measured to be off by 1e-7 to 2e-7; a lower triangle is exactly zero.
LOWER_TRIANGLE_TOLERANCE = 1e-6  # relative to ||R||_F
ORTHONORMAL_TOLERANCE = 1e-5  # largest entry of |Q^T Q - I|
# ||R||_F equals ||s B||_F: a root mean square of 10 per entry of s B is far beyond any useful adapter.
LARGEST_RMS_ENTRY = 10.0
# Honest silos differ by their amount of data, so a norm is an outlier only beyond a factor of ten and eight MADs.
OUTLIER_FACTOR = 10.0
OUTLIER_MADS = 8.0
FEWEST_PEERS = 3
# Below this ratio of second to first singular value R has rank one in fp32: a direction, not an adapter.
DEGENERATE_RATIO = 1e-6


@dataclass(frozen=True)
class Expectation:
    """What the coordinator's records say the bundle must be.

    ``silo_keys`` are the silo's keys that are not revoked; ``revision`` and ``job_nonce`` those of the job order;
    ``tombstoned_digests`` the adapters destroyed by deletions; ``now`` (aware) the time of arrival. A revision that was
    admitted before and is fetched again, after a restart, is ``already_admitted``: its expiry no longer counts.
    """

    silo_id: str
    silo_keys: tuple[VerifyKey, ...]
    revision: int
    job_nonce: str
    tombstoned_digests: frozenset[str]
    now: datetime
    used_nonces: frozenset[str] = frozenset()
    already_admitted: bool = False


LibraryNorms = Mapping[str, Sequence[float]]


def check_bundle(
    opened: OpenedBundle, plan: Plan, expectation: Expectation, library_norms: LibraryNorms | None = None
) -> Adapter:
    """The adapter in ``opened``, if it passes every check; otherwise raises the ``BundleRefused`` that names the first.

    ``library_norms`` holds ||R||_F of the other silos' adapters per module (see ``adapter_norms``).
    """
    # Sizes before decoding.
    most = largest_tensors(plan)
    if len(opened.tensors_bytes) > most:
        raise BundleTooLarge(f"the tensors take {len(opened.tensors_bytes)} bytes, plan {plan.plan_id} allows {most}")
    # Who signed.
    manifest = _verify_manifest(opened.manifest_envelope, expectation)
    # What for, and when.
    _check_freshness(manifest, plan, expectation)
    # The tensors are those that were signed, and those of the plan.
    tensors = _verify_tensors(opened.tensors_bytes, manifest)
    _check_names_and_shapes(tensors, plan)
    # The numbers.
    adapter = _check_finite(tensors)
    for name, module in adapter.modules.items():
        _check_factors(name, module)
        _check_norm(name, module, (library_norms or {}).get(name, ()))
        _check_statistics(name, module)
    return adapter


def adapter_norms(adapter: Adapter) -> dict[str, float]:
    """||R||_F per module."""
    return {name: float(torch.linalg.matrix_norm(module.r.double())) for name, module in adapter.modules.items()}


def _verify_manifest(envelope: dsse.Envelope, expectation: Expectation) -> Manifest:
    try:
        payload = dsse.verify(envelope, expectation.silo_keys, MANIFEST_PAYLOAD_TYPE)
        return Manifest.from_dict(parse_json(payload, "the manifest", MAX_MANIFEST_BYTES))
    except (dsse.SignatureInvalid, dsse.PayloadTypeMismatch) as error:
        raise ManifestSignatureInvalid(
            f"the manifest is not validly signed by silo {expectation.silo_id}: {error}"
        ) from None
    except JsonMalformed as error:
        raise ManifestMalformed(str(error)) from None


def _check_freshness(manifest: Manifest, plan: Plan, expectation: Expectation) -> None:
    if manifest.silo_id != expectation.silo_id:
        raise WrongSilo(f"the manifest is of silo {manifest.silo_id}, expected silo {expectation.silo_id}")
    # The plan id is a digest over base model, seed, digests of A, rank and alpha: equal ids mean equal everything.
    if manifest.plan_id != plan.plan_id:
        raise WrongPlan(f"the manifest is for plan {manifest.plan_id}, expected plan {plan.plan_id}")
    if manifest.job_nonce in expectation.used_nonces:
        raise NonceReplayed(f"job nonce {manifest.job_nonce} of silo {manifest.silo_id} has been used already")
    if manifest.job_nonce != expectation.job_nonce:
        raise NonceMismatch(f"the manifest answers job nonce {manifest.job_nonce}, expected {expectation.job_nonce}")
    if manifest.revision != expectation.revision:
        raise RevisionNotNext(f"the manifest is revision {manifest.revision}, expected revision {expectation.revision}")
    if manifest.adapter_digest in expectation.tombstoned_digests:
        raise TombstonedAdapter(
            f"adapter {manifest.adapter_digest} of silo {manifest.silo_id} was destroyed by a deletion; "
            "the silo must train again without the deleted records"
        )
    if not expectation.already_admitted and expectation.now >= parse_utc(manifest.expires_at):
        raise ManifestExpired(
            f"the manifest expired at {manifest.expires_at}, it is {expectation.now.isoformat()}; issue a new job"
        )


def _verify_tensors(data: bytes, manifest: Manifest) -> dict[str, torch.Tensor]:
    try:
        tensors = decode_tensors(data)
    except AdapterMalformed as error:
        raise BundleUnreadable(f"the tensors of the bundle are unreadable: {error}") from None
    got = digests_of(tensors)
    for name in sorted(set(got) | set(manifest.tensors)):
        signed, found = manifest.tensors.get(name), got.get(name)
        if signed != found:
            raise TensorDigestMismatch(
                f"tensor {name[:300]!r}: the manifest has digest {signed or 'none'}, the payload {found or 'none'}"
            )
    if adapter_digest(got) != manifest.adapter_digest:
        raise TensorDigestMismatch(
            f"the adapter's digest is {adapter_digest(got)}, the manifest claims {manifest.adapter_digest}"
        )
    return tensors


def _check_names_and_shapes(tensors: dict[str, torch.Tensor], plan: Plan) -> None:
    expected: dict[str, tuple[int, ...]] = {}
    for module in plan.modules:
        expected[f"{module.name}.q"] = (module.out_features, plan.rank)
        expected[f"{module.name}.r"] = (plan.rank, plan.rank)
        expected[f"{module.name}.mu"] = expected[f"{module.name}.sigma"] = ()
    missing, extra = sorted(set(expected) - set(tensors)), sorted(set(tensors) - set(expected))
    if missing:
        raise TensorSetMismatch(f"{len(missing)} tensors of plan {plan.plan_id} are missing, first {missing[0]!r}")
    if extra:
        raise TensorSetMismatch(f"{len(extra)} tensors are not in plan {plan.plan_id}, first {extra[0][:300]!r}")
    for name, shape in expected.items():
        if tuple(tensors[name].shape) != shape:
            raise TensorShapeMismatch(f"tensor {name} has shape {tuple(tensors[name].shape)}, expected {shape}")


def _check_finite(tensors: dict[str, torch.Tensor]) -> Adapter:
    for name, tensor in tensors.items():
        if not bool(torch.isfinite(tensor).all()):
            raise NotFinite(f"tensor {name} holds values that are not finite, expected finite ones only")
    return Adapter.from_tensors(tensors)


def _check_factors(name: str, module: ModuleAdapter) -> None:
    r, q = module.r.double(), module.q.double()
    norm = float(torch.linalg.matrix_norm(r))
    lower = float(r.tril(-1).abs().max())
    if lower > LOWER_TRIANGLE_TOLERANCE * norm:
        raise RNotUpperTriangular(
            f"module {name}: R has {lower:.3g} below the diagonal, "
            f"expected at most {LOWER_TRIANGLE_TOLERANCE * norm:.3g}"
        )
    smallest = float(r.diagonal().min())
    if smallest < 0.0:
        raise RDiagonalNegative(f"module {name}: R has {smallest:.3g} on its diagonal, expected no negative entry")
    off = float((q.T @ q - torch.eye(q.shape[1], dtype=q.dtype)).abs().max())
    if off > ORTHONORMAL_TOLERANCE:
        raise QNotOrthonormal(
            f"module {name}: Q^T Q is off the identity by {off:.3g}, expected at most {ORTHONORMAL_TOLERANCE:g}"
        )


def _check_norm(name: str, module: ModuleAdapter, peers: Sequence[float]) -> None:
    norm = float(torch.linalg.matrix_norm(module.r.double()))
    cap = LARGEST_RMS_ENTRY * math.sqrt(module.q.numel())
    if norm > cap:
        raise NormOutOfBounds(f"module {name}: ||R|| is {norm:.4g}, expected at most {cap:.4g}")
    if norm == 0.0:
        raise RankDegenerate(f"module {name}: R is zero, expected a trained adapter")
    singular = torch.linalg.svdvals(module.r.double())
    if len(singular) > 1 and float(singular[1]) <= DEGENERATE_RATIO * float(singular[0]):
        raise RankDegenerate(f"module {name}: R has rank 1, expected more of rank {len(singular)}")
    if len(peers) < FEWEST_PEERS:
        return
    logs = [math.log(peer) for peer in peers]
    middle = statistics.median(logs)
    spread = statistics.median(abs(value - middle) for value in logs)
    slack = max(math.log(OUTLIER_FACTOR), OUTLIER_MADS * spread)
    if abs(math.log(norm) - middle) > slack:
        raise NormOutOfBounds(
            f"module {name}: ||R|| is {norm:.4g}, expected {math.exp(middle - slack):.4g} to "
            f"{math.exp(middle + slack):.4g} as the {len(peers)} other adapters in the library have"
        )


def _check_statistics(name: str, module: ModuleAdapter) -> None:
    for label, value in (("mu", module.mu), ("sigma", module.sigma)):
        if value <= 0.0:
            raise StatisticsInvalid(f"module {name}: {label} is {value:.4g}, expected a positive number")
