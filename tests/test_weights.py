import contextlib
import hashlib
import http.server
import re
import socket
import threading

import h5py
import jax
import numpy as np
import pytest

from flaxcap.encoders import inception_v3, weights
from flaxcap.encoders.weights import WeightsError

BLOCK = "mixed0"  # twelve convolutions: a small file


@pytest.fixture(scope="module")
def params():
    draw = np.random.default_rng(0)
    params = inception_v3.init(jax.random.key(0), BLOCK)
    for conv in params.values():
        conv["beta"], conv["mean"], conv["var"] = draw.uniform(0, 1, (3, *conv["beta"].shape)).astype(np.float32)
    return params


def official(params, first=1, suffix=":0"):
    """{path in the file: array}, in the layout of Keras's no-top file, layers numbered from `first`."""
    arrays = {}
    for number, conv in enumerate(params.values(), first):
        tail = f"_{number}" if number else ""
        arrays[f"conv2d{tail}/conv2d{tail}/kernel{suffix}"] = conv["kernel"]
        norm = f"batch_normalization{tail}/batch_normalization{tail}"
        arrays |= {
            f"{norm}/beta{suffix}": conv["beta"],
            f"{norm}/moving_mean{suffix}": conv["mean"],
            f"{norm}/moving_variance{suffix}": conv["var"],
        }
    return arrays


def write(path, arrays):
    with h5py.File(path, "w") as file:
        file.create_group("activation")
        for name, array in arrays.items():
            file[name] = array
    return path


@pytest.mark.parametrize(("first", "suffix"), [(1, ":0"), (0, ""), (0, ":0"), (94, ":0"), (95, "")])
def test_every_numbering_of_keras_is_read(params, tmp_path, first, suffix):
    path = write(tmp_path / "weights.h5", official(params, first, suffix))
    loaded, sha256 = weights.load(str(path), block=BLOCK)
    assert list(loaded) == list(params)
    jax.tree.map(np.testing.assert_array_equal, loaded, params)
    assert sha256 == hashlib.sha256(path.read_bytes()).hexdigest()


def test_a_file_of_the_whole_net_serves_an_early_block(inception_h5):
    early, whole = weights.read(inception_h5, "mixed3"), weights.read(inception_h5)
    assert len(whole) == 94
    assert {name: conv["kernel"].shape for name, conv in whole.items()} == inception_v3.kernel_shapes()
    jax.tree.map(np.testing.assert_array_equal, early, {name: whole[name] for name in early})


def cut(name):
    return lambda arrays: arrays.pop(name)


def put(name, array):
    return lambda arrays: arrays.update({name: array})


NORM = "batch_normalization_3/batch_normalization_3/"
DAMAGE = {
    "gap": (cut("conv2d_7/conv2d_7/kernel:0"), ["conv2d_7 is missing", "found 11", "expected 12"]),
    "no first layer": (cut("conv2d_1/conv2d_1/kernel:0"), ["conv2d_13 is missing", "first N being 2"]),
    "no layers": (lambda arrays: arrays.clear(), ["conv2d_1 is missing", "found 0"]),
    "no variance": (cut(NORM + "moving_variance:0"), ["batch_normalization_3", "moving_variance", "[64]"]),
    "shape": (
        put("conv2d_2/conv2d_2/kernel:0", np.zeros((3, 3, 32, 31), np.float32)),
        ["conv2d_2", "kernel", "[3, 3, 32, 31]", "[3, 3, 32, 32]"],
    ),
    "scalar": (put(NORM + "beta:0", np.float32(1)), ["batch_normalization_3", "beta", "[]", "[64]"]),
    "integers": (put(NORM + "beta:0", np.zeros(64, np.int32)), ["beta", "int32", "floats of [64]"]),
    "words": (put(NORM + "beta:0", [b"x"] * 64), ["batch_normalization_3", "beta", "[64]"]),
    "nan": (put(NORM + "beta:0", np.full(64, np.nan, np.float32)), ["beta", "not finite"]),
    "overflow": (put(NORM + "beta:0", np.full(64, 1e300)), ["beta", "not finite"]),
    "variance": (
        put(NORM + "moving_variance:0", np.full(64, -1, np.float32)),
        ["batch_normalization_3", "negative moving_variance"],
    ),
    "link out of the file": (
        put(NORM + "beta:0", h5py.ExternalLink("/etc/other.h5", "/beta")),
        ["found a link"],
    ),
    "soft link": (
        put(NORM + "beta:0", h5py.SoftLink("/conv2d_1")),
        ["batch_normalization_3", "found a link"],
    ),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_wrong_files_are_refused_by_layer(params, tmp_path, damage):
    arrays = official(params)
    change, words = DAMAGE[damage]
    change(arrays)
    path = write(tmp_path / "weights.h5", arrays)
    with pytest.raises(WeightsError, match=re.escape(str(path))) as caught:
        weights.load(str(path), block=BLOCK)
    assert all(word in str(caught.value) for word in words), caught.value


def test_groups_linked_in_a_circle_and_data_kept_elsewhere_are_refused(params, tmp_path):
    path = write(tmp_path / "weights.h5", official(params))
    (tmp_path / "raw").write_bytes(bytes(4 * 64))
    with h5py.File(path, "a") as file:
        del file[NORM + "beta:0"]
        file[NORM + "circle"] = file["batch_normalization_3"]
    with pytest.raises(WeightsError, match="batch_normalization_3, beta: found nothing"):
        weights.read(path, BLOCK)
    with h5py.File(path, "a") as file:
        del file[NORM + "circle"]
        file.create_dataset(NORM + "beta:0", (64,), "f4", external=[(tmp_path / "raw", 0, 256)])
    with pytest.raises(WeightsError, match="kept in another file"):
        weights.read(path, BLOCK)


def test_damaged_files_are_refused(params, tmp_path):
    path = write(tmp_path / "weights.h5", official(params))
    whole = path.read_bytes()
    for content in (b"", b"not HDF5", whole[:1000], whole[: len(whole) // 2]):
        path.write_bytes(content)
        with pytest.raises(WeightsError, match="not a readable HDF5 file"):
            weights.read(path, BLOCK)
    with pytest.raises(WeightsError, match=r"no weights file at .*imagnet"):
        weights.load("imagnet", block=BLOCK)


def test_mutated_files_are_read_or_refused(params, tmp_path):
    path = write(tmp_path / "weights.h5", official(params))
    whole, refused = path.read_bytes(), 0
    described = [found.start() for found in re.finditer(b"TREE|HEAP|SNOD|conv2d|batch", whole)]
    draw = np.random.default_rng(0)
    for _ in range(200):
        mutated = np.frombuffer(whole, np.uint8).copy()
        places = draw.choice(described, 3) + draw.integers(0, 500, 3)
        mutated[places % len(mutated)] = draw.integers(0, 256, 3)
        path.write_bytes(mutated.tobytes())
        try:
            weights.read(path, BLOCK)
        except WeightsError:
            refused += 1
    assert 20 < refused < 180


def test_random_weights_are_measured_and_named_by_their_values():
    images = np.random.default_rng(0).integers(0, 256, (2, 83, 83, 3), np.uint8)
    first, hash_first = weights.load("random", block=BLOCK, measure_on=images)
    same, hash_same = weights.load("random", block=BLOCK, measure_on=images)
    other, hash_other = weights.load("random", block=BLOCK, seed=1, measure_on=images)
    jax.tree.map(np.testing.assert_array_equal, first, same)
    assert hash_first == hash_same != hash_other
    assert (first["conv2d_1"]["var"] != 1).all()
    assert (first["conv2d_1"]["kernel"] != other["conv2d_1"]["kernel"]).any()
    with pytest.raises(WeightsError, match="random encoder weights need images"):
        weights.load("random", block=BLOCK)


class Server(http.server.ThreadingHTTPServer):
    """Serves `content` at any path on the loopback; `asked` holds each request's Range header."""

    def __init__(self, content: bytes):
        super().__init__(("127.0.0.1", 0), Handler)
        self.content, self.asked = content, []
        self.ranges, self.send_only, self.status = True, len(content), 200
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
        self.send_header("Content-Length", str(len(content)))
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


def test_the_official_file_is_downloaded_once(params, server, tmp_path, monkeypatch):
    server.content = write(tmp_path / "served.h5", official(params)).read_bytes()
    server.send_only = len(server.content)
    monkeypatch.setattr(weights, "OFFICIAL_URL", server.url)
    monkeypatch.setattr(weights, "OFFICIAL_MD5", hashlib.md5(server.content).hexdigest())
    for _ in range(2):
        loaded, sha256 = weights.load("imagenet", block=BLOCK, cache_dir=tmp_path / "cache")
        assert sha256 == hashlib.sha256(server.content).hexdigest()
        jax.tree.map(np.testing.assert_array_equal, loaded, params)
    assert server.asked == [None]
    assert [path.name for path in (tmp_path / "cache").iterdir()] == ["weights.h5"]


def test_the_cache_is_in_the_home_directory_unless_told_otherwise(server, tmp_path, monkeypatch):
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    assert weights.fetch(server.url, server.md5) == tmp_path / ".cache" / "flaxcap" / "weights.h5"


def test_several_that_want_the_file_download_it_once(server, tmp_path):
    found = []
    threads = [
        threading.Thread(target=lambda: found.append(weights.fetch(server.url, server.md5, tmp_path))) for _ in range(4)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == [tmp_path / "weights.h5"] * 4
    assert server.asked == [None]


def test_a_wrong_checksum_is_never_kept(server, tmp_path):
    for _ in range(2):
        with pytest.raises(WeightsError, match=f"MD5 {server.md5}, expected 0000.*Fetch .* by hand"):
            weights.fetch(server.url, "0000", tmp_path)
    assert server.asked == [None, None]  # nothing of the first try was used for the second
    assert not (tmp_path / "weights.h5").exists()
    assert (tmp_path / "weights.h5.part").stat().st_size == 0


def test_a_broken_download_goes_on_where_it_stopped(server, tmp_path):
    server.send_only = 3_000_000
    with pytest.raises(WeightsError, match=r"ended 2120000 bytes early.*--encoder_weights=PATH"):
        weights.fetch(server.url, server.md5, tmp_path)
    path = weights.fetch(server.url, server.md5, tmp_path)
    assert path.read_bytes() == server.content
    assert server.asked == [None, "bytes=3000000-"]


@pytest.mark.parametrize("ranges", [True, False])
@pytest.mark.parametrize("size", [10, 6_000_000])
def test_a_part_of_something_else_does_no_harm(server, tmp_path, ranges, size):
    """A part longer than the file, a part of another file, a server that always sends everything."""
    server.ranges = ranges
    (tmp_path / "weights.h5.part").write_bytes(b"x" * size)
    if ranges and size == 10:
        with pytest.raises(WeightsError, match="MD5"):
            weights.fetch(server.url, server.md5, tmp_path)
    assert weights.fetch(server.url, server.md5, tmp_path).read_bytes() == server.content


def test_a_damaged_cache_is_named(server, tmp_path):
    (tmp_path / "weights.h5").write_bytes(b"damaged")
    with pytest.raises(WeightsError, match=r"weights.h5 has MD5 .*, expected .*Delete it"):
        weights.fetch(server.url, server.md5, tmp_path)
    assert server.asked == []


def test_offline_says_what_to_fetch_and_where_to_put_it(server, tmp_path):
    with contextlib.closing(socket.create_server(("127.0.0.1", 0))) as closed:
        port = closed.getsockname()[1]
    server.status = 404
    for url in (f"http://127.0.0.1:{port}/weights.h5", server.url):
        with pytest.raises(WeightsError, match="cannot download") as caught:
            weights.fetch(url, server.md5, tmp_path / "cache")
        for words in (
            f"Fetch {url} by hand",
            str(tmp_path / "cache" / "weights.h5"),
            "--encoder_weights=PATH",
        ):
            assert words in str(caught.value)
    (tmp_path / "file").touch()
    with pytest.raises(WeightsError, match="cannot download"):
        weights.fetch(server.url, server.md5, tmp_path / "file")
