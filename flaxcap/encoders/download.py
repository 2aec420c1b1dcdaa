"""Files of weights, downloaded once to the cache."""

import contextlib
import fcntl
import hashlib
import http
import http.client
import os
import pathlib
import urllib.error
import urllib.request
from typing import BinaryIO

from absl import logging

from flaxcap.encoders.base import WeightsError
from flaxcap.files import size_limits
from flaxcap.runtime import cache

TIMEOUT_S = 30
_BLOCK_BYTES = 1 << 20


def digest_of_file(path: pathlib.Path, algorithm: str) -> str:
    """Returns the hexadecimal digest of a file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, lambda: hashlib.new(algorithm, usedforsecurity=False)).hexdigest()


def fetch(url: str, md5: str, cache_dir: str | os.PathLike[str] | None = None) -> pathlib.Path:
    """Returns the path of a URL's file in the cache. Downloads it if it is missing, and always checks its MD5.

    An interrupted download resumes. Only a file with the right checksum gets its name. Processes that want the same
    file wait for each other.

    Args:
      url: of the file.
      md5: the expected checksum, hexadecimal.
      cache_dir: default: flaxcap's cache.

    Raises:
      WeightsError: the file cannot be downloaded. The message says where to put a copy.
    """
    path = pathlib.Path(cache_dir or cache.cache_dir()) / url.rsplit("/", 1)[-1]
    part = path.with_name(path.name + ".part")
    by_hand = f"Download {url} by hand and save it as {path}, or name a copy with --encoder_weights=PATH."
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        if not path.exists():
            with part.open("ab") as file:
                fcntl.flock(file, fcntl.LOCK_EX)  # released when the process ends, however it ends
                if not path.exists():  # another process may have finished it while this one waited
                    _download(url, md5, part, file)
                    part.replace(path)
    except (OSError, http.client.HTTPException) as error:
        raise WeightsError(f"cannot download the encoder's weights ({url}: {error}). {by_hand}") from error
    if (found := digest_of_file(path, "md5")) != md5:
        raise WeightsError(f"{path}: found MD5 {found}, expected {md5}. Delete it to download it again. {by_hand}")
    return path


def _download(url: str, md5: str, part: pathlib.Path, file: BinaryIO) -> None:
    """Appends the missing bytes of a URL to `part`, which is open as `file`.

    Raises:
      OSError: the download ended early, is too large, or has another checksum.
    """
    start = file.seek(0, os.SEEK_END)
    logging.info("downloading %s%s", url, f" from byte {start}" if start else "")
    request = urllib.request.Request(url, headers={"Range": f"bytes={start}-"} if start else {})
    try:
        response = urllib.request.urlopen(request, timeout=TIMEOUT_S)
    except urllib.error.HTTPError as error:
        with contextlib.closing(error):
            if error.code != http.HTTPStatus.REQUESTED_RANGE_NOT_SATISFIABLE:
                raise
        file.truncate(0)  # the part is as long as the file, or longer, but failed its checksum
        response = urllib.request.urlopen(url, timeout=TIMEOUT_S)
    with response:
        size = start if response.status == http.HTTPStatus.PARTIAL_CONTENT else 0
        if not size:
            file.truncate(0)
        length = response.headers.get("Content-Length", "")
        missing = int(length) if length.isdecimal() else 0
        while data := response.read(_BLOCK_BYTES):
            file.write(data)
            missing -= len(data)
            size += len(data)
            if size > size_limits.WEIGHTS:
                file.truncate(0)
                raise OSError(f"more than the {size_limits.WEIGHTS} bytes allowed")
    file.flush()
    os.fsync(file.fileno())
    if missing > 0:
        raise OSError(f"the connection ended {missing} bytes early; the same command resumes there")
    if (found := digest_of_file(part, "md5")) != md5:
        file.truncate(0)
        raise OSError(f"the download has MD5 {found}, expected {md5}")
