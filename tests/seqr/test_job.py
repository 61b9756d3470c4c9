from dataclasses import replace
from datetime import UTC, datetime, timedelta, timezone

import pytest

from seqr import dsse
from seqr.canonical import canonical_json
from seqr.document import parse_utc, utc_text
from seqr.job import (
    ERASURE_PAYLOAD_TYPE,
    JOB_PAYLOAD_TYPE,
    AttestationMalformed,
    AttestationSignatureInvalid,
    ErasureAttestation,
    JobMalformed,
    JobOrder,
    JobSignatureInvalid,
    new_nonce,
    record_commitment,
    sign_attestation,
    sign_job,
    verify_attestation,
    verify_job,
)

TRAIN = JobOrder(
    job_id="job-1",
    kind="train",
    silo_id="clinic",
    plan_id="plan-0123456789abcdef",
    revision=1,
    nonce="00112233445566778899aabbccddeeff",
    issued_at="2026-03-01T12:00:00Z",
    expires_at="2026-03-02T12:00:00Z",
)
ERASE = replace(TRAIN, kind="erase", revision=2, subject="Jane Dœ", request_id="del-1")
ATTESTATION = ErasureAttestation(
    request_id="del-1",
    silo_id="clinic",
    plan_id="plan-0123456789abcdef",
    removed_commitments=("aa" * 32, "bb" * 32),
    dataset_root_before="cc" * 32,
    dataset_root_after="dd" * 32,
    records_removed=2,
    old_adapter_digest="ee" * 32,
    new_adapter_digest="ff" * 32,
    base_model_digest="sha256:" + "11" * 32,
    seed=7,
    environment={"torch": "2.13.0"},
    completed_at="2026-03-01T13:00:00Z",
)


@pytest.mark.parametrize("order", [TRAIN, ERASE, replace(TRAIN, kind="ping", revision=0)], ids=lambda order: order.kind)
def test_a_signed_order_survives_transport(order, coordinator_key):
    received = dsse.Envelope.from_json(sign_job(order, coordinator_key).to_json())
    assert verify_job(received, coordinator_key.public) == order


def test_an_order_signed_by_another_key_is_refused(coordinator_key, stranger_key):
    with pytest.raises(JobSignatureInvalid, match=coordinator_key.public.key_id):
        verify_job(sign_job(TRAIN, stranger_key), coordinator_key.public)


def test_an_order_changed_after_signing_is_refused(coordinator_key):
    envelope = sign_job(ERASE, coordinator_key)
    changed = replace(envelope, payload=envelope.payload.replace("Jane Dœ".encode(), b"John Doe"))
    with pytest.raises(JobSignatureInvalid):
        verify_job(changed, coordinator_key.public)


def test_another_signed_document_cannot_pass_as_an_order(coordinator_key):
    envelope = dsse.sign(ERASURE_PAYLOAD_TYPE, canonical_json(TRAIN.to_dict()), coordinator_key)
    with pytest.raises(dsse.PayloadTypeMismatch):
        verify_job(envelope, coordinator_key.public)


def test_an_order_expires_at_its_last_moment():
    end = datetime(2026, 3, 2, 12, tzinfo=UTC)
    assert not TRAIN.expired(end - timedelta(seconds=1))
    assert TRAIN.expired(end)


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"kind": "format"}, "kind must be one of train, erase, ping, got 'format'"),
        ({"silo_id": "a/b"}, "silo_id must be an id"),
        ({"revision": 0}, "revision must be a whole number from 1"),
        ({"revision": True}, "revision must be a whole number"),
        ({"nonce": "short"}, "nonce must be at least 16 characters"),
        ({"expires_at": "2026-03-01T12:00:00Z"}, "expires_at must be later than issued_at"),
        ({"expires_at": "2026-03-02T12:00:00+00:00"}, "expires_at must be a UTC time"),
        ({"subject": "Jane"}, "subject must be null in a train job"),
        ({"request_id": "del-1"}, "request_id must be null in a train job"),
        ({"kind": "erase", "request_id": "del-1"}, "subject must be given"),
        ({"kind": "erase", "subject": "Jane"}, "request_id must be given"),
        ({"kind": "erase", "subject": "Jane\x00", "request_id": "del-1"}, "subject must be printable"),
        ({"shell": "rm"}, "unknown 'shell'"),
        ({"type": "seqr/plan/v1"}, "type must be 'seqr/job/v1'"),
    ],
    ids=lambda value: str(value)[:40],
)
def test_a_malformed_order_is_refused_with_got_and_expected(changes, sentence, coordinator_key):
    document = TRAIN.to_dict() | changes
    with pytest.raises(JobMalformed) as caught:
        verify_job(dsse.sign(JOB_PAYLOAD_TYPE, canonical_json(document), coordinator_key), coordinator_key.public)
    assert sentence in str(caught.value)


def test_a_contradictory_order_is_not_even_signed(coordinator_key):
    with pytest.raises(JobMalformed):
        sign_job(replace(TRAIN, subject="Jane"), coordinator_key)


def test_nonces_do_not_repeat():
    assert len({new_nonce() for _ in range(1000)}) == 1000


def test_a_signed_attestation_survives_transport(silo_key):
    received = dsse.Envelope.from_json(sign_attestation(ATTESTATION, silo_key).to_json())
    assert verify_attestation(received, [silo_key.public]) == ATTESTATION


def test_an_attestation_of_a_silo_with_no_record_left_has_no_new_adapter(silo_key):
    last = replace(ATTESTATION, new_adapter_digest=None)
    assert verify_attestation(sign_attestation(last, silo_key), [silo_key.public]) == last


def test_an_attestation_signed_by_another_silo_is_refused(silo_key, stranger_key):
    with pytest.raises(AttestationSignatureInvalid):
        verify_attestation(sign_attestation(ATTESTATION, stranger_key), [silo_key.public])


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"records_removed": 0}, "records_removed must be a whole number from 1"),
        ({"records_removed": 3}, "records_removed must be the number of distinct removed_commitments, 2"),
        ({"removed_commitments": ["aa" * 32] * 2}, "removed_commitments, 1"),
        ({"removed_commitments": ["Jane", "John"]}, "removed_commitments must be a list of SHA-256"),
        ({"dataset_root_after": "cc" * 32}, "dataset_root_after must be another root than before"),
        ({"environment": {"a": 1}}, "environment must be an object"),
        ({"note": ""}, "unknown 'note'"),
    ],
    ids=lambda value: str(value)[:40],
)
def test_a_contradictory_attestation_is_refused(changes, sentence, silo_key):
    document = ATTESTATION.to_dict() | changes
    with pytest.raises(AttestationMalformed) as caught:
        verify_attestation(dsse.sign(ERASURE_PAYLOAD_TYPE, canonical_json(document), silo_key), [silo_key.public])
    assert sentence in str(caught.value)


def test_signed_nonsense_is_refused(coordinator_key, silo_key):
    with pytest.raises(JobMalformed, match="the job order is not valid JSON"):
        verify_job(dsse.sign(JOB_PAYLOAD_TYPE, b"{", coordinator_key), coordinator_key.public)
    with pytest.raises(AttestationMalformed, match="the erasure attestation is not valid JSON"):
        verify_attestation(dsse.sign(ERASURE_PAYLOAD_TYPE, b"\xff", silo_key), [silo_key.public])


def test_times_are_written_in_one_form_and_never_without_a_zone():
    berlin = timezone(timedelta(hours=1))
    assert utc_text(datetime(2026, 3, 1, 13, 0, 0, 999_999, berlin)) == "2026-03-01T12:00:00Z"
    assert parse_utc("2026-03-01T12:00:00Z") == datetime(2026, 3, 1, 12, tzinfo=UTC)
    with pytest.raises(ValueError, match="time zone"):
        utc_text(datetime(2026, 3, 1, 12))


def test_a_commitment_names_a_record_only_to_the_holder_of_the_salt():
    # RFC 4231, test case 2.
    expected = "5bdcc146bf60754e6a042426089575c75a003f089d2739839dec58b964ec3843"
    assert record_commitment(b"Jefe", b"what do ya want for nothing?") == expected
    assert record_commitment(b"other salt", b"what do ya want for nothing?") != expected
