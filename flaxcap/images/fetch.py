"""The bytes of image files, from disks and from web addresses."""

import concurrent.futures
import http.client
import ipaddress
import pathlib
import socket
import ssl
import string
import threading
import time
import urllib.error
import urllib.parse
import urllib.request

from flaxcap.errors import UserError, cut, plain
from flaxcap.files import integrity, size_limits

MAX_BYTES = size_limits.IMAGE
TIMEOUT_S = 20  # without data from the server
TOTAL_S = 60  # for a complete download

_NAT64 = ipaddress.IPv6Network("64:ff9b::/96")  # IPv4 addresses, as an IPv6-only network reaches them


class FetchError(UserError):
    """An image file that cannot be read or downloaded; the message is the reason."""


def read(name: str, *, private: bool = False) -> bytes:
    """Reads a file or downloads an address.

    Args:
      name: a path or an http(s) address.
      private: allows addresses of this machine and of local networks, and the environment's proxies. These give access
        to data that are not public, and the list of images may come from somebody else.

    Raises:
      FetchError: the file cannot be read, the download fails, or the file has more than MAX_BYTES.
    """
    if integrity.is_remote(name):
        return _download(name, private)
    try:
        return size_limits.read(pathlib.Path(name), MAX_BYTES)
    except OSError as e:
        raise FetchError(f"{name}: cannot be read: {e.strerror}") from e


def is_public(address: str) -> bool:
    """Tells whether an IP address is on the public internet: not this machine's, a local network's or reserved."""
    ip = ipaddress.ip_address(address.partition("%")[0])
    if isinstance(ip, ipaddress.IPv6Address):
        if ip.is_site_local:
            return False
        inside = ipaddress.IPv4Address(int(ip) & 0xFFFFFFFF) if ip in _NAT64 else ip.ipv4_mapped or ip.sixtofour
        ip = inside or ip
    return ip.is_global and not (ip.is_multicast or ip.is_reserved)


def _connect(host: str, port: int) -> socket.socket:
    """Returns a connection to one of a host's public addresses; FetchError if it has none.

    The name is resolved once, and the checked address is used. A second lookup could return another address.
    """
    found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
    public = [item for item in found if is_public(str(item[4][0]))]
    if not public:
        where = ", ".join(sorted({str(item[4][0]) for item in found}))
        meant = host if host == where else f"{host} ({where})"
        raise FetchError(f"{meant} is not a public address; --allow_private_urls allows it")
    failed: OSError | None = None
    for family, kind, protocol, _, address in public:
        connection = socket.socket(family, kind, protocol)
        try:
            connection.settimeout(TIMEOUT_S)
            connection.connect(address)
            return connection
        except OSError as e:
            connection.close()
            failed = e
    raise failed or OSError("no address")


class _PublicHTTP(http.client.HTTPConnection):
    def connect(self) -> None:
        self.sock = _connect(self.host, self.port)


class _PublicHTTPS(http.client.HTTPSConnection):
    def connect(self) -> None:
        self.sock = ssl.create_default_context().wrap_socket(_connect(self.host, self.port), server_hostname=self.host)


class _PublicHandler(urllib.request.AbstractHTTPHandler):
    """Opens http and https addresses, on public hosts only."""

    http_request = https_request = urllib.request.AbstractHTTPHandler.do_request_

    def http_open(self, req: urllib.request.Request) -> http.client.HTTPResponse:
        return self.do_open(_PublicHTTP, req)

    def https_open(self, req: urllib.request.Request) -> http.client.HTTPResponse:
        return self.do_open(_PublicHTTPS, req)


class _WebOnly(urllib.request.HTTPRedirectHandler):
    """Follows redirections to http and https addresses only."""

    def redirect_request(self, req, fp, code, msg, headers, newurl):
        try:
            _check_scheme(newurl)
        except FetchError as e:
            fp.close()
            raise FetchError(f"redirected to {plain(cut(newurl, 200))}: {e}") from None
        return super().redirect_request(req, fp, code, msg, headers, newurl)


def _check_scheme(url: str) -> None:
    scheme = urllib.parse.urlsplit(url).scheme.lower()
    if scheme not in ("http", "https"):
        raise FetchError(f"found {scheme}://, expected http:// or https://")


def _opener(private: bool) -> urllib.request.OpenerDirector:
    if private:
        return urllib.request.build_opener(_WebOnly())
    # Without proxies, which resolve names themselves, and without handlers for files, FTP or data URLs.
    opener = urllib.request.OpenerDirector()
    for handler in (
        _PublicHandler(),
        _WebOnly(),
        urllib.request.HTTPDefaultErrorHandler(),
        urllib.request.HTTPErrorProcessor(),
    ):
        opener.add_handler(handler)
    return opener


def _download(url: str, private: bool) -> bytes:
    # Socket timeouts bound neither name resolution nor headers that arrive byte by byte, so a thread downloads and this
    # one waits. A thread that runs longer is abandoned; as a daemon it does not delay the program's end.
    future: concurrent.futures.Future[bytes] = concurrent.futures.Future()
    end = time.monotonic() + TOTAL_S

    def work() -> None:
        try:
            future.set_result(_get(url, end, private))
        except BaseException as e:
            future.set_exception(e)

    threading.Thread(target=work, name="fetch", daemon=True).start()
    try:
        return future.result(TOTAL_S)
    except TimeoutError:
        raise FetchError(f"{url}: cannot be fetched: not complete after the {TOTAL_S} s allowed") from None


def _get(url: str, end: float, private: bool) -> bytes:
    """Downloads the body; FetchError if that fails, or is not complete when `time.monotonic()` reaches `end`."""
    found = bytearray()
    try:
        _check_scheme(url)
        # Browsers accept spaces and non-ASCII letters, HTTP does not.
        quoted = urllib.parse.quote(url, safe=string.punctuation)
        request = urllib.request.Request(quoted, headers={"User-Agent": "flaxcap"})
        with _opener(private).open(request, timeout=TIMEOUT_S) as response:
            # The bytes are counted as they arrive: the server's Content-Length may be wrong or missing.
            while block := response.read1(1 << 16):
                found += block
                if len(found) > MAX_BYTES:
                    raise FetchError(f"more than the {MAX_BYTES} bytes allowed")
                if time.monotonic() > end:
                    raise TimeoutError(f"not complete after the {TOTAL_S} s allowed")
    except FetchError as e:
        raise FetchError(f"{url}: {e}") from None
    except urllib.error.HTTPError as e:
        e.close()
        raise FetchError(f"{url}: the server answers {e.code} {plain(cut(e.reason, 200))}") from None
    except (OSError, ValueError, http.client.HTTPException) as e:
        raise FetchError(f"{url}: cannot be fetched: {plain(cut(str(getattr(e, 'reason', e)), 200))}") from e
    return bytes(found)
