"""Downloads by TLS: the certificate must be the named host's, and of somebody trusted."""

from __future__ import annotations

import shutil
import ssl
import subprocess
from pathlib import Path

import pytest
from loopback_web import PUBLIC, Web, ok, refused, to

BODY = bytes(range(256)) * 100


@pytest.fixture(scope="module")
def certificate(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Of a.example, signed by itself, with its key."""
    openssl = shutil.which("openssl")
    if openssl is None:
        pytest.skip("openssl is not installed")
    file = tmp_path_factory.mktemp("tls") / "a.pem"
    command = "req -x509 -newkey ec -pkeyopt ec_paramgen_curve:prime256v1 -nodes -days 2"
    arguments = [
        *command.split(),
        "-subj",
        "/CN=a.example",
        "-addext",
        "subjectAltName=DNS:a.example",
    ]
    subprocess.run(
        [openssl, *arguments, "-keyout", file, "-out", file.with_suffix(".cert")],
        check=True,
        capture_output=True,
    )
    with file.open("ab") as both:
        both.write(file.with_suffix(".cert").read_bytes())
    return file


def secure(certificate: Path, page: bytes, trusting: bool = True) -> Web:
    server = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    server.load_cert_chain(certificate)
    client = ssl.create_default_context(cafile=certificate) if trusting else None
    return Web({"a.example/x": page, "b.a.example/x": page}, server=server, client=client)


def test_tls(certificate: Path) -> None:
    web = secure(certificate, ok(BODY))
    assert web.read("https://a.example/x") == BODY
    assert web.connected == [(PUBLIC, 443, "a.example")]


def test_a_certificate_of_another_host(certificate: Path) -> None:
    web = secure(certificate, ok(BODY))
    refused(web, "https://b.a.example/x", "the certificate of https://b.a.example is not valid")
    assert web.requests == []


def test_a_certificate_that_nobody_signed(certificate: Path) -> None:
    web = secure(certificate, ok(BODY), trusting=False)
    refused(web, "https://a.example/x", "is not valid")
    assert web.requests == []


def test_from_https_to_http(certificate: Path) -> None:
    refused(
        secure(certificate, to("http://a.example/x")), "https://a.example/x", "from https to http"
    )
