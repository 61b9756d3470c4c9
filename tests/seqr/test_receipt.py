import base64
import json
import subprocess
import sys
from dataclasses import replace

import pytest

from seqr import dsse
from seqr.canonical import canonical_json
from seqr.cli import main
from seqr.job import MAX_COMMITMENTS, AttestationSignatureInvalid, ErasureAttestation, sign_attestation
from seqr.purge import PurgeAcknowledgement, PurgeMalformed, PurgeSignatureInvalid, sign_purge, verify_purge
from seqr.receipt import (
    DOES_NOT_PROVE,
    RECEIPT_PAYLOAD_TYPE,
    Receipt,
    ReceiptInconsistent,
    ReceiptMalformed,
    ReceiptSignatureInvalid,
    RevisionRef,
    read_unverified,
    sign_receipt,
    verify_receipt,
)

OLD = RevisionRef("rev-1", 1, "ee" * 32)
NEW = RevisionRef("rev-2", 2, "ff" * 32)
ATTESTATION = ErasureAttestation(
    request_id="del-1",
    silo_id="clinic",
    plan_id="plan-0123456789abcdef",
    removed_commitments=("aa" * 32, "bb" * 32),
    dataset_root_before="cc" * 32,
    dataset_root_after="dd" * 32,
    records_removed=2,
    old_adapter_digest=OLD.adapter_digest,
    new_adapter_digest=NEW.adapter_digest,
    base_model_digest="sha256:" + "11" * 32,
    seed=7,
    environment={"torch": "2.13.0"},
    completed_at="2026-03-01T13:00:00Z",
)


@pytest.fixture
def purge(gateway_key) -> PurgeAcknowledgement:
    return PurgeAcknowledgement(
        revision_id="rev-1",
        silo_id="clinic",
        adapter_digest=OLD.adapter_digest,
        gateway_key_id=gateway_key.key_id,
        library_version=5,
        purged_at="2026-03-01T13:05:00Z",
        where=("library", "evidence state", "KV cache"),
    )


@pytest.fixture
def receipt(silo_key, gateway_signing_key, gateway_key, purge) -> Receipt:
    return Receipt(
        request_id="del-1",
        silo_id="clinic",
        plan_id="plan-0123456789abcdef",
        subject_commitment="22" * 32,
        requested_at="2026-03-01T12:00:00Z",
        quarantined_at="2026-03-01T12:00:00Z",
        issued_at="2026-03-01T13:06:00Z",
        old_revision=OLD,
        new_revision=NEW,
        destroyed=(OLD,),
        gateways=(gateway_key.key_id,),
        erasure=sign_attestation(ATTESTATION, silo_key),
        purges=(sign_purge(purge, gateway_signing_key),),
        audit_head="33" * 32,
        versions={"seqr": "0.1.0"},
    )


@pytest.fixture
def check(coordinator_key, silo_key, gateway_signing_key):
    """Sign ``receipt`` as the coordinator and verify it with the right public keys."""

    def run(receipt: Receipt, **keys):
        known = {
            "coordinator_key": coordinator_key.public,
            "silo_keys": [silo_key.public],
            "gateway_keys": [gateway_signing_key.public],
        }
        envelope = dsse.Envelope.from_json(sign_receipt(receipt, coordinator_key).to_json())
        return verify_receipt(envelope, **(known | keys))

    return run


def test_a_true_receipt_verifies_and_says_what_it_cannot_prove(receipt, check, gateway_key):
    report = check(receipt)
    assert report.receipt == receipt and report.attestation == ATTESTATION
    text = "\n".join(report.verified)
    for fact in ("del-1", "clinic", "2026-03-01T12:00:00Z", "2 records removed", gateway_key.key_id, "KV cache"):
        assert fact in text
    assert report.receipt.does_not_prove == DOES_NOT_PROVE and "keeps no copy" in DOES_NOT_PROVE[0]


def test_the_same_receipt_has_the_same_bytes(receipt, coordinator_key):
    assert sign_receipt(receipt, coordinator_key).to_json() == sign_receipt(receipt, coordinator_key).to_json()


def test_a_receipt_for_a_silo_that_had_trained_nothing_needs_no_purge(receipt, check, silo_key):
    attestation = replace(ATTESTATION, old_adapter_digest=None)
    fresh = replace(
        receipt, old_revision=None, destroyed=(), purges=(), erasure=sign_attestation(attestation, silo_key)
    )
    assert check(fresh).purges == ()


def test_a_receipt_for_the_last_record_of_a_silo_has_no_new_revision(receipt, check, silo_key):
    attestation = replace(ATTESTATION, new_adapter_digest=None)
    last = replace(receipt, new_revision=None, erasure=sign_attestation(attestation, silo_key))
    assert "no record is left" in check(last).verified[-1]


def test_records_that_training_never_reached_may_leave_the_adapter_as_it_was(receipt, check, silo_key):
    attestation = replace(ATTESTATION, new_adapter_digest=OLD.adapter_digest)
    same = replace(
        receipt,
        new_revision=replace(NEW, adapter_digest=OLD.adapter_digest),
        erasure=sign_attestation(attestation, silo_key),
    )
    assert any("it never depended on them" in line for line in check(same).verified)


def test_the_receipt_of_the_largest_erasure_can_be_checked_from_its_file(
    receipt, silo_key, coordinator_key, tmp_path, capsys
):
    commitments = tuple(f"{number:064x}" for number in range(MAX_COMMITMENTS))
    attestation = replace(ATTESTATION, removed_commitments=commitments, records_removed=MAX_COMMITMENTS)
    large = replace(receipt, erasure=sign_attestation(attestation, silo_key))
    (tmp_path / "receipt.json").write_bytes(sign_receipt(large, coordinator_key).to_json())
    with pytest.raises(SystemExit) as ended:
        main(["receipt", "show", str(tmp_path / "receipt.json")])
    assert ended.value.code == 0 and commitments[-1] in capsys.readouterr().out


# --- forged ---------------------------------------------------------------------------------------------------------


def test_a_receipt_signed_by_anyone_else_is_refused(receipt, check, stranger_key):
    with pytest.raises(ReceiptSignatureInvalid):
        check(receipt, coordinator_key=stranger_key.public)


def test_a_receipt_changed_after_signing_is_refused(receipt, coordinator_key, silo_key, gateway_signing_key):
    envelope = sign_receipt(receipt, coordinator_key)
    changed = replace(envelope, payload=envelope.payload.replace(b"del-1", b"del-2"))
    with pytest.raises(ReceiptSignatureInvalid):
        verify_receipt(changed, coordinator_key.public, [silo_key.public], [gateway_signing_key.public])


def test_an_attestation_that_the_silo_did_not_sign_is_refused(receipt, check, coordinator_key):
    forged = replace(receipt, erasure=sign_attestation(ATTESTATION, coordinator_key))
    with pytest.raises(AttestationSignatureInvalid):
        check(forged)


def test_a_purge_that_no_gateway_signed_is_refused(receipt, check, coordinator_key, purge):
    with pytest.raises(PurgeSignatureInvalid):
        check(replace(receipt, purges=(sign_purge(purge, coordinator_key),)))


def test_another_statement_of_the_silo_cannot_stand_for_its_attestation(receipt, check, silo_key):
    relabelled = dsse.sign("application/vnd.seqr.manifest+json", receipt.erasure.payload, silo_key)
    with pytest.raises(dsse.PayloadTypeMismatch):
        check(replace(receipt, erasure=relabelled))


def test_one_gateway_cannot_acknowledge_for_another(receipt, check, purge, gateway_signing_key):
    double = sign_purge(replace(purge, gateway_key_id="other-gateway"), gateway_signing_key)
    forged = replace(receipt, gateways=(*receipt.gateways, "other-gateway"), purges=(*receipt.purges, double))
    with pytest.raises(ReceiptInconsistent, match="one key signed the purges of two gateways"):
        check(forged)


# --- genuine parts that do not belong together ----------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"request_id": "del-0"}, "attests request_id del-0, the coordinator's statement says del-1"),
        ({"silo_id": "bank"}, "attests silo_id bank"),
        ({"plan_id": "plan-f"}, "attests plan_id plan-f"),
        ({"old_adapter_digest": "00" * 32}, "attests old_adapter_digest 00"),
        ({"old_adapter_digest": None}, "attests old_adapter_digest none"),
        ({"new_adapter_digest": "00" * 32}, "attests new_adapter_digest 00"),
        ({"new_adapter_digest": None}, "attests new_adapter_digest none"),
    ],
    ids=lambda value: str(value)[:40],
)
def test_an_attestation_of_another_erasure_is_refused(changes, sentence, receipt, check, silo_key):
    with pytest.raises(ReceiptInconsistent, match=sentence):
        check(replace(receipt, erasure=sign_attestation(replace(ATTESTATION, **changes), silo_key)))


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"revision_id": "rev-9"}, "purged rev-9, not a revision named"),
        ({"silo_id": "bank"}, "purged silo bank, not clinic"),
        ({"adapter_digest": "00" * 32}, "purged adapter 00"),
        ({"gateway_key_id": "someone"}, "gateway someone is not one of the plan's gateways"),
    ],
    ids=lambda value: str(value)[:40],
)
def test_a_purge_of_something_else_is_refused(changes, sentence, receipt, check, purge, gateway_signing_key):
    with pytest.raises(ReceiptInconsistent, match=sentence):
        check(replace(receipt, purges=(sign_purge(replace(purge, **changes), gateway_signing_key),)))


def test_a_gateway_that_did_not_acknowledge_is_named(receipt, check):
    with pytest.raises(
        ReceiptInconsistent, match="no purge acknowledgement for revision rev-1 by gateway slow-gateway"
    ):
        check(replace(receipt, gateways=(*receipt.gateways, "slow-gateway")))
    with pytest.raises(ReceiptInconsistent, match="no purge acknowledgement"):
        check(replace(receipt, purges=()))
    with pytest.raises(ReceiptInconsistent, match="none named"):
        check(replace(receipt, purges=(), gateways=()))


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"destroyed": ()}, "old revision rev-1 is not among those destroyed"),
        ({"destroyed": (OLD, OLD)}, "names a destroyed revision twice"),
        ({"new_revision": replace(NEW, adapter_digest=OLD.adapter_digest)}, "is one of those destroyed"),
        ({"new_revision": replace(NEW, revision_id="rev-1")}, "is one of those destroyed"),
        ({"new_revision": replace(NEW, revision=1)}, "new revision number 1 is not above the old one 1"),
        ({"quarantined_at": "2026-03-01T11:59:59Z"}, "quarantined_at .* is before requested_at"),
        ({"issued_at": "2026-03-01T11:59:59Z"}, "issued_at .* is before quarantined_at"),
    ],
    ids=lambda value: str(value)[:40],
)
def test_a_statement_that_contradicts_itself_is_refused(changes, sentence, receipt, check):
    with pytest.raises(ReceiptInconsistent, match=sentence):
        check(replace(receipt, **changes))


@pytest.mark.parametrize(
    "changes",
    [
        {"does_not_prove": []},
        {"gateways": ["a", "a"]},
        {"gateways": [{}]},
        {"erasure": {}},
        {"purges": [1]},
        {"old_revision": {"revision_id": "rev-1"}},
        {"audit_head": "x"},
        {"subject": "Jane Doe"},
    ],
    ids=lambda value: str(value)[:40],
)
def test_a_malformed_receipt_is_refused(changes, receipt, coordinator_key):
    envelope = dsse.sign(RECEIPT_PAYLOAD_TYPE, canonical_json(receipt.to_dict() | changes), coordinator_key)
    with pytest.raises(ReceiptMalformed):
        read_unverified(envelope)
    with pytest.raises(ReceiptMalformed):
        verify_receipt(envelope, coordinator_key.public, [], [])


def test_signed_nonsense_is_refused(coordinator_key, gateway_signing_key):
    nonsense = dsse.sign(RECEIPT_PAYLOAD_TYPE, b"{", coordinator_key)
    with pytest.raises(ReceiptMalformed, match="the receipt is not valid JSON"):
        verify_receipt(nonsense, coordinator_key.public, [], [])
    nonsense = dsse.sign("application/vnd.seqr.purge+json", b"{", gateway_signing_key)
    with pytest.raises(PurgeMalformed, match="the purge acknowledgement is not valid JSON"):
        verify_purge(nonsense, [gateway_signing_key.public])


@pytest.mark.parametrize("changes", [{"where": []}, {"where": "disk"}, {"library_version": -1}, {"purged_at": "now"}])
def test_a_malformed_purge_acknowledgement_is_refused(changes, purge, gateway_signing_key):
    document = canonical_json(purge.to_dict() | changes)
    envelope = dsse.sign("application/vnd.seqr.purge+json", document, gateway_signing_key)
    with pytest.raises(PurgeMalformed):
        verify_purge(envelope, [gateway_signing_key.public])


# --- the command ----------------------------------------------------------------------------------------------------


@pytest.fixture
def files(receipt, coordinator_key, silo_key, gateway_signing_key, gateway_key, tmp_path):
    keys = {"coordinator": coordinator_key, "silo": silo_key, "gateway": gateway_signing_key}
    for name, key in keys.items():
        (tmp_path / f"{name}.pub").write_text(key.public.to_b64() + "\n")
    (tmp_path / "gateway-key.json").write_text(json.dumps({"signing_key": gateway_signing_key.public.to_b64()}))
    (tmp_path / "receipt.json").write_bytes(sign_receipt(receipt, coordinator_key).to_json())
    return tmp_path


def arguments(files, **changes) -> list[str]:
    names = {"receipt": "receipt.json", "coordinator": "coordinator.pub", "silo": "silo.pub", "gateway": "gateway.pub"}
    path = {role: str(files / name) for role, name in (names | changes).items()}
    options = ["--coordinator-key", path["coordinator"], "--silo-key", path["silo"], "--gateway-key", path["gateway"]]
    return ["receipt", "verify", path["receipt"], *options]


@pytest.mark.parametrize("gateway", ["gateway.pub", "gateway-key.json"])
def test_the_command_verifies_with_public_keys_alone(files, capsys, gateway):
    with pytest.raises(SystemExit) as ended:
        main(arguments(files, gateway=gateway))
    out = capsys.readouterr().out
    assert ended.value.code == 0
    assert "The receipt is valid" in out and "2 records removed" in out and "does not prove" in out


def test_the_command_prints_json_on_request(files, capsys):
    with pytest.raises(SystemExit):
        main([*arguments(files), "--json"])
    result = json.loads(capsys.readouterr().out)
    assert result["valid"] is True
    assert result["receipt"]["erasure"]["statement"]["records_removed"] == 2


@pytest.mark.parametrize(
    ("changes", "code"),
    [
        ({"receipt": "absent.json"}, "receipt_file_missing"),
        ({"receipt": "silo.pub"}, "envelope_malformed"),
        ({"coordinator": "silo.pub"}, "receipt_signature_invalid"),
        ({"silo": "gateway.pub"}, "attestation_signature_invalid"),
        ({"gateway": "silo.pub"}, "purge_signature_invalid"),
        ({"gateway": "absent.pub"}, "key_file_missing"),
        ({"silo": "receipt.json"}, "key_invalid"),
    ],
    ids=lambda value: str(value),
)
def test_the_command_names_what_is_wrong_in_one_sentence(files, capsys, changes, code):
    with pytest.raises(SystemExit) as ended:
        main(arguments(files, **changes))
    err = capsys.readouterr().err
    assert ended.value.code == 1
    assert err.startswith(f"error[{code}]: ") and err.count("\n") == 1


def test_show_prints_the_content_and_says_that_nothing_was_checked(files, capsys):
    with pytest.raises(SystemExit):
        main(["receipt", "show", str(files / "receipt.json")])
    captured = capsys.readouterr()
    assert "NOT VERIFIED" in captured.err
    assert json.loads(captured.out)["purges"][0]["statement"]["where"] == ["library", "evidence state", "KV cache"]


def test_the_command_works_with_the_core_installation_alone(files):
    """Every package that only a role's extra brings is made unimportable."""
    extras = ["torch", "transformers", "safetensors", "flwr", "fastapi", "sqlalchemy", "peft"]
    lines = ["import sys", f"sys.modules |= dict.fromkeys({extras!r})", "from seqr.cli import main"]
    code = "\n".join([*lines, f"main({arguments(files)!r})"])
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0 and "The receipt is valid" in done.stdout, done.stderr


def test_an_independent_verifier_needs_nothing_of_ours(receipt, coordinator_key):
    """The receipt is plain DSSE over JSON: twenty lines with any Ed25519 library check it."""
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey

    envelope = json.loads(sign_receipt(receipt, coordinator_key).to_json())
    payload = base64.b64decode(envelope["payload"])
    kind = envelope["payloadType"].encode()
    message = b"DSSEv1 " + str(len(kind)).encode() + b" " + kind + b" " + str(len(payload)).encode() + b" " + payload
    key = Ed25519PublicKey.from_public_bytes(base64.b64decode(coordinator_key.public.to_b64()))
    key.verify(base64.b64decode(envelope["signatures"][0]["sig"]), message)
    assert json.loads(payload)["request_id"] == "del-1"
