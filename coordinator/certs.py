"""A certificate authority of one's own, for the demo and for small networks: a CA and a server certificate it signs."""

import os
from datetime import timedelta
from ipaddress import ip_address
from pathlib import Path

from cryptography import x509
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.serialization import (
    Encoding,
    NoEncryption,
    PrivateFormat,
    load_pem_private_key,
)
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from coordinator.db import now
from coordinator.errors import CertificateExists
from seqr.files import write_private

CA_LIFETIME = timedelta(days=3650)
# What browsers and Apple's libraries accept at most.
SERVER_LIFETIME = timedelta(days=397)
LOOPBACK_NAMES = ("localhost", "127.0.0.1")


def make_certificates(folder: Path, names: tuple[str, ...] = LOOPBACK_NAMES, server: str = "server") -> None:
    """Write ``ca.crt``, ``ca.key``, ``<server>.crt`` and ``<server>.key``; ``names`` are DNS names or addresses.

    An existing CA is used again, so that whoever trusts it need not be told. Raises CertificateExists.
    """
    folder.mkdir(parents=True, exist_ok=True, mode=0o700)
    certificate, key_file = folder / f"{server}.crt", folder / f"{server}.key"
    if certificate.exists() or key_file.exists():
        raise CertificateExists(f"{certificate} exists already; move it away to make a new one")
    ca, ca_key = _load_ca(folder) if (folder / "ca.key").exists() else _make_ca(folder)
    key = ec.generate_private_key(ec.SECP256R1())
    signed = (
        _builder(_name(names[0]), ca.subject, key.public_key(), SERVER_LIFETIME)
        .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
        .add_extension(_usage(signs=False), critical=True)
        .add_extension(x509.ExtendedKeyUsage([ExtendedKeyUsageOID.SERVER_AUTH]), critical=False)
        .add_extension(x509.SubjectAlternativeName([_general_name(name) for name in names]), critical=False)
        .add_extension(x509.AuthorityKeyIdentifier.from_issuer_public_key(ca_key.public_key()), critical=False)
        .sign(ca_key, SHA256())
    )
    write_private(key_file, _pem(key), replace=False)
    _write_public(certificate, signed.public_bytes(Encoding.PEM))


def _make_ca(folder: Path) -> tuple[x509.Certificate, ec.EllipticCurvePrivateKey]:
    key = ec.generate_private_key(ec.SECP256R1())
    name = _name("seqr CA")
    ca = (
        _builder(name, name, key.public_key(), CA_LIFETIME)
        .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
        .add_extension(_usage(signs=True), critical=True)
        .sign(key, SHA256())
    )
    write_private(folder / "ca.key", _pem(key), replace=False)
    _write_public(folder / "ca.crt", ca.public_bytes(Encoding.PEM))
    return ca, key


def _load_ca(folder: Path) -> tuple[x509.Certificate, ec.EllipticCurvePrivateKey]:
    key = load_pem_private_key((folder / "ca.key").read_bytes(), password=None)
    if not isinstance(key, ec.EllipticCurvePrivateKey):
        raise CertificateExists(f"{folder / 'ca.key'} is not a CA key of this command; move it away")
    return x509.load_pem_x509_certificate((folder / "ca.crt").read_bytes()), key


def _builder(
    subject: x509.Name, issuer: x509.Name, key: ec.EllipticCurvePublicKey, lifetime: timedelta
) -> x509.CertificateBuilder:
    return (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(issuer)
        .public_key(key)
        .serial_number(x509.random_serial_number())
        # A little into the past, for machines whose clocks differ.
        .not_valid_before(now() - timedelta(hours=1))
        .not_valid_after(now() + lifetime)
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(key), critical=False)
    )


def _usage(*, signs: bool) -> x509.KeyUsage:
    return x509.KeyUsage(
        digital_signature=True,
        key_cert_sign=signs,
        crl_sign=signs,
        content_commitment=False,
        key_encipherment=False,
        data_encipherment=False,
        key_agreement=False,
        encipher_only=False,
        decipher_only=False,
    )


def _name(common_name: str) -> x509.Name:
    return x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, common_name[:64])])


def _general_name(name: str) -> x509.GeneralName:
    try:
        return x509.IPAddress(ip_address(name))
    except ValueError:
        return x509.DNSName(name)


def _pem(key: ec.EllipticCurvePrivateKey) -> bytes:
    return key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())


def _write_public(path: Path, data: bytes) -> None:
    with os.fdopen(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o644), "wb") as file:
        file.write(data)
