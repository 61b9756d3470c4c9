import base64
import stat

import pytest
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import BestAvailableEncryption, Encoding, NoEncryption, PrivateFormat

from seqr.keys import (
    KeyFileExists,
    KeyFileMissing,
    KeyFileUnwritable,
    KeyInvalid,
    SealingKey,
    SealingPublicKey,
    SigningKey,
    UnsealFailed,
    VerifyKey,
)


@pytest.mark.parametrize("kind", [SigningKey, SealingKey])
def test_a_saved_key_loads_again_and_only_its_owner_may_read_it(kind, tmp_path):
    key = kind.generate()
    key.save(tmp_path / "a.key")
    assert stat.S_IMODE((tmp_path / "a.key").stat().st_mode) == 0o600
    assert kind.load(tmp_path / "a.key").public == key.public
    assert [file.name for file in tmp_path.iterdir()] == ["a.key"]


@pytest.mark.parametrize("kind", [SigningKey, SealingKey])
def test_saving_never_replaces_a_key_unless_told_to(kind, tmp_path):
    first, second = kind.generate(), kind.generate()
    first.save(tmp_path / "a.key")
    with pytest.raises(KeyFileExists, match=r"a\.key exists already"):
        second.save(tmp_path / "a.key")
    assert kind.load(tmp_path / "a.key").public == first.public
    second.save(tmp_path / "a.key", overwrite=True)
    assert kind.load(tmp_path / "a.key").public == second.public


@pytest.mark.parametrize("kind", [SigningKey, SealingKey])
def test_a_missing_key_file_is_named(kind, tmp_path):
    with pytest.raises(KeyFileMissing, match=r"absent\.key cannot be read: No such file"):
        kind.load(tmp_path / "absent.key")


@pytest.mark.parametrize("kind", [SigningKey, SealingKey])
def test_a_place_where_no_key_can_be_written_is_named(kind, tmp_path):
    with pytest.raises(KeyFileUnwritable, match=r"a\.key cannot be written: No such file"):
        kind.generate().save(tmp_path / "absent" / "a.key")


@pytest.mark.parametrize("kind", [SigningKey, SealingKey])
def test_a_file_too_large_for_a_key_is_refused(kind, tmp_path):
    (tmp_path / "a.key").write_bytes(bytes(100_000))
    with pytest.raises(KeyInvalid, match=r"a\.key is too large"):
        kind.load(tmp_path / "a.key")


@pytest.mark.parametrize(
    "content", [b"", b"garbage", b"-----BEGIN PRIVATE KEY-----\nAAAA\n-----END PRIVATE KEY-----\n"]
)
@pytest.mark.parametrize("kind", [SigningKey, SealingKey])
def test_a_broken_key_file_is_refused(kind, content, tmp_path):
    (tmp_path / "a.key").write_bytes(content)
    with pytest.raises(KeyInvalid, match=r"a\.key"):
        kind.load(tmp_path / "a.key")


def test_a_key_of_another_kind_is_refused_by_name(tmp_path):
    pem = ec.generate_private_key(ec.SECP384R1()).private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())
    (tmp_path / "ec.key").write_bytes(pem)
    with pytest.raises(KeyInvalid, match="ECPrivateKey, expected an Ed25519"):
        SigningKey.load(tmp_path / "ec.key")
    SigningKey.generate().save(tmp_path / "signing.key")
    with pytest.raises(KeyInvalid, match="holds Ed25519PrivateKey; a sealing key file"):
        SealingKey.load(tmp_path / "signing.key")
    SealingKey.generate().save(tmp_path / "sealing.key")
    with pytest.raises(KeyInvalid):
        SigningKey.load(tmp_path / "sealing.key")


def test_an_encrypted_key_file_is_refused_with_a_sentence(tmp_path):
    key = ec.generate_private_key(ec.SECP256R1())
    pem = key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, BestAvailableEncryption(b"secret"))
    (tmp_path / "a.key").write_bytes(pem)
    with pytest.raises(KeyInvalid, match="not an unencrypted PEM"):
        SigningKey.load(tmp_path / "a.key")


def test_public_keys_travel_as_base64_and_have_fixed_names(silo_key):
    public = VerifyKey.from_b64(silo_key.public.to_b64())
    assert public == silo_key.public and hash(public) == hash(silo_key.public)
    assert public.key_id == "e0d853edc92493bc"
    assert public.fingerprint == "SHA256:4NhT7ckkk7y2Du8vYWOzVNly6fyqjFXMRyfD8lKVGk8"


def test_a_public_key_file_holds_the_base64(tmp_path, silo_key):
    (tmp_path / "silo.pub").write_text(silo_key.public.to_b64() + "\n")
    assert VerifyKey.load(tmp_path / "silo.pub") == silo_key.public


@pytest.mark.parametrize("text", ["", "AAAA", "not base64", "é", base64.b64encode(bytes(31)).decode()])
@pytest.mark.parametrize("kind", [VerifyKey, SealingPublicKey])
def test_text_that_is_no_public_key_is_refused(kind, text):
    with pytest.raises(KeyInvalid):
        kind.from_b64(text)


@pytest.mark.parametrize("y", ["00" * 32, "01" + "00" * 31, "01" + "00" * 30 + "80", "ec" + "ff" * 30 + "7f"])
def test_a_key_under_which_anyone_can_sign_is_refused(y):
    with pytest.raises(KeyInvalid, match="small order"):
        VerifyKey.from_b64(base64.b64encode(bytes.fromhex(y)).decode())


def test_a_public_key_of_the_wrong_length_is_named_with_both_lengths():
    with pytest.raises(KeyInvalid, match="expected an Ed25519 public key of 32 bytes, got 31"):
        VerifyKey.from_b64(base64.b64encode(bytes(31)).decode())
    with pytest.raises(KeyInvalid, match="expected a sealing key of 1216 bytes, got 32"):
        SealingPublicKey.from_b64(base64.b64encode(bytes(32)).decode())


def test_bytes_that_are_no_kem_key_are_refused():
    with pytest.raises(KeyInvalid, match="not an ML-KEM-768 and X25519 public key"):
        SealingPublicKey.from_b64(base64.b64encode(b"\xff" * 1216).decode())


def test_sealing_keys_travel_as_base64(gateway_sealing_key):
    public = SealingPublicKey.from_b64(gateway_sealing_key.public.to_b64())
    assert public == gateway_sealing_key.public and public.key_id == gateway_sealing_key.public.key_id


def test_only_the_holder_of_the_key_opens_what_was_sealed(gateway_sealing_key, other_sealing_key):
    sealed = gateway_sealing_key.public.seal(b"secret", b"purpose")
    assert gateway_sealing_key.unseal(sealed, b"purpose") == b"secret"
    with pytest.raises(UnsealFailed):
        other_sealing_key.unseal(sealed, b"purpose")


def test_sealed_bytes_do_not_open_for_another_purpose_or_when_changed(gateway_sealing_key):
    sealed = gateway_sealing_key.public.seal(b"secret", b"purpose")
    changed = [bytes([sealed[0] ^ 1]) + sealed[1:], sealed[:-1], sealed + b"\0", b""]
    with pytest.raises(UnsealFailed):
        gateway_sealing_key.unseal(sealed, b"another purpose")
    for data in changed:
        with pytest.raises(UnsealFailed):
            gateway_sealing_key.unseal(data, b"purpose")


def test_a_degenerate_sealing_key_is_refused(gateway_sealing_key):
    raw = base64.b64decode(gateway_sealing_key.public.to_b64())
    weak = SealingPublicKey.from_b64(base64.b64encode(raw[:-32] + bytes(32)).decode())
    with pytest.raises(KeyInvalid, match="not a usable public key"):
        weak.seal(b"secret", b"purpose")


def test_printing_a_private_key_shows_its_id_only(silo_key, gateway_sealing_key):
    assert repr(silo_key) == f"SigningKey({silo_key.public.key_id})"
    assert repr(gateway_sealing_key) == f"SealingKey({gateway_sealing_key.public.key_id})"
