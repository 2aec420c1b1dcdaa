"""Weights are downloaded once. An interrupted download resumes, and a wrong file is refused with one message."""

import contextlib
import hashlib
import http.server
import os
import re
import socket
import subprocess
import sys
import threading

import pytest
from torture_cases import files as torture_files
from trained import tiny_config

from flaxcap import presets
from flaxcap.encoders import download
from flaxcap.encoders.base import WeightsError
from flaxcap.encoders.inception_v3 import weights
from flaxcap.files import size_limits


class Server(http.server.ThreadingHTTPServer):
    """Serves `content` at any path on the loopback. `asked` holds the Range header of each request."""

    def __init__(self, content: bytes):
        super().__init__(("127.0.0.1", 0), Handler)
        self.content, self.asked = content, []
        self.ranges, self.send_only, self.status = True, len(content), 200
        self.length: str | None = None  # sent instead of the content's length
        self.url = f"http://127.0.0.1:{self.server_address[1]}/models/weights.h5"
        self.md5 = hashlib.md5(content).hexdigest()


class Handler(http.server.BaseHTTPRequestHandler):
    server: Server

    def do_GET(self):
        wanted = self.headers.get("Range")
        self.server.asked.append(wanted)
        start = int(re.findall(r"bytes=(\d+)-", wanted)[0]) if wanted and self.server.ranges else 0
        content = self.server.content[start:]
        status = 416 if start >= len(self.server.content) else 206 if start else self.server.status
        self.send_response(status)
        self.send_header("Content-Length", str(len(content)) if self.server.length is None else self.server.length)
        self.end_headers()
        if status < 300:
            self.wfile.write(content[: self.server.send_only])

    def log_message(self, format, *args):
        pass


@pytest.fixture
def server(monkeypatch):
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    with Server(bytes(range(256)) * 20_000) as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        yield server
        server.shutdown()
        thread.join()


def test_the_cache_is_in_the_home_directory_by_default(server, tmp_path, monkeypatch):
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    assert download.fetch(server.url, server.md5) == tmp_path / ".cache" / "flaxcap" / "weights.h5"


def test_parallel_requests_download_the_file_once(server, tmp_path):
    found = []
    threads = [
        threading.Thread(target=lambda: found.append(download.fetch(server.url, server.md5, tmp_path)))
        for _ in range(4)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == [tmp_path / "weights.h5"] * 4
    assert server.asked == [None]


def test_a_wrong_checksum_is_never_kept(server, tmp_path):
    for _ in range(2):
        with pytest.raises(WeightsError, match=f"MD5 {server.md5}, expected 0000.*Download .* by hand"):
            download.fetch(server.url, "0000", tmp_path)
    assert server.asked == [None, None]  # the second try used no byte of the first
    assert not (tmp_path / "weights.h5").exists()
    assert (tmp_path / "weights.h5.part").stat().st_size == 0


def test_an_interrupted_download_resumes(server, tmp_path):
    server.send_only = 3_000_000
    with pytest.raises(WeightsError, match=r"ended 2120000 bytes early.*--encoder_weights=PATH"):
        download.fetch(server.url, server.md5, tmp_path)
    path = download.fetch(server.url, server.md5, tmp_path)
    assert path.read_bytes() == server.content
    assert server.asked == [None, "bytes=3000000-"]


@pytest.mark.parametrize("ranges", [True, False])
@pytest.mark.parametrize("size", [10, 6_000_000])
def test_a_wrong_partial_file_is_replaced(server, tmp_path, ranges, size):
    """Covers a part of another file, a part longer than the file, and a server without range requests."""
    server.ranges = ranges
    (tmp_path / "weights.h5.part").write_bytes(b"x" * size)
    if ranges and size == 10:
        with pytest.raises(WeightsError, match="MD5"):
            download.fetch(server.url, server.md5, tmp_path)
    assert download.fetch(server.url, server.md5, tmp_path).read_bytes() == server.content


def test_a_damaged_cache_is_named(server, tmp_path):
    (tmp_path / "weights.h5").write_bytes(b"damaged")
    with pytest.raises(WeightsError, match=r"weights\.h5: found MD5 .*, expected .*Delete it"):
        download.fetch(server.url, server.md5, tmp_path)
    assert server.asked == []


def test_an_offline_message_names_the_url_and_the_path(server, tmp_path):
    with contextlib.closing(socket.create_server(("127.0.0.1", 0))) as closed:
        port = closed.getsockname()[1]
    server.status = 404
    for url in (f"http://127.0.0.1:{port}/weights.h5", server.url):
        with pytest.raises(WeightsError, match="cannot download") as caught:
            download.fetch(url, server.md5, tmp_path / "cache")
        for words in (
            f"Download {url} by hand",
            str(tmp_path / "cache" / "weights.h5"),
            "--encoder_weights=PATH",
        ):
            assert words in str(caught.value)
    (tmp_path / "file").touch()
    with pytest.raises(WeightsError, match="cannot download"):
        download.fetch(server.url, server.md5, tmp_path / "file")


def test_the_official_file_is_downloaded_once(server, tmp_path, monkeypatch):
    torture_files.write_weights(tmp_path / "served.h5").close()
    server.content = (tmp_path / "served.h5").read_bytes()
    server.send_only = len(server.content)
    monkeypatch.setattr(weights, "OFFICIAL_URL", server.url)
    monkeypatch.setattr(weights, "OFFICIAL_MD5", hashlib.md5(server.content).hexdigest())
    for _ in range(2):
        loaded, sha256 = weights.load("imagenet", block="mixed0", cache_dir=tmp_path / "cache")
        assert sha256 == hashlib.sha256(server.content).hexdigest()
        assert (loaded["conv2d_3"]["kernel"] == 3).all()
    assert server.asked == [None]
    assert [path.name for path in (tmp_path / "cache").iterdir()] == ["weights.h5"]


@pytest.mark.parametrize("length", ["", "many", "-5", "99999999999999999999"])
def test_a_wrong_content_length_is_not_trusted(server, tmp_path, length):
    server.length = length
    if length.startswith("9"):
        with pytest.raises(WeightsError, match="cannot download"):
            download.fetch(server.url, server.md5, tmp_path)
        assert not (tmp_path / "weights.h5").exists()
    else:
        assert download.fetch(server.url, server.md5, tmp_path).read_bytes() == server.content


def test_an_endless_download_is_aborted(server, tmp_path, monkeypatch):
    monkeypatch.setattr(size_limits, "WEIGHTS", 3_000_000)
    with pytest.raises(WeightsError, match=r"more than the 3000000 bytes allowed\). Download .* by hand"):
        download.fetch(server.url, server.md5, tmp_path)
    assert [(path.name, path.stat().st_size) for path in tmp_path.iterdir()] == [("weights.h5.part", 0)]


def test_prepare_without_a_network_names_the_url_and_the_path_in_one_line(tmp_path):
    """Runs the program. A proxy that does not exist replaces the missing network."""
    with contextlib.closing(socket.create_server(("127.0.0.1", 0))) as closed:
        nowhere = f"http://127.0.0.1:{closed.getsockname()[1]}"
    config = tiny_config()
    config.encoder.weights = "imagenet"
    preset = tmp_path / "preset.json"
    preset.write_text(presets.to_json(config))
    environment = {name: value for name, value in os.environ.items() if "proxy" not in name.lower()}
    environment |= {"https_proxy": nowhere, "XDG_CACHE_HOME": str(tmp_path)}
    done = subprocess.run(
        [sys.executable, "-m", "flaxcap", "prepare", f"--config={preset}", f"--data_dir={tmp_path / 'data'}"],
        env=environment,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 1
    assert re.fullmatch(
        rf"flaxcap prepare: cannot download the encoder's weights \({weights.OFFICIAL_URL}: .*\)\."
        rf" Download {weights.OFFICIAL_URL} by hand and save it as {tmp_path}/flaxcap/inception_v3_\S+\.h5,"
        r" or name a copy with --encoder_weights=PATH\.\n",
        done.stderr,
    ), done.stderr
