import subprocess
import sys
from dataclasses import replace

import pytest

from seqr.bundle import (
    BundleNotForThisGateway,
    BundleTooLarge,
    BundleUnreadable,
    Manifest,
    ManifestMalformed,
    largest_bundle,
    largest_tensors,
    open_sealed,
    seal,
    sign_manifest,
)
from seqr.canonical import canonical_json, parse_json
from seqr.plan import GatewayKey
from seqr.refusals import BundleRefused


@pytest.fixture(scope="module")
def adapter(small_plan, make_adapter):
    return make_adapter(small_plan)


@pytest.fixture(scope="module")
def manifest(small_plan, adapter):
    return Manifest(
        plan_id=small_plan.plan_id,
        silo_id="clinic",
        revision=1,
        job_nonce="00112233445566778899aabbccddeeff",
        tensors=adapter.tensor_digests(),
        adapter_digest=adapter.digest,
        records=None,
        tokens=None,
        environment={"torch": "2.13.0"},
        dataset_root="cc" * 32,
        expires_at="2026-03-02T12:00:00Z",
    )


@pytest.fixture(scope="module")
def envelope(manifest, silo_key):
    return sign_manifest(manifest, silo_key)


@pytest.fixture(scope="module")
def blob(adapter, envelope, gateway_key):
    return seal(adapter, envelope, [gateway_key])


def test_a_sealed_bundle_opens_for_its_gateway(blob, adapter, envelope, gateway_sealing_key):
    opened = open_sealed(blob, gateway_sealing_key)
    assert opened.manifest_envelope == envelope
    assert opened.tensors_bytes == adapter.to_bytes()


def test_every_gateway_of_the_plan_can_open_it(
    adapter, envelope, gateway_key, gateway_sealing_key, other_sealing_key, stranger_key
):
    other = GatewayKey.of(other_sealing_key.public, stranger_key.public)
    blob = seal(adapter, envelope, [gateway_key, other])
    assert open_sealed(blob, gateway_sealing_key) == open_sealed(blob, other_sealing_key)


def test_a_gateway_outside_the_plan_cannot_open_it(blob, other_sealing_key, gateway_key):
    with pytest.raises(BundleNotForThisGateway) as caught:
        open_sealed(blob, other_sealing_key)
    assert gateway_key.key_id in str(caught.value) and other_sealing_key.public.key_id in str(caught.value)


def test_a_gateway_named_in_the_header_by_someone_else_cannot_open_it(blob, gateway_key, other_sealing_key):
    renamed = blob.replace(gateway_key.key_id.encode(), other_sealing_key.public.key_id.encode())
    with pytest.raises(BundleUnreadable):
        open_sealed(renamed, other_sealing_key)


def test_a_flipped_byte_anywhere_is_refused(blob, gateway_sealing_key):
    for position in range(len(blob)):
        changed = bytearray(blob)
        changed[position] ^= 1
        with pytest.raises(BundleRefused):
            open_sealed(bytes(changed), gateway_sealing_key)


def test_a_truncated_or_extended_bundle_is_refused(blob, gateway_sealing_key):
    for data in [blob[:length] for length in (0, 7, 8, 11, 12, 100, len(blob) // 2, len(blob) - 1)] + [blob + b"\0"]:
        with pytest.raises(BundleUnreadable):
            open_sealed(data, gateway_sealing_key)


def test_a_header_moved_to_another_bundle_is_refused(blob, adapter, envelope, gateway_key, gateway_sealing_key):
    other = seal(adapter, envelope, [gateway_key])
    cut = int.from_bytes(blob[8:12], "big") + 12
    with pytest.raises(BundleUnreadable, match="not those that were sealed"):
        open_sealed(other[:cut] + blob[cut:], gateway_sealing_key)


def test_an_oversized_bundle_is_refused_before_it_is_opened(blob, gateway_sealing_key):
    with pytest.raises(
        BundleTooLarge, match=f"the bundle has {len(blob)} bytes, more than the {len(blob) - 1} allowed"
    ):
        open_sealed(blob, gateway_sealing_key, max_bytes=len(blob) - 1)


def test_a_header_that_claims_gigabytes_is_refused(blob, gateway_sealing_key):
    with pytest.raises(BundleUnreadable, match="claims a header of 4294967295 bytes"):
        open_sealed(blob[:8] + b"\xff" * 4 + blob[12:], gateway_sealing_key)


@pytest.mark.parametrize("inside", [b"", b"junk", b'{"payload":1}'])
def test_a_bundle_sealed_around_nonsense_is_refused(inside, adapter, gateway_key, gateway_sealing_key):
    class Nonsense:
        def to_json(self) -> bytes:
            return inside

    expected = "the manifest in the bundle is unreadable" if inside else "claims a manifest of 0 bytes"
    with pytest.raises(BundleUnreadable, match=expected):
        open_sealed(seal(adapter, Nonsense(), [gateway_key]), gateway_sealing_key)


def test_a_header_whose_sealed_key_is_no_base64_is_refused(blob, gateway_key, gateway_sealing_key):
    entry = {"key_id": gateway_key.key_id, "sealed_key": "not base64"}
    header = canonical_json({"format": "seqr/bundle/v1", "recipients": [entry]})
    with pytest.raises(BundleUnreadable, match="sealed_key must be standard base64"):
        open_sealed(blob[:8] + len(header).to_bytes(4, "big") + header + bytes(64), gateway_sealing_key)


def test_another_file_is_no_bundle(gateway_sealing_key, adapter):
    for data in (b"", b"PK\x03\x04", adapter.to_bytes()):
        with pytest.raises(BundleUnreadable, match="does not begin with"):
            open_sealed(data, gateway_sealing_key)


def test_no_byte_of_the_adapter_or_the_manifest_is_readable_in_transit(blob, adapter, envelope):
    q = adapter.modules["layers.0.q"].q.numpy().tobytes()
    for plain in (q[:16], q[-16:], envelope.to_json()[:32], b"clinic", b"layers.0"):
        assert plain not in blob


def test_sealing_twice_shows_no_common_bytes(blob, adapter, envelope, gateway_key):
    again = seal(adapter, envelope, [gateway_key])
    assert len(again) == len(blob) and again[-200:] != blob[-200:]


def test_a_bundle_needs_a_recipient(adapter, envelope):
    with pytest.raises(ValueError, match="at least one gateway key"):
        seal(adapter, envelope, [])


def test_the_size_limits_of_a_plan_hold_its_own_adapters(tiny_plan, make_adapter, manifest, silo_key, gateway_key):
    adapter = make_adapter(tiny_plan)
    full = replace(manifest, tensors=adapter.tensor_digests(), adapter_digest=adapter.digest)
    assert len(adapter.to_bytes()) <= largest_tensors(tiny_plan)
    assert len(seal(adapter, sign_manifest(full, silo_key), [gateway_key] * 32)) <= largest_bundle(tiny_plan)


def test_the_manifest_says_what_was_signed(manifest, envelope):
    assert Manifest.from_dict(parse_json(envelope.payload, "manifest", 1 << 20)) == manifest
    counted = replace(manifest, records=20, tokens=4000, dp={"epsilon": 8.0, "delta": 1e-5})
    assert Manifest.from_dict(counted.to_dict()) == counted


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"revision": 0}, "revision must be a whole number from 1"),
        ({"revision": 1.0}, "revision must be a whole number"),
        ({"silo_id": "..\\x"}, "silo_id must be an id"),
        ({"tensors": {"a": "b"}}, "tensors must be an object"),
        ({"tensors": []}, "tensors must be an object"),
        ({"adapter_digest": "AB" * 32}, "adapter_digest must be a SHA-256"),
        ({"records": -1}, "records must be a whole number"),
        ({"environment": {"path": "a\nb"}}, "environment must be an object"),
        ({"expires_at": "tomorrow"}, "expires_at must be a UTC time"),
        ({"dp": {"epsilon": 10**400}}, "dp must be an object of finite numbers"),
        ({"dp": {"epsilon": True}}, "dp must be an object"),
        ({"first_record": "..."}, "unknown 'first_record'"),
    ],
    ids=lambda value: str(value)[:40],
)
def test_a_malformed_manifest_is_refused_with_got_and_expected(manifest, changes, sentence):
    with pytest.raises(ManifestMalformed) as caught:
        Manifest.from_dict(manifest.to_dict() | changes)
    assert sentence in str(caught.value)


def test_the_core_modules_do_not_load_torch():
    modules = "bundle, canonical, document, dsse, job, keys, merkle, plan, purge, receipt, receipt_cli, refusals"
    code = f"import sys\nfrom seqr import {modules}\nsys.exit('torch' in sys.modules or 'safetensors' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
