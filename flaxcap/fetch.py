"""Pictures from wherever a user names them: files, directories, web addresses."""

import concurrent.futures
import http.client
import pathlib
import string
import threading
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Iterator

from flaxcap.errors import UserError

MAX_BYTES = 32 << 20
TIMEOUT_S = 20  # that a server may be silent
TOTAL_S = 60  # that a whole download may take
SUFFIXES = {".jpg", ".jpeg", ".png", ".webp", ".gif", ".bmp", ".tif", ".tiff", ".ppm"}


class FetchError(UserError):
    """A picture that cannot be had, and why."""


def names(sources: list[str]) -> Iterator[str]:
    """Files and addresses as they stand, a directory's pictures by name. FetchError for what there is not."""
    for source in sources:
        if "://" in source:
            yield source
            continue
        path = pathlib.Path(source).expanduser()
        if path.is_dir():
            found = sorted(str(p) for p in path.iterdir() if p.suffix.lower() in SUFFIXES and p.is_file())
            if not found:
                raise FetchError(f"{source}: the directory holds no picture ({', '.join(sorted(SUFFIXES))})")
            yield from found
        elif path.is_file():
            yield str(path)
        else:
            raise FetchError(f"{source}: no such file or directory, and no http(s) address")


def read(name: str) -> bytes:
    """The bytes of a file or address, at most MAX_BYTES. FetchError says why not."""
    if "://" in name:
        return _download(name)
    path = pathlib.Path(name)
    try:
        size = path.stat().st_size
        if size > MAX_BYTES:
            raise FetchError(f"{name}: {size} bytes, more than the {MAX_BYTES} allowed")
        return path.read_bytes()
    except OSError as e:
        raise FetchError(f"{name}: cannot be read: {e.strerror}") from e


class _WebOnly(urllib.request.HTTPRedirectHandler):
    """A redirection may not leave the web either."""

    def redirect_request(self, req, fp, code, msg, headers, newurl):
        try:
            _check_scheme(newurl)
        except FetchError:
            fp.close()
            raise
        return super().redirect_request(req, fp, code, msg, headers, newurl)


def _check_scheme(url: str) -> None:
    scheme = urllib.parse.urlsplit(url).scheme.lower()
    if scheme not in ("http", "https"):
        raise FetchError(f"{url}: addresses start with http:// or https://, not {scheme}://")


def _download(url: str) -> bytes:
    # Every wait is bounded only from outside: a look-up, a handshake, headers that come byte by byte. The thread is
    # left behind when its time is over, and does not keep the program from ending.
    future: concurrent.futures.Future[bytes] = concurrent.futures.Future()
    end = time.monotonic() + TOTAL_S

    def work() -> None:
        try:
            future.set_result(_get(url, end))
        except BaseException as e:
            future.set_exception(e)

    threading.Thread(target=work, name="fetch", daemon=True).start()
    try:
        return future.result(TOTAL_S)
    except TimeoutError:
        raise FetchError(f"{url}: cannot be fetched: not whole after the {TOTAL_S} s allowed") from None


def _get(url: str, end: float) -> bytes:
    """The body, as long as `time.monotonic()` is not beyond `end`."""
    found = bytearray()
    opener = urllib.request.build_opener(_WebOnly())
    try:
        _check_scheme(url)
        # Spaces and letters beyond ASCII, which browsers show and take, are not sent as they are.
        quoted = urllib.parse.quote(url, safe=string.punctuation)
        request = urllib.request.Request(quoted, headers={"User-Agent": "flaxcap"})
        with opener.open(request, timeout=TIMEOUT_S) as response:
            # A server may say any length or none: what counts is what comes.
            while some := response.read1(1 << 16):
                found += some
                if len(found) > MAX_BYTES:
                    raise FetchError(f"{url}: more than the {MAX_BYTES} bytes allowed")
                if time.monotonic() > end:
                    raise TimeoutError(f"not whole after the {TOTAL_S} s allowed")
    except FetchError:
        raise
    except urllib.error.HTTPError as e:
        e.close()
        raise FetchError(f"{url}: the server answers {e.code} {e.reason}") from None
    except (OSError, ValueError, http.client.HTTPException) as e:
        raise FetchError(f"{url}: cannot be fetched: {getattr(e, 'reason', e)}") from e
    return bytes(found)
