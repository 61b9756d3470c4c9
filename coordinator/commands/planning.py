"""Making a plan from a base model and gateway keys."""

import json
import secrets
from dataclasses import dataclass
from pathlib import Path

from coordinator import plans
from coordinator.core import open_coordinator
from coordinator.db import reading, writing
from coordinator.errors import GatewayKeyInvalid
from coordinator.settings import Settings
from seqr.models import inspect_base_model
from seqr.plan import GatewayKey, Plan, TrainingLimits, create_plan, sign_plan

OPERATOR = "operator"


@dataclass(frozen=True)
class PlanOptions:
    """What `seqr coordinator plan create` was given."""

    base_model: Path
    gateway_keys: list[Path]
    name: str
    targets: str
    rank: int
    alpha: float | None
    seed: int | None
    dtype: str
    routing: str
    calibration: str
    training: TrainingLimits


def make_plan(settings: Settings, options: PlanOptions) -> Plan:
    """Create, sign and store a plan. Raises the named errors of seqr.models and seqr.plan, GatewayKeyInvalid."""
    coordinator = open_coordinator(settings)
    keys = [read_gateway_key(path) for path in options.gateway_keys]
    base = inspect_base_model(options.base_model, options.targets, options.name or None)
    plan = create_plan(
        federation=settings.federation,
        base_model=base.name,
        base_model_digest=base.digest,
        modules=base.modules,
        rank=options.rank,
        alpha=2.0 * options.rank if options.alpha is None else options.alpha,
        seed=secrets.randbelow(2**63) if options.seed is None else options.seed,
        gateway_keys=keys,
        dtype=options.dtype,
        routing=options.routing,
        calibration=options.calibration,
        training=options.training,
    )
    envelope = sign_plan(plan, coordinator.key).to_json()
    with writing(coordinator.engine) as connection:
        plans.store(connection, envelope, coordinator.key.public, OPERATOR, "created at the command line")
    return plan


def load_plan(settings: Settings, plan_id: str | None) -> tuple[bytes, Plan]:
    """The envelope and the plan. Raises PlanMissing, PlanUnknown."""
    with reading(open_coordinator(settings).engine) as connection:
        wanted = plan_id or plans.current(connection)
        return plans.envelope(connection, wanted), plans.load(connection, wanted)


def read_gateway_key(path: Path) -> GatewayKey:
    """The public keys in a gateway-key.json. Raises GatewayKeyInvalid."""
    try:
        document = json.loads(path.read_bytes())
        return GatewayKey(document["key_id"], document["sealing_key"], document["signing_key"])
    except (OSError, ValueError, KeyError, TypeError):
        raise GatewayKeyInvalid(f"{path} is not the gateway-key.json that `seqr gateway init` writes") from None
