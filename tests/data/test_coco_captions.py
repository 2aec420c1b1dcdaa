"""coco_captions, from small zips in COCO's layout: in a directory, and on a server on the loopback interface."""

import functools
import hashlib
import http.server
import json
import pathlib
import re
import shutil
import threading
import zipfile
from collections.abc import Callable, Iterator

import pytest
from coco_sample import captions_of, id_of, jpeg_of, write_coco_zips

from flaxcap.data import coco_captions, datasets
from flaxcap.data.base import DataError, Examples


@pytest.fixture(autouse=True)
def no_proxy(monkeypatch) -> None:
    """Lets requests to the loopback interface bypass proxies."""
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    monkeypatch.setenv("no_proxy", "127.0.0.1")


@pytest.fixture(scope="module")
def sample(tmp_path_factory) -> tuple[pathlib.Path, dict[str, list[str]]]:
    folder = tmp_path_factory.mktemp("coco")
    return folder, write_coco_zips(folder)


@pytest.fixture
def zips(sample, tmp_path) -> pathlib.Path:
    """A copy of the sample, for tests that change it."""
    return pathlib.Path(shutil.copytree(sample[0], tmp_path / "zips"))


def rewrite(path: pathlib.Path, member: str, change: Callable[[dict], object]) -> None:
    """Changes the parsed JSON of one member of a zip."""
    with zipfile.ZipFile(path) as archive:
        members = {name: archive.read(name) for name in archive.namelist()}
    tree = json.loads(members[member])
    change(tree)
    members[member] = json.dumps(tree).encode()
    with zipfile.ZipFile(path, "w") as archive:
        for name, content in members.items():
            archive.writestr(name, content)


@pytest.fixture
def server(zips) -> Iterator[tuple[str, pathlib.Path, list[str]]]:
    """COCO's and Karpathy's server in one: its base URL, the directory that it serves, and the requested paths."""
    requested: list[str] = []
    for subfolder in ("zips", "annotations"):
        (zips / subfolder).mkdir()
    for name in ("train2014.zip", "val2014.zip"):
        (zips / name).rename(zips / "zips" / name)
    (zips / "annotations_trainval2014.zip").rename(zips / "annotations" / "annotations_trainval2014.zip")

    class Handler(http.server.SimpleHTTPRequestHandler):
        def log_message(self, format, *args):
            requested.append(self.path)

    handler = functools.partial(Handler, directory=str(zips))
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as httpd:
        thread = threading.Thread(target=httpd.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        yield f"http://127.0.0.1:{httpd.server_port}", zips, requested
        httpd.shutdown()
        thread.join()


def arguments_of(url: str, folder: pathlib.Path) -> dict:
    """Returns the builder's arguments for downloads from `url` with the checksums of the files in `folder`."""
    checksums = {
        path.name: (path.stat().st_size, hashlib.sha256(path.read_bytes()).hexdigest())
        for path in folder.rglob("*.zip")
    }
    return {"base_url": url, "karpathy_url": f"{url}/caption_datasets.zip", "checksums": checksums}


def test_zips_of_a_directory_become_karpathys_splits(sample, tmp_path):
    folder, names = sample
    builder = datasets.prepare("coco_captions", tmp_path, manual_dir=folder)
    splits = {split: list(Examples(builder, split)) for split in ("train", "restval", "val", "test")}
    assert {split: sorted(e.filename for e in found) for split, found in splits.items()} == names
    by_id = {example.image_id: example for found in splits.values() for example in found}
    assert sorted(by_id) == [id_of(number) for number in range(14)]
    for number in range(14):
        example = by_id[id_of(number)]
        assert example.image == jpeg_of(number)
        assert example.captions == tuple(captions_of(number))
    both = Examples(builder, "train+restval")
    assert [e.image_id for e in both] == [e.image_id for e in splits["train"] + splits["restval"]]


def test_data_are_prepared_once_and_without_unpacking(sample, tmp_path):
    folder, _ = sample
    first = datasets.prepare("coco_captions", tmp_path, manual_dir=folder)
    again = datasets.prepare("coco_captions", tmp_path, manual_dir=tmp_path / "absent")
    assert again.data_dir == first.data_dir
    assert list(Examples(again, "val")) == list(Examples(first, "val"))
    assert not list(tmp_path.rglob("*.jpg"))
    assert not list(tmp_path.rglob("*unfinished*"))


def test_downloads_are_checked_and_kept(server, tmp_path):
    url, served, requested = server
    builder = datasets.prepare("coco_captions", tmp_path, **arguments_of(url, served))
    assert len(Examples(builder, "train")) == 6
    assert sorted(requested) == [
        "/annotations/annotations_trainval2014.zip",
        "/caption_datasets.zip",
        "/zips/train2014.zip",
        "/zips/val2014.zip",
    ]
    shutil.rmtree(builder.data_dir)
    datasets.prepare("coco_captions", tmp_path, **arguments_of(url, served))
    assert len(requested) == 4, "downloaded files were requested again"


def test_a_file_in_manual_dir_is_not_downloaded(server, tmp_path):
    url, served, requested = server
    by_hand = tmp_path / "by hand"
    by_hand.mkdir()
    shutil.copy(served / "zips" / "val2014.zip", by_hand)
    with zipfile.ZipFile(served / "caption_datasets.zip") as archive:
        archive.extract("dataset_coco.json", by_hand)
    datasets.prepare("coco_captions", tmp_path / "data", manual_dir=by_hand, **arguments_of(url, served))
    assert sorted(requested) == ["/annotations/annotations_trainval2014.zip", "/zips/train2014.zip"]


def test_a_wrong_checksum_names_the_file(server, tmp_path):
    url, served, _ = server
    arguments = arguments_of(url, served)
    size, digest = arguments["checksums"]["val2014.zip"]
    arguments["checksums"]["val2014.zip"] = (size, digest[::-1])
    with pytest.raises(DataError, match=r"^val2014\.zip: found a download with another checksum(.|\n)*" + digest):
        datasets.prepare("coco_captions", tmp_path, **arguments)
    assert not list(tmp_path.glob("coco_captions/*/*"))


def test_the_official_checksums_apply_to_a_mirror(server, tmp_path):
    url, _, _ = server
    with pytest.raises(DataError, match=r"^train2014\.zip: .*wrong checksum"):
        datasets.prepare("coco_captions", tmp_path, base_url=url)


def test_a_failed_download_asks_for_the_file(server, tmp_path, sample):
    url, served, _ = server
    arguments = arguments_of(url, served)
    with pytest.raises(DataError, match=r"caption_datasets\.zip: cannot be .*404(.|\n)*by hand, as caption_data"):
        datasets.prepare("coco_captions", tmp_path, **arguments | {"karpathy_url": f"{url}/gone/caption_datasets.zip"})
    refused = "http://127.0.0.1:9"  # no server listens on the discard port
    folder = tmp_path / "by hand"
    folder.mkdir()
    with pytest.raises(DataError, match=rf"^train2014\.zip(.|\n)*by hand.*{re.escape(str(folder))}"):
        datasets.prepare("coco_captions", tmp_path, manual_dir=folder, **arguments | {"base_url": refused})


def test_official_sizes_and_addresses():
    builder_urls = coco_captions.CocoCaptionsBuilder(data_dir="unused").url_infos
    assert sorted(builder_urls) == [
        "http://images.cocodataset.org/annotations/annotations_trainval2014.zip",
        "http://images.cocodataset.org/zips/train2014.zip",
        "http://images.cocodataset.org/zips/val2014.zip",
        "https://cs.stanford.edu/people/karpathy/deepimagesent/caption_datasets.zip",
    ]
    # TFDS has its own registry of the same downloads.
    from tensorflow_datasets.core.download import checksums

    official = checksums.get_all_url_infos()
    assert {url: official[url] for url in builder_urls} == builder_urls


ANNOTATIONS = "annotations_trainval2014.zip"
TRAIN_JSON, VAL_JSON = "annotations/captions_train2014.json", "annotations/captions_val2014.json"


@pytest.mark.parametrize(
    ("archive", "member", "change", "message"),
    [
        (
            ANNOTATIONS,
            VAL_JSON,
            lambda t: t.pop("images"),
            r"captions_val2014\.json, field 'images': found none",
        ),
        (
            ANNOTATIONS,
            TRAIN_JSON,
            lambda t: t["images"][2].update(id="25"),
            r"images\[2\], field 'id': found \"25\"",
        ),
        (
            ANNOTATIONS,
            TRAIN_JSON,
            lambda t: t["images"][1].update(id=9),
            r"images\[1\], field 'id': found 9 a second",
        ),
        (
            ANNOTATIONS,
            TRAIN_JSON,
            lambda t: t["images"].append(3),
            r"images\[6\]: found 3, expected an object",
        ),
        (
            ANNOTATIONS,
            TRAIN_JSON,
            lambda t: t["images"][0].update(file_name="COCO_train2014_000000000777.jpg"),
            r"dataset_coco\.json, images\[7\], field 'filename': found \"COCO.*expected an image of the COCO",
        ),
        (
            ANNOTATIONS,
            VAL_JSON,
            lambda t: t["annotations"][4].pop("caption"),
            r"annotations\[4\], field 'caption'",
        ),
        (
            ANNOTATIONS,
            VAL_JSON,
            lambda t: t["annotations"][0].update(caption=None),
            r"field 'caption': found null, expected a string",
        ),
        (
            ANNOTATIONS,
            VAL_JSON,
            lambda t: t["annotations"][1].update(image_id=5),
            r"annotations\[1\], field 'image_id': found 5, expected the id of one of the images",
        ),
        (
            ANNOTATIONS,
            VAL_JSON,
            lambda t: t["annotations"].append(t["annotations"][0]),
            r"annotations\[40\], field 'id': found 2174 a second time",
        ),
        (
            "caption_datasets.zip",
            "dataset_coco.json",
            lambda t: t["images"][3].update(split="dev"),
            r"dataset_coco\.json, images\[3\], field 'split': found \"dev\", expected one of train, restval",
        ),
        (
            "caption_datasets.zip",
            "dataset_coco.json",
            lambda t: t["images"][0].update(filename="other.jpg"),
            r"images\[0\], field 'filename': found \"other\.jpg\", expected an image of the COCO annotations",
        ),
    ],
)
def test_the_error_of_a_bad_record_names_it(zips, tmp_path, archive, member, change, message):
    rewrite(zips / archive, member, change)
    with pytest.raises(DataError, match=message):
        datasets.prepare("coco_captions", tmp_path, manual_dir=zips)
    assert not list(tmp_path.glob("coco_captions/*/*")), "an incomplete copy was left behind"


def test_the_error_of_a_damaged_zip_names_it(zips, tmp_path):
    whole = (zips / "train2014.zip").read_bytes()
    (zips / "train2014.zip").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(DataError, match=r"train2014\.zip: not a complete zip file"):
        datasets.prepare("coco_captions", tmp_path, manual_dir=zips)
    at = whole.index(jpeg_of(0)) + 300
    (zips / "train2014.zip").write_bytes(whole[:at] + bytes([whole[at] ^ 255]) + whole[at + 1 :])
    with pytest.raises(DataError, match=r"train2014\.zip/train2014/COCO.*0009\.jpg: damaged \(Bad CRC"):
        datasets.prepare("coco_captions", tmp_path, manual_dir=zips)
    (zips / "caption_datasets.zip").unlink()
    (zips / "dataset_coco.json").write_text("{")
    (zips / "train2014.zip").write_bytes(whole)
    with pytest.raises(DataError, match=r"dataset_coco\.json: not JSON"):
        datasets.prepare("coco_captions", tmp_path, manual_dir=zips)
    with zipfile.ZipFile(zips / ANNOTATIONS, "w") as archive:
        archive.writestr("annotations/instances_val2014.json", "{}")
    with pytest.raises(DataError, match=r"annotations.*: found no annotations/captions_train2014\.json in it"):
        datasets.prepare("coco_captions", tmp_path, manual_dir=zips)


def test_empty_captions_are_dropped_and_images_without_another_caption_too(zips, tmp_path):
    def blank(tree):
        for record in tree["annotations"]:
            if record["id"] == 10 * id_of(0):
                record["caption"] = " \n"
            if record["image_id"] == id_of(1):
                record["caption"] = ""

    rewrite(zips / ANNOTATIONS, TRAIN_JSON, blank)
    builder = datasets.prepare("coco_captions", tmp_path, manual_dir=zips)
    found = {example.image_id: example.captions for example in Examples(builder, "train")}
    assert found[id_of(0)] == tuple(captions_of(0)[1:])
    assert id_of(1) not in found
    assert len(found) == 5
