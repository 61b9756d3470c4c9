"""What ``seqr silo status`` says, line by line. Nothing here is sent anywhere."""

from collections.abc import Iterator

from seqr.errors import SeqrError
from seqr.keys import VerifyKey
from seqr.plan import Plan
from silo_client.config import SiloConfig
from silo_client.erased import Tombstones
from silo_client.state import State, read_json


def status(config: SiloConfig, state: State) -> Iterator[str]:
    """The silo at a glance."""
    yield f"silo {config.silo_id} ({config.display_name or config.silo_id})"
    yield f"fingerprint {state.signing_key().public.fingerprint}"
    plan = _plan(config, state)
    if plan is None:
        yield "no plan has been received yet"
    else:
        shape = f"rank {plan.rank}, {len(plan.modules)} modules"
        yield f"plan {plan.plan_id} of federation {plan.federation}: {plan.base_model}, {shape}"
        yield from _adapter(state, plan)
    erased = len(Tombstones(state))
    if erased:
        yield f"{erased} {'subject was' if erased == 1 else 'subjects were'} erased here"
    last = read_json(state.path / "last_error.json")
    if last is not None:
        yield f"last refused order, {last['at']}: {last['message']} [{last['code']}]"


def what_leaves(config: SiloConfig, state: State) -> Iterator[str]:
    """Everything that leaves this silo, from the objects that would be sent."""
    from silo_client.adapters import last_adapter
    from silo_client.enrol import request_body
    from silo_client.outgoing import what_leaves as parts_of

    yield "once, with 'seqr silo enrol', to the coordinator:"
    for name, value in request_body(config, state).items():
        yield f"  {name}: {value if name != 'proof' else 'the above, signed by the signing key'}"
    yield "while 'seqr silo run' is connected, to the SuperLink: that this node is online, signed with its node key"
    plan = _plan(config, state)
    trained = None if plan is None else last_adapter(state, plan.plan_id)
    if plan is None or trained is None:
        yield "after a training job: nothing has been trained yet; 'seqr silo train' trains without sending anything"
    else:
        gateways = ", ".join(key.key_id for key in plan.gateway_keys)
        yield f"after a training job, sealed so that only gateway {gateways} of plan {plan.plan_id} can read it:"
        for part in parts_of(trained, config):
            yield f"  {part.place} {part.name}: {part.value}"
        if not config.share_counts:
            yield "  (records and tokens are withheld; share_counts = true in silo.toml would send them)"
    yield "after an erasure, signed, to the coordinator: salted hashes of the removed records and thereby their number,"
    yield "  the Merkle root of all salted hashes before and after, the old and new adapter digest, the environment"
    yield "when an order cannot be carried out: one of the fixed sentences of silo_client/jobs.py"


def _adapter(state: State, plan: Plan) -> Iterator[str]:
    from silo_client.adapters import last_adapter

    trained = last_adapter(state, plan.plan_id)
    if trained is None:
        yield "no adapter has been trained under this plan"
        return
    yield f"adapter {trained.adapter.digest[:16]}…, trained on {trained.records} records of {trained.tokens} tokens"
    sent = (read_json(state.path / "sent.json") or {}).get(plan.plan_id)
    yield "it has not been sent" if sent != trained.adapter.digest else "it was sent to the coordinator, sealed"


def _plan(config: SiloConfig, state: State) -> Plan | None:
    try:
        return state.latest_plan(VerifyKey.from_b64(config.coordinator.public_key))
    except SeqrError:
        # None received, or one signed by another key than the one now pinned: no plan of this silo any more.
        return None
