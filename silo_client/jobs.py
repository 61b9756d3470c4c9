"""Orders from the coordinator, carried out: verified, idempotent by nonce, and safe to kill at any moment.

An order is noted before any work and its reply stored before it is returned. The same order again goes on where a kill
interrupted it, or gets the stored reply; another order under a used nonce is refused. What goes back in case of an
error is a code and a fixed sentence, because an exception's own words may quote a file, a count or a record.
"""

import logging
from dataclasses import dataclass, replace
from datetime import timedelta

from seqr.canonical import canonical_json, sha256_hex
from seqr.document import parse_utc, utc_now
from seqr.dsse import Envelope
from seqr.errors import SeqrError
from seqr.files import write_private
from seqr.job import JobOrder, verify_job
from seqr.keys import VerifyKey
from seqr.plan import Plan, verify_plan
from silo_client.config import SiloConfig
from silo_client.errors import (
    DataError,
    NonceReused,
    NoRecords,
    OrderExpired,
    OrderForAnotherSilo,
    PlanMismatch,
    ReplyDestroyed,
)
from silo_client.quiet import quiet
from silo_client.state import State, read_json, write_json

log = logging.getLogger("seqr.silo")

LOCK_WAIT_S = 600.0
KEPT_BUNDLES = 3
JOURNAL_KEPT = timedelta(days=30)

# The sentences that may leave the silo. A code that is not here leaves as "silo_failed".
SENTENCES = {
    "subject_unknown": "No record of this silo is about the subject; nothing was changed.",
    "data_invalid": "The silo's data cannot be used as it is; its owner sees why with 'seqr silo check'.",
    "no_records": "The silo has no record to train on.",
    "base_model_missing": "The silo has no base model where its settings say.",
    "base_model_mismatch": "The silo's base model is not the plan's.",
    "module_mismatch": "The silo's base model does not have the modules of the plan.",
    "shared_a_mismatch": "The silo draws another A than the plan says.",
    "chat_template_unusable": "The base model's chat template cannot be used for training.",
    "training_diverged": "Training did not stay finite under the plan's limits.",
    "factorization_refused": "Training did not give factors of full shape.",
    "silo_busy": "The silo is at work on something else; send the order again later.",
    "state_damaged": "The silo's state directory is damaged; its owner has to repair it.",
    "order_for_another_silo": "The order is for another silo.",
    "order_expired": "The order has expired.",
    "nonce_reused": "The nonce of this order was used by another order.",
    "plan_mismatch": "The plan is not the one that the order names.",
    "reply_destroyed": "The reply to this order was destroyed; issue a new order.",
    "job_signature_invalid": "The order is not signed by the coordinator that this silo trusts.",
    "job_malformed": "The order cannot be read.",
    "plan_signature_invalid": "The plan is not signed by the coordinator that this silo trusts.",
    "plan_malformed": "The plan cannot be read.",
    "envelope_malformed": "The order or the plan cannot be read.",
    "payload_type_mismatch": "The order or the plan is a document of another kind.",
    "silo_failed": "The silo could not carry out the order; its owner sees why with 'seqr silo status'.",
}


@dataclass(frozen=True)
class JobReply:
    """What goes back: a signed ``attestation`` after an erasure, the sealed adapter as ``bundle``, or neither."""

    status: str
    code: str = ""
    message: str = ""
    attestation: bytes = b""
    bundle: bytes | None = None


def handle_job(order_env: bytes, plan_env: bytes, config: SiloConfig) -> JobReply:
    """Carry out one order. Never raises: whatever goes wrong becomes a reply with a code and a fixed sentence."""
    quiet()
    try:
        return _handle(order_env, plan_env, config)
    except DataError as error:
        return _refusal(config, "data_invalid", error)
    except SeqrError as error:
        return _refusal(config, error.code, error)
    except Exception as error:  # noqa: BLE001 - what leaves the silo is a fixed sentence, whatever went wrong
        return _refusal(config, "silo_failed", error)


def _handle(order_env: bytes, plan_env: bytes, config: SiloConfig) -> JobReply:
    state = State.open(config)
    coordinator = VerifyKey.from_b64(config.coordinator.public_key)
    order = verify_job(Envelope.from_json(order_env), coordinator)
    if order.silo_id != config.silo_id:
        raise OrderForAnotherSilo(f"the order is for silo {order.silo_id}, this is {config.silo_id}")
    plan = verify_plan(Envelope.from_json(plan_env), coordinator)
    if plan.plan_id != order.plan_id:
        raise PlanMismatch(f"the order names plan {order.plan_id} and came with plan {plan.plan_id}")
    with state.lock(LOCK_WAIT_S):
        journal = _Journal(state, order)
        stored = journal.stored_reply()
        if stored is not None:
            return stored
        if not journal.begun and order.expired(utc_now()):
            raise OrderExpired(f"order {order.job_id} expired at {order.expires_at}; ask for a new one")
        state.save_plan(plan, plan_env)
        if order.kind == "ping":
            return JobReply("ok")
        journal.begin()
        log.info("job %s (%s) begins", order.job_id, order.kind)
        reply = _train(config, state, plan, order) if order.kind == "train" else _erase(config, state, plan, order)
        journal.store(reply)
        log.info("job %s (%s) is done", order.job_id, order.kind)
        return reply


def _train(config: SiloConfig, state: State, plan: Plan, order: JobOrder) -> JobReply:
    from silo_client.adapters import obtain_adapter
    from silo_client.outgoing import sealed_bundle

    trained = obtain_adapter(config, state, plan)
    bundle = sealed_bundle(trained, config, state, plan, order)
    note_sent(state, plan.plan_id, trained.adapter.digest)
    return JobReply("ok", bundle=bundle)


def _erase(config: SiloConfig, state: State, plan: Plan, order: JobOrder) -> JobReply:
    from silo_client.adapters import current_corpus, obtain_adapter
    from silo_client.base import require_base_model
    from silo_client.determinism import environment
    from silo_client.erased import Tombstones
    from silo_client.erasure import erase
    from silo_client.outgoing import attestation, sealed_bundle

    require_base_model(config, plan)
    tombstone = erase(
        config,
        state,
        Tombstones(state),
        str(order.subject),
        usable=current_corpus(config, state, plan).commitments,
        old_adapter_digest=old_adapter_digest(state, plan.plan_id),
    )
    try:
        trained = obtain_adapter(config, state, plan)
    except NoRecords:
        root, new = current_corpus(config, state, plan).root, None
        signed = attestation(order, plan, tombstone, state, root, new, environment(config))
        return JobReply("ok", code="no_records_left", message="No record is left to train on.", attestation=signed)
    root, new = trained.dataset_root, trained.adapter.digest
    signed = attestation(order, plan, tombstone, state, root, new, trained.environment)
    bundle = sealed_bundle(trained, config, state, plan, order)
    note_sent(state, plan.plan_id, trained.adapter.digest)
    return JobReply("ok", attestation=signed, bundle=bundle)


def note_sent(state: State, plan_id: str, digest: str) -> None:
    """Remember the digest of the adapter that the coordinator gets, for the next erasure's attestation."""
    sent = read_json(state.path / "sent.json") or {}
    write_json(state.path / "sent.json", {**sent, plan_id: digest})


def old_adapter_digest(state: State, plan_id: str) -> str | None:
    """The adapter that an erasure under a plan makes invalid: the one sent last, else the one trained last."""
    from silo_client.adapters import last_adapter

    sent = (read_json(state.path / "sent.json") or {}).get(plan_id)
    if sent is not None:
        return str(sent)
    trained = last_adapter(state, plan_id)
    return trained.adapter.digest if trained else None


class _Journal:
    """What is known of one order: ``jobs/<hash of nonce>.json`` once begun, ``replies/`` once answered."""

    def __init__(self, state: State, order: JobOrder) -> None:
        name = sha256_hex(order.nonce.encode())[:32]
        self._state = state
        self._order = order
        self._digest = sha256_hex(canonical_json(order.to_dict()))
        self._entry = state.path / "jobs" / f"{name}.json"
        self._reply = state.path / "replies" / f"{name}.json"
        known = read_json(self._entry)
        if known is not None and known["order"] != self._digest:
            raise NonceReused(f"order {order.job_id} carries a nonce that another order has used; ask for a new one")
        self.begun = known is not None
        self._answered = known is not None and known["answered"]

    def begin(self) -> None:
        self._forget_old_entries()
        self._note(answered=False)

    def store(self, reply: JobReply) -> None:
        """Put the reply onto the disk, the note that it exists last."""
        if reply.bundle is not None:
            write_private(self._reply.with_suffix(".sealed"), reply.bundle)
        fields = {
            "status": reply.status,
            "code": reply.code,
            "message": reply.message,
            "attestation": reply.attestation.decode(),
            "has_bundle": reply.bundle is not None,
        }
        write_json(self._reply, fields)
        self._note(answered=True)
        bundles = sorted(self._reply.parent.glob("*.sealed"), key=lambda path: path.stat().st_mtime_ns, reverse=True)
        for old in bundles[KEPT_BUNDLES:]:
            old.unlink()

    def stored_reply(self) -> JobReply | None:
        """The reply to this very order, if it was answered before.

        Raises:
            ReplyDestroyed: it was, but the reply has been destroyed by an erasure or by newer ones.
        """
        fields = read_json(self._reply)
        bundle = self._reply.with_suffix(".sealed")
        if fields is None or (fields["has_bundle"] and not bundle.is_file()):
            if self._answered:
                raise ReplyDestroyed(f"the reply to order {self._order.job_id} was destroyed; ask for a new order")
            return None
        reply = JobReply(fields["status"], fields["code"], fields["message"], fields["attestation"].encode())
        return replace(reply, bundle=bundle.read_bytes()) if fields["has_bundle"] else reply

    def _note(self, *, answered: bool) -> None:
        write_json(self._entry, {"order": self._digest, "expires_at": self._order.expires_at, "answered": answered})

    def _forget_old_entries(self) -> None:
        # An order this long expired is refused for that alone, and needs no journal.
        for path in self._entry.parent.glob("*.json"):
            entry = read_json(path)
            if entry is not None and entry["answered"] and parse_utc(entry["expires_at"]) + JOURNAL_KEPT < utc_now():
                path.unlink()


def _refusal(config: SiloConfig, code: str, error: Exception) -> JobReply:
    outgoing = code if code in SENTENCES else "silo_failed"
    # Not the error's words: whoever runs the Flower processes may collect their log.
    log.error("an order was not carried out: %s (%s)", outgoing, type(error).__name__)
    _note_for_owner(config, error)
    return JobReply("error", code=outgoing, message=SENTENCES[outgoing])


def _note_for_owner(config: SiloConfig, error: Exception) -> None:
    # Our own messages name files and lines only; those of others may say anything, and are kept nowhere.
    code, said = (error.code, str(error)) if isinstance(error, SeqrError) else ("silo_failed", type(error).__name__)
    try:
        write_json(config.state_dir / "last_error.json", {"code": code, "message": said, "at": utc_now().isoformat()})
    except OSError:
        log.error("the error could not be noted in the state directory")
