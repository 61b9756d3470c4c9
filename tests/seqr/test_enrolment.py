"""An enrolment says which keys a silo has, and only the holder of the signing key can say it."""

import re

import pytest

from seqr import dsse
from seqr.canonical import canonical_json
from seqr.enrolment import (
    ENROLMENT_PAYLOAD_TYPE,
    SILO_ID,
    EnrolmentClaim,
    EnrolmentMalformed,
    sign_enrolment,
    verify_enrolment,
)
from seqr.keys import SigningKey

KEY = SigningKey.generate()
CLAIM = EnrolmentClaim("clinic", "", KEY.public.to_b64(), "ecdsa-sha2-nistp384 AAAA")


def test_a_signed_claim_is_read_back_as_it_was() -> None:
    sent = sign_enrolment(CLAIM, KEY).to_json()
    assert verify_enrolment(dsse.Envelope.from_json(sent), KEY.public) == CLAIM


def test_the_document_on_the_wire_has_the_four_fields_and_no_others() -> None:
    envelope = sign_enrolment(CLAIM, KEY)
    assert envelope.payload == canonical_json(
        {"silo_id": "clinic", "display_name": "", "signing_key": CLAIM.signing_key, "node_key": CLAIM.node_key}
    )
    assert envelope.payload_type == "application/vnd.seqr.enrolment+json"


def test_a_claim_that_another_key_signed_is_refused() -> None:
    with pytest.raises(dsse.SignatureInvalid):
        verify_enrolment(sign_enrolment(CLAIM, SigningKey.generate()), KEY.public)


def test_another_document_signed_by_the_same_key_is_no_enrolment() -> None:
    other = dsse.sign("application/vnd.seqr.purge+json", sign_enrolment(CLAIM, KEY).payload, KEY)
    with pytest.raises(dsse.PayloadTypeMismatch):
        verify_enrolment(other, KEY.public)


@pytest.mark.parametrize(
    ("payload", "problem"),
    [
        (b"{", "the enrolment"),
        (b"[]", "must be a JSON object, got list"),
        (b'{"silo_id":"clinic"}', "missing 'display_name', 'node_key', 'signing_key'"),
        (
            b'{"display_name":"","extra":"","node_key":"","signing_key":"","silo_id":"clinic"}',
            "unknown 'extra'",
        ),
        (b'{"display_name":"","node_key":"","signing_key":"","silo_id":7}', "silo_id must be text, got 7"),
    ],
)
def test_a_signed_document_of_another_form_is_refused(payload: bytes, problem: str) -> None:
    with pytest.raises(EnrolmentMalformed, match=problem):
        verify_enrolment(dsse.sign(ENROLMENT_PAYLOAD_TYPE, payload, KEY), KEY.public)


@pytest.mark.parametrize(
    ("silo_id", "is_one"),
    [
        ("a", True),
        ("klinik-7.b_C", True),
        ("x" * 64, True),
        ("x" * 65, False),
        ("", False),
        (".a", False),
        ("a/b", False),
        ("é", False),
        ("a\n", False),
    ],
)
def test_what_is_a_silo_id(silo_id: str, is_one: bool) -> None:
    assert (re.fullmatch(SILO_ID, silo_id) is not None) is is_one
