"""Pictures from wherever a user names them: files, directories, web addresses."""

import concurrent.futures
import http.client
import ipaddress
import os
import pathlib
import socket
import ssl
import string
import threading
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Iterator

from flaxcap.errors import UserError, cut, plain
from flaxcap.files import integrity, size_limits

MAX_BYTES = size_limits.IMAGE
TIMEOUT_S = 20  # that a server may be silent
TOTAL_S = 60  # that a whole download may take
SUFFIXES = {".jpg", ".jpeg", ".png", ".webp", ".gif", ".bmp", ".tif", ".tiff", ".ppm"}

_NAT64 = ipaddress.IPv6Network("64:ff9b::/96")  # IPv4 addresses as an IPv6 network alone reaches them


class FetchError(UserError):
    """A picture that cannot be had, and why."""


def names(sources: list[str]) -> Iterator[str]:
    """Files and addresses as they stand, a directory's pictures by name. FetchError for what there is not."""
    for source in sources:
        if integrity.is_remote(source):
            yield source
            continue
        path = os.path.expanduser(source)
        if os.path.isdir(path):
            folder = pathlib.Path(path)
            found = sorted(str(p) for p in folder.iterdir() if p.suffix.lower() in SUFFIXES and p.is_file())
            if not found:
                raise FetchError(f"{source}: the directory holds no picture ({', '.join(sorted(SUFFIXES))})")
            yield from found
        elif os.path.isfile(path):
            yield path
        else:
            raise FetchError(f"{source}: no such file or directory, and no http(s) address")


def read(name: str, *, private: bool = False) -> bytes:
    """The bytes of a file or address, at most MAX_BYTES. FetchError says why not.

    Addresses of this machine and of local networks are read, and the environment's proxies used, only if `private`:
    they show what is not for everyone, and whoever wrote the list of pictures may not be who runs the program.
    """
    if integrity.is_remote(name):
        return _download(name, private)
    try:
        return size_limits.read(pathlib.Path(name), MAX_BYTES)
    except OSError as e:
        raise FetchError(f"{name}: cannot be read: {e.strerror}") from e


def is_public(address: str) -> bool:
    """Whether an IP address belongs to the open internet, not to this machine, a local network or no one."""
    ip = ipaddress.ip_address(address.partition("%")[0])
    if isinstance(ip, ipaddress.IPv6Address):
        if ip.is_site_local:
            return False
        inside = ipaddress.IPv4Address(int(ip) & 0xFFFFFFFF) if ip in _NAT64 else ip.ipv4_mapped or ip.sixtofour
        ip = inside or ip
    return ip.is_global and not (ip.is_multicast or ip.is_reserved)


def _connect(host: str, port: int) -> socket.socket:
    """A connection to one of a host's public addresses; FetchError if it has none.

    The name is looked up once: asked again, it could by then mean another address than the one that was checked.
    """
    found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
    public = [item for item in found if is_public(str(item[4][0]))]
    if not public:
        where = ", ".join(sorted({str(item[4][0]) for item in found}))
        meant = host if host == where else f"{host} ({where})"
        raise FetchError(f"{meant} is no public address; --allow_private_urls would allow it")
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


class _HTTP(http.client.HTTPConnection):
    def connect(self) -> None:
        self.sock = _connect(self.host, self.port)


class _HTTPS(http.client.HTTPSConnection):
    def connect(self) -> None:
        self.sock = ssl.create_default_context().wrap_socket(_connect(self.host, self.port), server_hostname=self.host)


class _Handler(urllib.request.AbstractHTTPHandler):
    http_request = https_request = urllib.request.AbstractHTTPHandler.do_request_

    def http_open(self, req: urllib.request.Request) -> http.client.HTTPResponse:
        return self.do_open(_HTTP, req)

    def https_open(self, req: urllib.request.Request) -> http.client.HTTPResponse:
        return self.do_open(_HTTPS, req)


class _WebOnly(urllib.request.HTTPRedirectHandler):
    """A redirection may not leave the web either."""

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
        raise FetchError(f"addresses start with http:// or https://, not {scheme}://")


def _opener(private: bool) -> urllib.request.OpenerDirector:
    if private:
        return urllib.request.build_opener(_WebOnly())
    # Neither proxies, which look names up themselves, nor handlers of anything but the web.
    opener = urllib.request.OpenerDirector()
    for handler in (
        _Handler(),
        _WebOnly(),
        urllib.request.HTTPDefaultErrorHandler(),
        urllib.request.HTTPErrorProcessor(),
    ):
        opener.add_handler(handler)
    return opener


def _download(url: str, private: bool) -> bytes:
    # Every wait is bounded only from outside: a look-up, a handshake, headers that come byte by byte. The thread is
    # left behind when its time is over, and does not keep the program from ending.
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
        raise FetchError(f"{url}: cannot be fetched: not whole after the {TOTAL_S} s allowed") from None


def _get(url: str, end: float, private: bool) -> bytes:
    """The body, as long as `time.monotonic()` is not beyond `end`."""
    found = bytearray()
    try:
        _check_scheme(url)
        # Spaces and letters beyond ASCII, which browsers show and take, are not sent as they are.
        quoted = urllib.parse.quote(url, safe=string.punctuation)
        request = urllib.request.Request(quoted, headers={"User-Agent": "flaxcap"})
        with _opener(private).open(request, timeout=TIMEOUT_S) as response:
            # A server may say any length or none: what counts is what comes.
            while some := response.read1(1 << 16):
                found += some
                if len(found) > MAX_BYTES:
                    raise FetchError(f"more than the {MAX_BYTES} bytes allowed")
                if time.monotonic() > end:
                    raise TimeoutError(f"not whole after the {TOTAL_S} s allowed")
    except FetchError as e:
        raise FetchError(f"{url}: {e}") from None
    except urllib.error.HTTPError as e:
        e.close()
        raise FetchError(f"{url}: the server answers {e.code} {plain(cut(e.reason, 200))}") from None
    except (OSError, ValueError, http.client.HTTPException) as e:
        raise FetchError(f"{url}: cannot be fetched: {plain(cut(str(getattr(e, 'reason', e)), 200))}") from e
    return bytes(found)
