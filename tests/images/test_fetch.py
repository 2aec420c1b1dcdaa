"""Image files from files, directories and the web: reading, refusals and time limits."""

import ipaddress
import socket

import pytest
from web_server import BODY, Server

from flaxcap.images import fetch
from flaxcap.images.fetch import FetchError


@pytest.fixture(scope="module")
def server():
    with Server() as server:
        yield server


@pytest.fixture(autouse=True)
def no_proxy(monkeypatch):
    monkeypatch.setenv("no_proxy", "*")


def read(url: str) -> bytes:
    return fetch.read(url, private=True)


# Files


def test_a_file_that_is_too_large_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(fetch, "MAX_BYTES", 100)
    (tmp_path / "a.png").write_bytes(bytes(101))
    (tmp_path / "b.png").write_bytes(bytes(100))
    with pytest.raises(FetchError, match=r"a\.png: cannot be read: more than the 100 bytes allowed"):
        read(str(tmp_path / "a.png"))
    assert read(str(tmp_path / "b.png")) == bytes(100)
    with pytest.raises(FetchError, match=r"gone\.png: cannot be read: No such file"):
        read(str(tmp_path / "gone.png"))


# Addresses


@pytest.mark.parametrize(
    ("url", "message"),
    [
        ("file:///etc/hostname", "found file://, expected http:// or https://"),
        ("ftp://127.0.0.1/a.png", "found ftp://, expected http:// or https://"),
        ("data://image", "found data://, expected http:// or https://"),
        ("{server}/redirect?file:///etc/hostname", "cannot be fetched|the server answers 302 .*file:///etc/hostname"),
        ("{server}/redirect?ftp://127.0.0.1/a.png", "redirected to ftp://127.0.0.1/a.png: found ftp://, expected http"),
        ("{server}/redirect?/redirect?/redirect?/nothere", "the server answers 404 Not Found"),
        ("{server}/round?", "the server answers 302 .*infinite loop"),
        ("{server}/nothere.jpg", "the server answers 404 Not Found"),
        ("{server}/rubbish", "cannot be fetched"),
        ("http://127.0.0.1:1/a.png", "cannot be fetched: .*refused"),
        ("http://[::1/a.png", "cannot be fetched: .*IPv6"),
        ("http://127.0.0.1:port/a.png", "cannot be fetched: nonnumeric port"),
        ("http:///a.png", "cannot be fetched: no host given"),
        ("http://" + "x" * 70 + ".example/a.png", "cannot be fetched: "),
    ],
)
def test_the_error_of_an_address_gives_the_reason(url, message, server):
    url = url.format(server=server.url)
    with pytest.raises(FetchError, match=message) as error:
        read(url)
    assert url.rpartition("?")[2] in str(error.value)


def test_a_redirection_to_a_web_address_is_followed(server):
    assert read(f"{server.url}/redirect?{server.url}/a.png") == BODY


@pytest.mark.parametrize("path", ["escape", "rubbish"])
def test_control_characters_of_a_server_are_escaped(path, server):
    with pytest.raises(FetchError, match=r"\\x1b") as error:
        read(f"{server.url}/{path}")
    assert str(error.value).isprintable()


def test_a_body_that_is_too_large_is_not_read_to_its_end(server, monkeypatch):
    monkeypatch.setattr(fetch, "MAX_BYTES", 1 << 20)
    with pytest.raises(FetchError, match=r"/endless: more than the 1048576 bytes allowed"):
        read(f"{server.url}/endless")
    assert server.sent < 1 << 25  # the limit, and the buffers of the sockets


@pytest.mark.parametrize(
    ("path", "limit", "message"),
    [
        ("silent", "TIMEOUT_S", "timed out"),
        ("drip", "TOTAL_S", "not complete after the 0.3 s allowed"),
        ("drip-header", "TOTAL_S", "not complete after the 0.3 s allowed"),
        ("continue", "TOTAL_S", "not complete after the 0.3 s allowed"),
    ],
)
def test_a_slow_server_is_abandoned(path, limit, message, server, monkeypatch):
    monkeypatch.setattr(fetch, limit, 0.3)
    with pytest.raises(FetchError, match=message):
        read(f"{server.url}/{path}")


# Private addresses


@pytest.mark.parametrize(
    "address",
    [
        *("127.0.0.1", "127.9.9.9", "0.0.0.0", "10.1.2.3", "172.16.0.1", "192.168.1.1", "169.254.169.254"),
        *("100.64.0.1", "224.0.0.1", "240.0.0.1", "255.255.255.255", "192.0.2.1"),
        *("::1", "::", "fe80::1", "fe80::1%eth0", "fc00::1", "fd12::1", "fec0::1", "ff02::1", "2001:db8::1"),
        # IPv4 within IPv6
        *("::ffff:127.0.0.1", "::ffff:10.0.0.1", "::127.0.0.1", "64:ff9b::7f00:1", "64:ff9b::a00:1", "2002:7f00:1::"),
    ],
)
def test_private_and_reserved_addresses(address):
    assert not fetch.is_public(address)


@pytest.mark.parametrize(
    "address",
    ["8.8.8.8", "93.184.215.14", "172.15.0.1", "2606:2800:21f:cb07::1", "::ffff:8.8.8.8", "64:ff9b::808:808"],
)
def test_public_addresses(address):
    assert fetch.is_public(address)
    ipaddress.ip_address(address)


@pytest.mark.parametrize(
    "host", ["127.0.0.1", "localhost", "127.1", "2130706433", "0x7f.1", "0", "[::1]", "[::ffff:127.0.0.1]", "10.0.0.1"]
)
@pytest.mark.parametrize("scheme", ["http", "https"])
def test_every_notation_of_a_private_address_is_refused(host, scheme, server):
    before = len(server.asked)
    url = f"{scheme}://{host}:{server.server_port}/a.png"
    with pytest.raises(FetchError, match=r"is not a public address; --allow_private|cannot be") as error:
        fetch.read(url)
    assert str(error.value).startswith(f"{url}: ")
    assert len(server.asked) == before


def resolve_to(monkeypatch, answers: dict[str, list[str]]) -> list[str]:
    """Makes names resolve to the given addresses.

    Args:
      monkeypatch: the fixture.
      answers: by name, the addresses of its lookups in order; the last one is repeated.

    Returns:
      The names that are looked up, a list that grows.
    """
    asked: list[str] = []
    real = socket.getaddrinfo

    def getaddrinfo(host, port, *args, **kwargs):
        asked.append(host)
        if host not in answers:
            return real(host, port, *args, **kwargs)
        address = answers[host].pop(0) if len(answers[host]) > 1 else answers[host][0]
        return real(address, port, *args, **kwargs)

    monkeypatch.setattr(socket, "getaddrinfo", getaddrinfo)
    return asked


def test_a_name_is_resolved_once_and_its_checked_address_is_used(server, monkeypatch):
    """The first lookup of the name gives a public address, the second one this machine's."""
    connected = []

    def connect(self, address):
        connected.append(address[0])
        raise ConnectionRefusedError("refused by the test")

    asked = resolve_to(monkeypatch, {"rebound.example": ["93.184.215.14", "127.0.0.1"]})
    before = len(server.asked)
    monkeypatch.setattr(socket.socket, "connect", connect)
    with pytest.raises(FetchError, match="cannot be fetched: refused by the test"):
        fetch.read(f"http://rebound.example:{server.server_port}/a.png")
    assert (asked, connected) == (["rebound.example"], ["93.184.215.14"])
    assert len(server.asked) == before
    with pytest.raises(FetchError, match=r"rebound\.example \(127\.0\.0\.1\) is not a public address"):
        fetch.read(f"http://rebound.example:{server.server_port}/a.png")


def test_a_redirection_from_a_public_to_a_private_address_is_refused(server, monkeypatch):
    """Here the server's own address counts as public, once. It redirects to an address of this machine."""
    public = fetch.is_public
    verdicts = iter([True])
    monkeypatch.setattr(fetch, "is_public", lambda address: next(verdicts, public(address)))
    url = f"{server.url}/redirect?http://localhost:{server.server_port}/a.png"
    before = list(server.asked)
    with pytest.raises(FetchError, match=r"/redirect\?.*: localhost \(.*127\.0\.0\.1.*\) is not a public address"):
        fetch.read(url)
    assert server.asked == [*before, "/redirect"]


def test_a_public_address_is_read(server, monkeypatch):
    """Uses the code for public addresses; tests do not use the internet."""
    monkeypatch.setattr(fetch, "is_public", lambda address: address == "127.0.0.1")
    assert fetch.read(f"http://localhost:{server.server_port}/a.png") == BODY
    with pytest.raises(FetchError, match=r"cannot be fetched: .*(SSL|ssl)"):
        fetch.read(f"https://localhost:{server.server_port}/a.png")


def test_a_proxy_is_used_only_if_private_addresses_are_allowed(server, monkeypatch):
    monkeypatch.delenv("no_proxy")
    monkeypatch.delenv("NO_PROXY", raising=False)
    monkeypatch.setenv("http_proxy", server.url)
    before = len(server.asked)
    with pytest.raises(FetchError):
        fetch.read("http://10.255.255.1/a.png")
    assert len(server.asked) == before
    assert fetch.read("http://10.255.255.1/a.png", private=True) == BODY
    assert server.asked[before:] == ["http://10.255.255.1/a.png"]
