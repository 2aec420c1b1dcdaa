"""Data sets by name, the builders' base class, and access to prepared examples."""

import concurrent.futures
import pathlib
import resource
import sys
import tracemalloc
import types

import numpy as np
import pytest
import tensorflow_datasets as tfds

from flaxcap.config import Config, Data, Shapes
from flaxcap.data import base, datasets
from flaxcap.data.base import DataError, Example, Examples


class Tiny(base.CaptionBuilder):
    """A data set of the test's own examples, {split: examples}."""

    VERSION = tfds.core.Version("1.0.0")

    def __init__(self, splits: dict, **kwargs):
        self.splits = splits
        super().__init__(**kwargs)

    def _split_generators(self, dl_manager):
        return {split: self._generate_examples(examples) for split, examples in self.splits.items()}

    def _generate_examples(self, examples):
        for example in examples:
            yield record(example)


def record(example: Example) -> tuple[int, dict]:
    return base.example(example.image, example.image_id, example.filename, enumerate(example.captions))


def examples(count: int, first: int = 0) -> list[Example]:
    # Descending, because TFDS and file systems sort in ascending order.
    ids = range(first + count - 1, first - 1, -1)
    return [Example(b"%d" % i * 200, i, f"{i}.jpg", ("one", f"number {i}")) for i in ids]


def prepared(directory: pathlib.Path, **splits) -> tfds.core.DatasetBuilder:
    builder = Tiny(splits, data_dir=directory)
    builder.download_and_prepare(file_format="array_record")
    return builder


@pytest.fixture(scope="module")
def builder(tmp_path_factory) -> tfds.core.DatasetBuilder:
    return prepared(tmp_path_factory.mktemp("tiny"), train=examples(5), val=examples(3, 10), none=[])


def test_examples_are_read_back_unchanged_and_in_order(builder):
    assert list(Examples(builder, "train")) == examples(5)
    assert list(Examples(builder, "val")) == examples(3, 10)


@pytest.mark.parametrize(
    ("split", "ids"),
    [
        ("val", [12, 11, 10]),
        ("train+val", [4, 3, 2, 1, 0, 12, 11, 10]),
        ("val+train", [12, 11, 10, 4, 3, 2, 1, 0]),
        ("train[:2]", [4, 3]),
        ("train[60%:]", [1, 0]),
        ("train[3:]+val[:1]", [1, 0, 12]),
    ],
)
def test_splits_in_tfds_notation(builder, split, ids):
    found = Examples(builder, split)
    assert len(found) == len(ids)
    assert [example.image_id for example in found] == ids
    assert [found[k].image_id for k in range(-len(ids), 0)] == ids


@pytest.mark.parametrize("split", ["test", "none", "train+dev", "train[:100]", "train[:0]", "train[3:1]", "train[", ""])
def test_the_error_of_an_unknown_split_lists_the_existing_ones(builder, split):
    with pytest.raises(DataError, match=r"train \(5 images\), val \(3 images\)\.$") as error:
        Examples(builder, split)
    assert repr(split) in str(error.value)


def test_the_examples_of_a_role_are_those_of_the_presets_split(builder):
    config = Config(data=Data(train_split="train[:2]", val_split="train[3:]+val[:1]", test_split=""))
    assert [example.image_id for example in datasets.examples_of(config, builder, "val")] == [1, 0, 12]
    with pytest.raises(DataError, match=r"^--split=test: expected one of train, val$"):
        datasets.examples_of(config, builder, "test")


def test_indices_out_of_range_raise(builder):
    found = Examples(builder, "train")
    for index in (5, -6):
        with pytest.raises(IndexError):
            found[index]
    with pytest.raises(TypeError):
        found[1:2]


def test_bytes_and_captions_are_stored_unchanged(tmp_path):
    images = [b"", b"\0", b"\xff\xd8 not a JPEG", b"trailing\0\0\0", bytes(range(256)) * 300]
    given = [Example(image, k, f"bïld {k}\0.png", ("Ein Café…", "", " \n", "x\0")) for k, image in enumerate(images)]
    given.append(Example(b"no caption", 2**62, "", ()))
    assert list(Examples(prepared(tmp_path, train=given), "train")) == given


def test_threads_read_a_split_of_many_shards(tmp_path, monkeypatch):
    monkeypatch.setattr(base, "SHARD_BYTES", 2000)
    given = examples(100)
    builder = prepared(tmp_path, train=given)
    shards = sorted(path.name for path in pathlib.Path(builder.data_dir).glob("*array_record*"))
    assert len(shards) > 10
    assert shards[0] == f"tiny-train.array_record-00000-of-{len(shards):05d}"
    found = Examples(builder, "train")
    order = np.random.default_rng(0).integers(0, 100, 500).tolist()
    with concurrent.futures.ThreadPoolExecutor(8) as pool:
        assert list(pool.map(found.__getitem__, order)) == [given[k] for k in order]


def test_memory_does_not_grow_with_the_split(tmp_path):
    size, count = 1 << 20, 48

    def large_examples():
        for k in range(count):
            yield Example(bytes(size), k, "", ("text",))

    tracemalloc.start()
    try:
        builder = prepared(tmp_path, train=large_examples())
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert len(Examples(builder, "train")) == count
    assert peak < count * size / 4, f"{peak >> 20} MiB in memory while writing {count * size >> 20} MiB"


def test_a_full_disk_raises_and_leaves_nothing(tmp_path):
    big = [Example(bytes(1 << 20), 0, "", ("text",))]
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 18, before[1]))
    try:
        with pytest.raises(DataError, match=r"train.*cannot be written: .*too large"):
            prepared(tmp_path, train=big)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert not list(tmp_path.rglob("*1.0.0*"))


def test_repeated_keys_and_empty_data_sets_are_refused(tmp_path):
    with pytest.raises(DataError, match=r"split 'val': found two examples with the key 3"):
        prepared(tmp_path, train=examples(1), val=examples(1, 3) * 2)
    with pytest.raises(DataError, match="no image with a caption"):
        prepared(tmp_path, train=[])
    assert not list(tmp_path.rglob("*1.0.0*"))


def test_each_variant_has_its_own_copy(tmp_path):
    for variant, count in (("a", 1), ("b", 2)):
        builder = Tiny({"train": examples(count)}, data_dir=tmp_path, variant=variant)
        assert not list(builder.info.splits)
        builder.download_and_prepare(file_format="array_record")
    assert len(Examples(Tiny({}, data_dir=tmp_path, variant="a"), "train")) == 1
    assert len(Examples(Tiny({}, data_dir=tmp_path, variant="b"), "train")) == 2


@pytest.mark.parametrize("damage", ["truncated", "overwritten", "missing"])
def test_the_error_of_a_damaged_copy_names_it(tmp_path, damage):
    builder = prepared(tmp_path, train=[Example(bytes(1 << 18), k, "", ("text",)) for k in range(4)])
    (shard,) = pathlib.Path(builder.data_dir).glob("*array_record*")
    if damage == "missing":
        shard.unlink()
    else:
        whole = shard.read_bytes()
        middle = len(whole) // 2
        shard.write_bytes(whole[:middle] + (b"?" * middle if damage == "overwritten" else b""))
    with pytest.raises(DataError, match=r"tiny.1\.0\.0, split 'train', record \d.*\n.*delete it"):
        list(Examples(builder, "train"))


def test_the_error_of_an_unknown_data_set_names_the_nearest():
    for call in (lambda: datasets.prepare("coco", "unused"), lambda: datasets.caption_truth(Config(dataset="coco"))):
        with pytest.raises(
            DataError, match=r"'coco': expected one of coco_captions, flickr8k, folder, shapes; .*'coco_"
        ):
            call()
    assert datasets.NAMES == ("coco_captions", "flickr8k", "folder", "shapes")


@pytest.mark.parametrize("name", datasets.NAMES)
def test_a_data_set_is_stored_under_its_own_name(name):
    assert datasets._builder_class(name).name == name


def test_files_of_the_user_are_not_overwritten(tmp_path):
    mine = tmp_path / "coco_captions" / "2014-captions" / "1.0.0" / "mine.txt"
    mine.parent.mkdir(parents=True)
    mine.write_text("keep")
    with pytest.raises(DataError, match=r"1\.0\.0: found files that are not a prepared data set"):
        datasets.prepare("coco_captions", tmp_path)
    assert mine.read_text() == "keep"


def test_the_truth_of_captions_is_known_for_shapes_only(monkeypatch):
    shapes = types.ModuleType("flaxcap.data.shapes")
    vars(shapes).update(ShapesBuilder=Tiny, is_true=lambda image_id, caption, seed=0: caption == f"{image_id} {seed}")
    monkeypatch.setitem(sys.modules, shapes.__name__, shapes)
    assert datasets.caption_truth(Config(dataset="folder")) is None
    for seed in (0, 3):
        is_true = datasets.caption_truth(Config(dataset="shapes", data=Data(shapes=Shapes(seed=seed))))
        assert is_true is not None
        assert is_true(7, f"7 {seed}")
        assert not is_true(8, f"7 {seed}")


class CocoCaptions(tfds.core.GeneratorBasedBuilder, skip_registration=True):
    """TFDS's own coco_captions, with its feature `objects`, written by TFDS's own writer."""

    VERSION = tfds.core.Version("1.1.0")
    BUILDER_CONFIGS = [tfds.core.BuilderConfig(name="2014")]  # noqa: RUF012

    def _info(self):
        objects = {
            "id": np.int64,
            "area": np.int64,
            "bbox": tfds.features.BBoxFeature(),
            "label": tfds.features.ClassLabel(num_classes=80),
            "is_crowd": np.bool_,
        }
        return tfds.core.DatasetInfo(
            builder=self,
            features=tfds.features.FeaturesDict(
                {
                    "image": tfds.features.Image(encoding_format="jpeg"),
                    "image/filename": tfds.features.Text(),
                    "image/id": np.int64,
                    "objects": tfds.features.Sequence(objects),
                    "captions": tfds.features.Sequence({"text": np.str_, "id": np.int64}),
                }
            ),
        )

    def _split_generators(self, dl_manager):
        return {
            "train": self._generate_examples(examples(4)),
            "restval": self._generate_examples(examples(2, 50)),
        }

    def _generate_examples(self, given):
        box = tfds.features.BBox(ymin=0.0, xmin=0.1, ymax=0.5, xmax=1.0)
        thing = {"id": 1, "area": 2, "bbox": box, "label": 3, "is_crowd": False}
        for number, example in enumerate(given):
            key, fields = record(example)
            yield key, fields | {"objects": [thing] * number}


def test_a_coco_copy_of_tfds_is_used(tmp_path):
    stock = CocoCaptions(data_dir=tmp_path)
    stock.download_and_prepare(file_format="array_record")
    builder = datasets.prepare("coco_captions", tmp_path)
    assert builder.data_dir == str(tmp_path / "coco_captions" / "2014" / "1.1.0")
    found = Examples(builder, "train+restval")
    assert sorted(found) == sorted(examples(4) + examples(2, 50))
    with pytest.raises(DataError, match=r"train \(4 images\), restval \(2 images\)"):
        Examples(builder, "test")


def test_a_coco_copy_of_tfds_as_tfrecord_is_not_used(tmp_path):
    stock = CocoCaptions(data_dir=tmp_path)
    stock.download_and_prepare(file_format="array_record")
    info = pathlib.Path(stock.data_dir) / "dataset_info.json"
    info.write_text(info.read_text().replace('"array_record"', '"tfrecord"'))
    with pytest.raises(DataError, match=r"train2014\.zip: cannot be downloaded"):
        datasets.prepare("coco_captions", tmp_path, base_url="http://127.0.0.1:9")


def test_neither_tensorflow_nor_torch_is_imported():
    assert "tensorflow" not in sys.modules
    assert "torch" not in sys.modules


def test_with_a_remote_data_dir_the_data_set_is_prepared_in_the_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    config = Config(dataset="shapes", data=Data(shapes=Shapes(num_train=2, num_val=1, num_test=1)))
    builder = datasets.prepare_for(config, "gs://bucket/data")
    assert len(Examples(builder, "train")) == 2
    assert (tmp_path / "flaxcap" / "shapes").is_dir()
