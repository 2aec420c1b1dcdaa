"""Cases of the web: broken answers of servers, and interrupted downloads."""

import contextlib
import hashlib
import pathlib
import re
import signal
import socketserver
import subprocess
import sys
import threading
import time
from collections.abc import Iterator

import numpy as np
from torture_cases import images as torture_images

from flaxcap.errors import plain
from flaxcap.images import fetch

ANSWERS = 2000
DOWNLOADS = 60
TOTAL_S = 2  # instead of the 60 s that a download may take


@contextlib.contextmanager
def serving(answer) -> Iterator[str]:
    """Serves HTTP on this machine and yields the address. `answer(request, write)` writes each response."""

    class Handler(socketserver.BaseRequestHandler):
        def handle(self):
            with contextlib.suppress(OSError):
                answer(self.request.recv(1 << 16), self.request.sendall)

    class Server(socketserver.ThreadingTCPServer):
        daemon_threads = allow_reuse_address = True

        def handle_error(self, request, client_address):
            """Ignores clients that are killed or close the connection."""

    with Server(("127.0.0.1", 0), Handler) as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        try:
            yield f"http://127.0.0.1:{server.server_address[1]}"
        finally:
            server.shutdown()
            thread.join()


BODY = torture_images.sound()["plain.jpg"]
HEADS = (
    b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n" % len(BODY),
    b"HTTP/1.1 200 OK\r\nContent-Length: 999999999999999999999999\r\n\r\n",
    b"HTTP/1.1 200 OK\r\nContent-Length: -1\r\n\r\n",
    b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\nffffffffffffffff\r\n",
    b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n%x\r\n" % len(BODY),
    b"HTTP/1.1 302 \x1b[2J\r\nLocation: file:///etc/passwd\r\n\r\n",
    b"HTTP/1.1 301 Moved\r\nLocation: //[::1\r\n\r\n",
    b"HTTP/1.1 404 Not Found\r\n\r\n",
    b"HTTP/0.9 200\r\n\r\n",
    b"HTTP/1.1 100 Continue\r\n\r\nHTTP/1.1 200 OK\r\n\r\n",
    b"HTTP/1.1 200 OK\r\n" + b"X: y\r\n" * 200 + b"\r\n",
    b"HTTP/1.1 200 OK\r\nX: " + b"y" * 100_000 + b"\r\n\r\n",
)


def answers_broken(scratch: pathlib.Path, scale: float) -> dict:
    """Reads broken answers. Each gives a body of bounded size or an error that names the address, in bounded time."""
    del scratch
    kinds = [kind for kind in torture_images.MUTATIONS if kind != "sizes"]
    count = max(1, round(ANSWERS * scale))

    def answer(request: bytes, write) -> None:
        number = int(request.split(b"/")[1].split(b".")[0])
        draw = np.random.default_rng([5, number])
        head = HEADS[number % len(HEADS)]
        if number >= len(HEADS):
            head = torture_images.MUTATIONS[kinds[draw.integers(len(kinds))]](head, draw)
        write(head + BODY)

    lost, read, limit = [], 0, fetch.TOTAL_S
    fetch.TOTAL_S = TOTAL_S
    try:
        with serving(answer) as address:
            for number in range(count):
                url, begin = f"{address}/{number}.jpg", time.monotonic()
                try:
                    read += len(fetch.read(url, private=True)) <= fetch.MAX_BYTES
                except fetch.FetchError as error:
                    if url not in str(error) or plain(error) != str(error) or len(str(error)) > 500:
                        lost.append(f"{number}: an unclear message: {str(error)!r}")
                except Exception as error:
                    lost.append(f"{number}: {type(error).__name__}: {error}")
                if time.monotonic() - begin > 5 * TOTAL_S:
                    lost.append(f"{number}: {time.monotonic() - begin:.0f} s")
    finally:
        fetch.TOTAL_S = limit
    return {"case": "answers_broken", "tried": count, "survived": count - len(lost), "lost": lost, "read": read}


FETCH = """
import sys
from flaxcap.encoders import base, download
try:
    print(download.fetch(*sys.argv[1:]))
except base.WeightsError as e:
    print(e, file=sys.stderr)
    sys.exit(1)
"""


def downloads_broken_off(scratch: pathlib.Path, scale: float) -> dict:
    """Interrupts downloads, or kills their process. They resume, and only a complete file gets the file's name."""
    body = np.random.default_rng(6).bytes(3_000_000)
    md5 = hashlib.md5(body, usedforsecurity=False).hexdigest()
    draw = np.random.default_rng(7)
    limit: dict[str, int] = {"send": 0}  # bytes of a response

    def answer(request: bytes, write) -> None:
        found = re.search(rb"\r\nRange: bytes=(\d+)-", request)
        start = int(found[1]) if found else 0
        rest = body[start:]
        write(b"HTTP/1.1 %s\r\nContent-Length: %d\r\n\r\n" % (b"206 Partial" if found else b"200 OK", len(rest)))
        for first in range(0, min(len(rest), limit["send"]), 100_000):
            write(rest[first : min(first + 100_000, limit["send"])])
            time.sleep(0.005)

    lost, count, resumed = [], max(1, round(DOWNLOADS * scale)), 0
    with serving(answer) as address:
        for number in range(count):
            cache = scratch / f"cache{number}"
            path = cache / "weights.h5"
            for attempt in range(40):
                limit["send"] = int(draw.integers(len(body))) if attempt < 3 else len(body)
                killed = number % 2 and attempt < 3
                command = [sys.executable, "-c", FETCH, f"{address}/weights.h5", md5, str(cache)]
                process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
                if killed:
                    _wait_for_data(cache / "weights.h5.part", process)
                    time.sleep(draw.uniform(0, 0.1))
                    process.send_signal(signal.SIGKILL)
                _, error = process.communicate(timeout=300)
                if path.exists() and path.read_bytes() != body:
                    lost.append(f"{number}: an incomplete file has the file's name")
                if process.returncode == 0:
                    break
                resumed += 1
                if not killed and not all(words in error for words in ("by hand", str(path))):
                    lost.append(f"{number}: {error}")
            else:
                lost.append(f"{number}: incomplete after 40 tries")
    figures = {"tried": count, "survived": count - len(lost), "lost": lost, "resumed": resumed}
    return {"case": "downloads_broken_off", **figures}


def _wait_for_data(part: pathlib.Path, process: subprocess.Popen) -> None:
    while process.poll() is None and not (part.exists() and part.stat().st_size):
        time.sleep(0.005)


CASES = [answers_broken, downloads_broken_off]
