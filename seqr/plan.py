"""The plan: the signed document that all silos of a federation train under, and that never changes."""

import re
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, fields, replace
from datetime import datetime
from typing import Any

from seqr import dsse
from seqr.canonical import JsonMalformed, canonical_json, parse_json, sha256_hex
from seqr.document import Fields, utc_now, utc_text
from seqr.errors import SeqrError
from seqr.keys import KeyInvalid, SealingPublicKey, SigningKey, VerifyKey

PLAN_TYPE = "seqr/plan/v1"
PLAN_PAYLOAD_TYPE = "application/vnd.seqr.plan+json"
A_GENERATOR = "philox4x64-as241-v1"  # how A is drawn (seqr.shared_a); another way to draw it is another name
DTYPES = ("float32", "bfloat16")
ROUTINGS = ("prompt_evidence", "evidence", "per_token")
CALIBRATIONS = ("public", "own")

MAX_PLAN_BYTES = 4 * 1024 * 1024
MAX_MODULES = 8192
MAX_RANK = 512
MAX_FEATURES = 1 << 20
MAX_GATEWAYS = 32
_MODULE_NAME = re.compile(r"[A-Za-z0-9_]+(\.[A-Za-z0-9_]+)*", re.ASCII)


class PlanMalformed(SeqrError):
    """A plan with a missing, unknown or impossible field."""

    code = "plan_malformed"


class PlanSignatureInvalid(SeqrError):
    """A plan that the pinned coordinator key did not sign."""

    code = "plan_signature_invalid"


@dataclass(frozen=True)
class ModuleSpec:
    """One adapted Linear: its name in the base model, in_features n and out_features m."""

    name: str
    in_features: int
    out_features: int


@dataclass(frozen=True)
class TrainingLimits:
    """How every silo trains: optimizer steps, records per step, learning rate, tokens per record, warm-up steps."""

    max_steps: int = 40
    batch_size: int = 16
    learning_rate: float = 2e-3
    max_length: int = 256
    warmup_steps: int = 4


@dataclass(frozen=True)
class GatewayKey:
    """A gateway for which bundles are sealed and whose acknowledgements count; both keys as base64."""

    key_id: str
    sealing_key: str
    signing_key: str

    @classmethod
    def of(cls, sealing: SealingPublicKey, signing: VerifyKey) -> "GatewayKey":
        """The entry of a gateway with these public keys, called by the id of its sealing key."""
        return cls(sealing.key_id, sealing.to_b64(), signing.to_b64())


@dataclass(frozen=True)
class Plan:
    """A plan (docs/architecture.md).

    ``dtype`` is the base model's compute type in training and serving alike; ``routing`` the default router;
    ``calibration`` says whose mu and sigma route: recomputed on public text, or the silo's own.
    """

    plan_id: str
    federation: str
    base_model: str
    base_model_digest: str
    modules: tuple[ModuleSpec, ...]
    rank: int
    alpha: float
    seed: int
    dtype: str
    a_digests: Mapping[str, str]
    gateway_keys: tuple[GatewayKey, ...]
    routing: str
    calibration: str
    training: TrainingLimits
    created_at: str

    @property
    def scale(self) -> float:
        """The LoRA scale s = alpha / rank, folded into every R."""
        return self.alpha / self.rank

    def to_dict(self) -> dict[str, Any]:
        """The plan's JSON object, as signed."""
        document = {f.name: getattr(self, f.name) for f in fields(self)}
        document |= {
            "type": PLAN_TYPE,
            "a_generator": A_GENERATOR,
            "a_digests": dict(self.a_digests),
            "modules": [asdict(module) for module in self.modules],
            "gateway_keys": [asdict(key) for key in self.gateway_keys],
            "training": asdict(self.training),
        }
        return document

    @classmethod
    def from_dict(cls, document: Any) -> "Plan":
        """Read and check a plan's JSON object; raises ``PlanMalformed``. Says nothing about who wrote it."""
        plan = _read_plan(document)
        expected = plan_id_of(plan)
        if plan.plan_id != expected:
            raise PlanMalformed(f"plan_id must be the digest of the plan: expected {expected}, got {plan.plan_id}")
        return plan


def plan_id_of(plan: Plan) -> str:
    """``plan-`` and the first 16 hex digits of the SHA-256 of the canonical plan without its id."""
    document = plan.to_dict()
    del document["plan_id"]
    return "plan-" + sha256_hex(canonical_json(document))[:16]


def create_plan(
    *,
    federation: str,
    base_model: str,
    base_model_digest: str,
    modules: Iterable[ModuleSpec],
    rank: int,
    alpha: float,
    seed: int,
    gateway_keys: Iterable[GatewayKey],
    dtype: str = "float32",
    routing: str = "prompt_evidence",
    calibration: str = "public",
    training: TrainingLimits | None = None,
    created_at: datetime | None = None,
) -> Plan:
    """Draw every A, note its digest and give the plan its id; raises ``PlanMalformed``.

    ``base_model`` is a name for people; ``base_model_digest`` (``seqr.models.base_model_digest``) is what binds.
    """
    from seqr.canonical import array_digest
    from seqr.shared_a import draw_a_array

    draft = Plan(
        plan_id="",
        federation=federation,
        base_model=base_model,
        base_model_digest=base_model_digest,
        modules=tuple(modules),
        rank=rank,
        alpha=float(alpha),
        seed=seed,
        dtype=dtype,
        a_digests={},
        gateway_keys=tuple(gateway_keys),
        routing=routing,
        calibration=calibration,
        training=training or TrainingLimits(),
        created_at=utc_text(created_at or utc_now()),
    )
    # Limits first: a draft with an absurd rank must be refused before anything of that size is drawn.
    _read_plan(draft.to_dict() | {"plan_id": "plan-draft", "a_digests": {m.name: "0" * 64 for m in draft.modules}})
    digests = {m.name: array_digest(draw_a_array(seed, m.name, rank, m.in_features)) for m in draft.modules}
    plan = replace(draft, a_digests=digests)
    return Plan.from_dict(replace(plan, plan_id=plan_id_of(plan)).to_dict())


def sign_plan(plan: Plan, key: SigningKey) -> dsse.Envelope:
    """The plan in an envelope signed by the coordinator."""
    return dsse.sign(PLAN_PAYLOAD_TYPE, canonical_json(plan.to_dict()), key)


def verify_plan(envelope: dsse.Envelope, coordinator_key: VerifyKey) -> Plan:
    """The plan in ``envelope``, if the pinned coordinator key signed it.

    Raises ``PlanSignatureInvalid``, ``PlanMalformed``, or ``PayloadTypeMismatch`` when it is another kind of document.
    """
    try:
        payload = dsse.verify(envelope, [coordinator_key], PLAN_PAYLOAD_TYPE)
    except dsse.SignatureInvalid as error:
        raise PlanSignatureInvalid(
            f"the plan is not signed by the pinned coordinator key {coordinator_key.key_id} "
            f"({coordinator_key.fingerprint}): {error}"
        ) from None
    try:
        return Plan.from_dict(parse_json(payload, "the plan", MAX_PLAN_BYTES))
    except JsonMalformed as error:
        raise PlanMalformed(str(error)) from None


_PLAN_FIELDS = frozenset(f.name for f in fields(Plan)) | {"type", "a_generator"}


def _read_plan(document: Any) -> Plan:
    plan = Fields(document, "the plan", PlanMalformed, _PLAN_FIELDS)
    plan.constant("type", PLAN_TYPE)
    plan.constant("a_generator", A_GENERATOR)
    modules = tuple(_read_module(item) for item in plan.items("modules", MAX_MODULES))
    names = {module.name for module in modules}
    if not modules or len(names) != len(modules):
        raise PlanMalformed("the plan must name at least one module, and each only once")
    rank = plan.integer("rank", 1, MAX_RANK)
    for module in modules:
        if rank > min(module.in_features, module.out_features):
            raise PlanMalformed(
                f"the plan's rank {rank} is larger than module {module.name} "
                f"({module.out_features} x {module.in_features}) allows"
            )
    a_digests = plan.digest_map("a_digests", MAX_MODULES)
    if set(a_digests) != names:
        raise PlanMalformed("the plan's a_digests must name exactly its modules")
    keys = tuple(_read_gateway_key(item) for item in plan.items("gateway_keys", MAX_GATEWAYS))
    if not keys or len({key.key_id for key in keys}) != len(keys):
        raise PlanMalformed("the plan must name at least one gateway key, and each key_id only once")
    return Plan(
        plan_id=plan.identifier("plan_id"),
        federation=plan.identifier("federation"),
        base_model=plan.text("base_model", 256),
        base_model_digest=plan.prefixed_digest("base_model_digest"),
        modules=modules,
        rank=rank,
        alpha=plan.number("alpha", 1e-6, 1e6),
        seed=plan.integer("seed", 0, 2**63 - 1),
        dtype=plan.choice("dtype", DTYPES),
        a_digests=a_digests,
        gateway_keys=keys,
        routing=plan.choice("routing", ROUTINGS),
        calibration=plan.choice("calibration", CALIBRATIONS),
        training=_read_training(plan.raw("training")),
        created_at=plan.time("created_at"),
    )


def _read_module(value: Any) -> ModuleSpec:
    module = Fields(value, "a module of the plan", PlanMalformed, ("name", "in_features", "out_features"))
    name = module.text("name", 256)
    if _MODULE_NAME.fullmatch(name) is None:
        raise module.refuse("name", "dotted attribute names such as model.layers.0.self_attn.q_proj")
    return ModuleSpec(
        name, module.integer("in_features", 1, MAX_FEATURES), module.integer("out_features", 1, MAX_FEATURES)
    )


def _read_gateway_key(value: Any) -> GatewayKey:
    names = ("key_id", "sealing_key", "signing_key")
    entry = Fields(value, "a gateway key of the plan", PlanMalformed, names)
    key = GatewayKey(entry.identifier("key_id"), entry.text("sealing_key", 4096), entry.text("signing_key"))
    try:
        SealingPublicKey.from_b64(key.sealing_key)
        VerifyKey.from_b64(key.signing_key)
    except KeyInvalid as error:
        raise PlanMalformed(f"gateway key {key.key_id}: {error}") from None
    return key


def _read_training(value: Any) -> TrainingLimits:
    names = [f.name for f in fields(TrainingLimits)]
    training = Fields(value, "the plan's training", PlanMalformed, names)
    return TrainingLimits(
        max_steps=training.integer("max_steps", 1, 1_000_000),
        batch_size=training.integer("batch_size", 1, 65_536),
        learning_rate=training.number("learning_rate", 1e-9, 10.0),
        max_length=training.integer("max_length", 8, 1 << 20),
        warmup_steps=training.integer("warmup_steps", 0, 1_000_000),
    )
