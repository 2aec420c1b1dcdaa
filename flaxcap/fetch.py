"""Pictures from wherever a user names them: files, directories, web addresses."""

import pathlib
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Iterator

from flaxcap.errors import UserError

MAX_BYTES = 32 << 20
TIMEOUT_S = 20
SUFFIXES = {".jpg", ".jpeg", ".png", ".webp", ".gif", ".bmp", ".tif", ".tiff"}


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
            found = sorted(str(p) for p in path.iterdir() if p.suffix.lower() in SUFFIXES)
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
        _check_scheme(newurl)
        return super().redirect_request(req, fp, code, msg, headers, newurl)


def _check_scheme(url: str) -> None:
    scheme = urllib.parse.urlsplit(url).scheme.lower()
    if scheme not in ("http", "https"):
        raise FetchError(f"{url}: addresses start with http:// or https://, not {scheme}://")


def _download(url: str) -> bytes:
    _check_scheme(url)
    opener = urllib.request.build_opener(_WebOnly())
    request = urllib.request.Request(url, headers={"User-Agent": "flaxcap"})
    try:
        with opener.open(request, timeout=TIMEOUT_S) as response:
            # A server may say any length or none: what counts is what comes.
            found = response.read(MAX_BYTES + 1)
    except (OSError, ValueError) as e:
        if isinstance(e, FetchError):
            raise
        raise FetchError(f"{url}: cannot be fetched: {getattr(e, 'reason', e)}") from e
    if len(found) > MAX_BYTES:
        raise FetchError(f"{url}: more than the {MAX_BYTES} bytes allowed")
    return found
