"""A certificate authority of a test's own, and one certificate signed by it, as PEM files."""

import datetime
import ipaddress
from pathlib import Path

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID


def make_pki(path: Path, *, names: tuple[str, ...] = ("127.0.0.1",)) -> Path:
    """A certificate authority `ca` and a certificate `node` signed by it, for addresses and host names."""
    now = datetime.datetime.now(datetime.UTC)
    ca_key, node_key = ec.generate_private_key(ec.SECP256R1()), ec.generate_private_key(ec.SECP256R1())

    def signed(subject: str, key: ec.EllipticCurvePrivateKey, extension: x509.ExtensionType) -> x509.Certificate:
        return (
            x509.CertificateBuilder()
            .subject_name(_name(subject))
            .issuer_name(_name("a test authority"))
            .public_key(key.public_key())
            .serial_number(x509.random_serial_number())
            .not_valid_before(now - datetime.timedelta(minutes=5))
            .not_valid_after(now + datetime.timedelta(hours=1))
            .add_extension(extension, critical=False)
            .sign(ca_key, hashes.SHA256())
        )

    alternatives = x509.SubjectAlternativeName([_general_name(name) for name in names])
    path.mkdir(parents=True)
    _write_pair(path, "ca", ca_key, signed("a test authority", ca_key, x509.BasicConstraints(True, None)))
    _write_pair(path, "node", node_key, signed("node", node_key, alternatives))
    return path


def _name(text: str) -> x509.Name:
    return x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, text)])


def _general_name(text: str) -> x509.GeneralName:
    try:
        return x509.IPAddress(ipaddress.ip_address(text))
    except ValueError:
        return x509.DNSName(text)


def _write_pair(path: Path, stem: str, key: ec.EllipticCurvePrivateKey, certificate: x509.Certificate) -> None:
    (path / f"{stem}.key").write_bytes(
        key.private_bytes(serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption())
    )
    (path / f"{stem}.crt").write_bytes(certificate.public_bytes(serialization.Encoding.PEM))
