"""The Flower ClientApp: takes an order out of a message, has it carried out, and packs the reply."""

import logging
import os
import traceback
from typing import TYPE_CHECKING

import numpy as np
from flwr.app import Array, ArrayRecord, ConfigRecord, Context, Message, RecordDict
from flwr.clientapp import ClientApp

if TYPE_CHECKING:
    from silo_client.jobs import JobReply

# Which silo this process works for. From the environment and never from the run, whose settings the coordinator writes.
SILO_DIRECTORY = "SEQR_SILO_DIRECTORY"
# What a bundle may weigh: Flower's own limit for one message is 2 GiB - 1.
BUNDLE_LIMIT_BYTES = 1 << 30
# A plan of seqr.plan's greatest size, in base64.
ORDER_LIMIT_BYTES = 8 << 20

logger = logging.getLogger(__name__)
app = ClientApp()


@app.train("job")  # type: ignore[untyped-decorator]
def job(message: Message, context: Context) -> Message:
    """Carry out one signed order."""
    return Message(content=pack_reply(_carry_out(message.content)), reply_to=message)


def pack_reply(reply: "JobReply") -> RecordDict:
    """The reply as Flower records: ``reply`` with the outcome, ``bundle`` with the sealed bytes as a uint8 Array."""
    outcome: dict[str, str | bytes] = {"status": reply.status, "code": reply.code, "message": reply.message}
    if reply.attestation:
        outcome["attestation"] = reply.attestation
    if reply.bundle and len(reply.bundle) > BUNDLE_LIMIT_BYTES:
        outcome = {"status": "error", "code": "bundle_too_large", "message": "The sealed bundle exceeds 1 GiB."}
        return RecordDict({"reply": ConfigRecord(outcome)})
    records = RecordDict({"reply": ConfigRecord(outcome)})
    if reply.bundle:
        records["bundle"] = ArrayRecord({"sealed": Array(np.frombuffer(reply.bundle, dtype=np.uint8))})
    return records


def _carry_out(content: RecordDict) -> "JobReply":
    from silo_client.config import load_config
    from silo_client.jobs import JobReply, handle_job

    try:
        order = _bytes(content, "envelope")
        plan = _bytes(content, "plan")
        if order is None or plan is None:
            return JobReply(status="error", code="order_malformed", message="The message holds no order and plan.")
        return handle_job(order, plan, load_config(os.environ[SILO_DIRECTORY]))
    # The text of an unforeseen error may quote a record, and Flower would send it on: only its place is kept.
    except Exception as error:  # noqa: BLE001
        frames = traceback.extract_tb(error.__traceback__)
        where = " < ".join(f"{frame.name}:{frame.lineno}" for frame in reversed(frames[-4:]))
        logger.error("%s at %s", type(error).__name__, where)
        return JobReply(status="error", code="internal_error", message="The silo could not carry out the order.")


def _bytes(content: RecordDict, name: str) -> bytes | None:
    record = content.get("order")
    value = record.get(name) if isinstance(record, ConfigRecord) else None
    return value if isinstance(value, bytes) and 0 < len(value) <= ORDER_LIMIT_BYTES else None
