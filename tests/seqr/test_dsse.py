import base64
import json
from dataclasses import replace

import pytest

from seqr.canonical import canonical_json
from seqr.dsse import (
    Envelope,
    EnvelopeMalformed,
    PayloadTypeMismatch,
    SignatureInvalid,
    pre_authentication_encoding,
    sign,
    signers,
    verify,
)

KIND = "application/vnd.seqr.test+json"


@pytest.fixture
def envelope(silo_key):
    return sign(KIND, b'{"a":1}', silo_key)


def test_pre_authentication_encoding_is_that_of_the_specification():
    expected = b"DSSEv1 29 http://example.com/HelloWorld 11 hello world"
    assert pre_authentication_encoding("http://example.com/HelloWorld", b"hello world") == expected


def test_a_signed_envelope_survives_transport_and_verifies(envelope, silo_key):
    received = Envelope.from_json(envelope.to_json())
    assert received == envelope
    assert verify(received, [silo_key.public], KIND) == b'{"a":1}'


def test_signatures_are_deterministic(envelope, silo_key):
    assert sign(KIND, b'{"a":1}', silo_key).to_json() == envelope.to_json()


def test_a_changed_payload_is_refused(envelope, silo_key):
    with pytest.raises(SignatureInvalid):
        verify(replace(envelope, payload=b'{"a":2}'), [silo_key.public], KIND)


def test_another_signer_is_refused_by_name(envelope, silo_key, stranger_key):
    expected, got = stranger_key.public.key_id, silo_key.public.key_id
    with pytest.raises(SignatureInvalid, match=f"expected a signature by key {expected}.*carries one by '{got}'"):
        verify(envelope, [stranger_key.public], KIND)


def test_no_trusted_key_means_no_valid_signature(envelope):
    with pytest.raises(SignatureInvalid, match="no key is trusted"):
        verify(envelope, [], KIND)


def test_an_envelope_without_signatures_is_refused(envelope, silo_key):
    with pytest.raises(SignatureInvalid):
        verify(replace(envelope, signatures=()), [silo_key.public], KIND)


def test_a_document_of_another_kind_is_refused(envelope, silo_key):
    with pytest.raises(PayloadTypeMismatch, match=r"expected a signed application/other, got .*seqr\.test"):
        verify(envelope, [silo_key.public], "application/other")


def test_relabelling_a_document_breaks_its_signature(envelope, silo_key):
    with pytest.raises(SignatureInvalid):
        verify(replace(envelope, payload_type="application/other"), [silo_key.public], "application/other")


def test_a_lying_key_id_neither_helps_nor_hurts(envelope, silo_key, stranger_key):
    forged = sign(KIND, b"{}", stranger_key)
    lying = replace(forged, signatures=(replace(forged.signatures[0], key_id=silo_key.public.key_id),))
    with pytest.raises(SignatureInvalid):
        verify(lying, [silo_key.public], KIND)
    renamed = replace(envelope, signatures=(replace(envelope.signatures[0], key_id="whoever"),))
    assert verify(renamed, [silo_key.public], KIND)


def test_several_signatures_verify_under_any_of_their_keys(envelope, silo_key, coordinator_key, stranger_key):
    both = envelope.add_signature(coordinator_key).add_signature(coordinator_key)
    assert len(both.signatures) == 2
    assert verify(both, [coordinator_key.public], KIND) == verify(both, [silo_key.public], KIND)
    assert signers(both, [stranger_key.public, silo_key.public, coordinator_key.public]) == (
        silo_key.public,
        coordinator_key.public,
    )


def _changed(envelope, **changes):
    return canonical_json(envelope.to_dict() | changes)


@pytest.mark.parametrize(
    "changes",
    [
        {"extra": 1},
        {"payload": "not base64!"},
        {"payload": "QQ"},
        {"payload": 5},
        {"payloadType": None},
        {"payloadType": "x" * 300},
        {"payloadType": "a\nb"},
        {"signatures": []},
        {"signatures": {}},
        {"signatures": [{"keyid": "a", "sig": "QQ==", "x": 1}]},
        {"signatures": [{"keyid": "a", "sig": "????"}]},
        {"signatures": [{"keyid": "a", "sig": "QQ=="}] * 17},
    ],
    ids=lambda changes: str(changes)[:40],
)
def test_a_malformed_envelope_is_refused(envelope, changes):
    with pytest.raises(EnvelopeMalformed):
        Envelope.from_json(_changed(envelope, **changes))


@pytest.mark.parametrize("data", [b"", b"[]", b"{}", b"\xff", "\ud800", b'{"payload":"","payload":""}'], ids=repr)
def test_bytes_that_are_no_envelope_are_refused(data):
    with pytest.raises(EnvelopeMalformed):
        Envelope.from_json(data)


def test_an_oversized_envelope_is_refused_before_decoding(envelope):
    with pytest.raises(EnvelopeMalformed, match="more than the 20 allowed"):
        Envelope.from_json(envelope.to_json(), max_bytes=20)


def test_the_json_form_is_the_standard_one(envelope, silo_key):
    document = json.loads(envelope.to_json())
    assert document["payloadType"] == KIND
    assert base64.b64decode(document["payload"]) == b'{"a":1}'
    assert document["signatures"][0]["keyid"] == silo_key.public.key_id
