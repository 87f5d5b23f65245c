"""Weights at https:// and http:// addresses: the network of the same file on this machine, or one line."""

import datetime
import functools
import ssl
import threading
from dataclasses import replace
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID

from permafrost.core.errors import UserError
from permafrost.models.network import Network
from permafrost.models.trained_weights import WeightsFile
from permafrost.storage import buckets


class Quiet(SimpleHTTPRequestHandler):
    """Handler without a log."""

    def log_message(self, *words):
        pass


def signed(name, key, issuer, issuer_key, *, is_authority):
    """Certificate of a name, in PEM."""
    now = datetime.datetime.now(datetime.UTC)
    subject, signer = (
        x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, text)]) for text in (name, issuer)
    )
    certificate = (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(signer)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - datetime.timedelta(days=1))
        .not_valid_after(now + datetime.timedelta(days=1))
        .add_extension(x509.SubjectAlternativeName([x509.DNSName(name)]), critical=False)
        .add_extension(x509.BasicConstraints(ca=is_authority, path_length=None), critical=True)
        .sign(issuer_key, hashes.SHA256())
    )
    return certificate.public_bytes(serialization.Encoding.PEM)


@pytest.fixture(scope="module")
def served(tmp_path_factory, tiny_teacher):
    """Addresses of a folder with the weights of the tiny teacher, by scheme, and the file of the authority."""
    folder = tmp_path_factory.mktemp("certificates")
    authority, own = (
        ec.generate_private_key(ec.SECP256R1()),
        ec.generate_private_key(ec.SECP256R1()),
    )
    (folder / "authority.pem").write_bytes(
        signed("tests", authority, "tests", authority, is_authority=True)
    )
    (folder / "own.pem").write_bytes(
        signed("localhost", own, "tests", authority, is_authority=False)
        + own.private_bytes(
            serialization.Encoding.PEM,
            serialization.PrivateFormat.PKCS8,
            serialization.NoEncryption(),
        )
    )
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(folder / "own.pem")
    weights = Path(tiny_teacher.weights)
    handler = functools.partial(Quiet, directory=str(weights.parent))
    servers = {
        scheme: ThreadingHTTPServer(("localhost", 0), handler) for scheme in ("http", "https")
    }
    servers["https"].socket = context.wrap_socket(servers["https"].socket, server_side=True)
    for server in servers.values():
        threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
    yield (
        {
            scheme: f"{scheme}://localhost:{server.server_address[1]}/{weights.name}"
            for scheme, server in servers.items()
        },
        folder / "authority.pem",
    )
    for server in servers.values():
        server.shutdown()
        server.server_close()


@pytest.fixture(autouse=True)
def own_cache(monkeypatch, tmp_path):
    monkeypatch.setenv("PERMAFROST_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(buckets, "_clients", {})


@pytest.mark.parametrize("scheme", ["http", "https"])
def test_weights_at_an_address_are_those_of_the_file(served, tiny_teacher, monkeypatch, scheme):
    addresses, authority = served
    monkeypatch.setenv("SSL_CERT_FILE", str(authority))
    remote = replace(tiny_teacher, weights=addresses[scheme])

    assert Network(remote, 10).describe() == Network(tiny_teacher, 10).describe()
    assert WeightsFile(remote.weights).path.read_bytes() == Path(tiny_teacher.weights).read_bytes()
    with pytest.raises(UserError, match=r"weights-none does not exist; correct the address$"):
        WeightsFile(addresses[scheme].rpartition("/")[0] + "/weights-none")


def test_a_certificate_of_an_unknown_authority_is_one_line(served, monkeypatch):
    monkeypatch.setitem(buckets._RETRIES, "max_retries", 0)

    with pytest.raises(
        UserError, match="certificate is not accepted, UnknownIssuer; SSL_CERT_FILE"
    ):
        WeightsFile(f"{served[0]['https']}-of-another-name")


@pytest.mark.parametrize(
    ("address", "reason"),
    [
        ("https://host.invalid/weights.pth", "no such host"),
        ("http://localhost:1/w", "connection refused"),
    ],
)
def test_a_server_that_cannot_be_reached_is_one_line(monkeypatch, address, reason):
    monkeypatch.setitem(buckets._RETRIES, "max_retries", 0)
    monkeypatch.setattr(buckets, "_TRIES", 1)
    monkeypatch.setenv("PERMAFROST_SERVER_WAIT", "0")

    with pytest.raises(UserError, match=rf"^{address} cannot be read \({reason}"):
        WeightsFile(address)
