"""A store's manifest, captions and vocabulary: missing and damaged files are named."""

import json

import pytest
from etils import epath
from hypothesis import given
from hypothesis import strategies as st

from flaxcap.config import Config
from flaxcap.features import store
from flaxcap.features.shards import WRITTEN_ONCE, Row, Split, StoreError, write_rows
from flaxcap.features.store import Store
from flaxcap.files import integrity
from flaxcap.text.vocabulary import Vocabulary, VocabularyError

VOCABULARY = Vocabulary.of_captions(["a dog “runs” in São Paulo 犬"], 10)
TRAIN = [
    Row(2**40, "a/0.jpg", ("A dog.", "runs")),
    Row(7, "ü\u2028\x85.png", ("“in”", "\ud800", "São\nPaulo")),
    Row(0, "", ()),
]
FILES = ["vocabulary.json", *(f"{role}/{name}" for role in ("train", "val") for name in WRITTEN_ONCE)]


def make(path: epath.Path, config: Config) -> epath.Path:
    """Writes a finished store without features."""
    for role, rows in (("train", TRAIN), ("val", TRAIN[:1])):
        write_rows(path / role, rows)
        split = Split(path / role, len(rows), 2)
        split.create_array(5, 4, "bfloat16")
        for number in range(split.num_shards):
            split.mark_finished(number, [])
    integrity.write_atomically(path / "vocabulary.json", VOCABULARY.to_json())
    manifest = {
        "source": "made up",
        "fingerprint": "",
        "splits": {"train": {"split": "train", "images": 3}, "val": {"split": "val", "images": 1}},
        "encoder": {"weights_sha256": "abc"},
        "positions": 5,
        "feature_dim": 4,
        "positions_vary": False,
        "shard_rows": 2,
        "vocabulary": {
            "size": config.data.vocab_size,
            "tokenizer": config.data.tokenizer,
            "words": len(VOCABULARY),
            "sha256": VOCABULARY.hash,
        },
        "files": integrity.checksums_to_json({name: integrity.Checksum.of_file(path / name) for name in FILES}),
    }
    write_manifest(path, manifest)
    return path


def write_manifest(path: epath.Path, manifest: dict) -> None:
    """Writes any manifest with a correct checksum. There is no copy."""
    (path / "manifest.json").write_text(integrity.seal(manifest, indent=2))


@pytest.fixture
def path(tmp_path) -> epath.Path:
    return make(store.path_for(tmp_path, Config()), Config())


def test_a_finished_store_is_read(path, tmp_path):
    found = Store.finished(tmp_path, Config())
    assert found.path == path
    assert found.roles == ("train", "val")
    assert (found.positions, found.feature_dim, found.positions_vary) == (5, 4, False)
    assert found.vocabulary().tokens == VOCABULARY.tokens
    assert found.split("train").rows == TRAIN
    assert found.split("val").rows == TRAIN[:1]
    with pytest.raises(StoreError, match=r"found no split 'test', expected one of train, val$"):
        found.split("test")


def test_an_unfinished_store_is_refused_with_a_remedy(path, tmp_path):
    with pytest.raises(StoreError, match=rf"no prepared features at {tmp_path}/x/.*`flaxcap prepare` computes them"):
        Store.finished(tmp_path / "x", Config())
    (path / "train" / "shards" / "00001.json").unlink()
    with pytest.raises(StoreError, match=r"1 shards of split 'train' are not finished; run `flaxcap prepare`"):
        Store.finished(tmp_path, Config())
    assert Store(path).split("train").unfinished() == [1]
    make(path, Config())
    other = Config()
    other.data.vocab_size = 7
    with pytest.raises(StoreError, match=r"vocabulary made with --config\.data\.vocab_size=5000, expected 7; run"):
        Store.finished(tmp_path, other)


MANIFEST = [
    "source",
    "fingerprint",
    "splits",
    "encoder",
    "positions",
    "feature_dim",
    "shard_rows",
    "vocabulary",
    "files",
]


@pytest.mark.parametrize(
    "damage",
    [
        *({"drop": name} for name in [*MANIFEST, "positions_vary"]),
        {"positions": 0},
        {"positions": "many"},
        *({name: None} for name in MANIFEST[2:]),
        {"text": ""},
        {"text": '{"source": '},
        {"text": "[]"},
        {"text": "null"},
        {"text": "[" * 100_000},
        {"text": "\0"},
        {"feature_dim": "wide"},
        {"feature_dim": 0},
        {"shard_rows": 0},
        {"shard_rows": -2},
        {"splits": ["train"]},
        {"splits": {"train": {}}},
        {"splits": {"train": {"images": "many"}}},
        {"splits": {"train": {"images": 0}}},
        {"vocabulary": {"size": 5000}},
        {"encoder": {}},
        *({"unlisted": name} for name in FILES),
        {"text": '{"source": "without a checksum"}'},
    ],
    ids=lambda damage: json.dumps(damage)[:40],
)
def test_a_broken_manifest_is_named(path, tmp_path, damage):
    file = path / "manifest.json"
    tree = json.loads(file.read_text())
    if "drop" in damage:
        del tree[damage["drop"]]
    if "unlisted" in damage:
        del tree["files"][damage["unlisted"]]
    write_manifest(path, tree | damage)
    if "text" in damage:
        file.write_text(damage["text"])
    with pytest.raises(
        StoreError, match=rf"^{file}: not a manifest of features .*; delete {path}, then `flaxcap prepare`"
    ):
        Store.finished(tmp_path, Config())


def test_a_manifest_that_is_not_text_is_named(path):
    (path / "manifest.json").write_bytes(b"\xff\xfe")
    with pytest.raises(StoreError, match=r"manifest\.json: not a manifest of features"):
        Store(path)


@pytest.mark.parametrize("change", [lambda lines: lines[:-1], lambda lines: [*lines, lines[0]], lambda lines: []])
def test_a_wrong_number_of_captions_lines_is_named(path, change):
    file = path / "train" / "captions.jsonl"
    lines = file.read_text().splitlines(keepends=True)
    file.write_text("".join(change(lines)))
    with pytest.raises(StoreError, match=rf"^{file}: found {len(change(lines))} images, expected 3$"):
        _ = Split(file.parent, 3, 2).rows
    with pytest.raises(StoreError, match=rf"^{file}: damaged"):
        _ = Store(path).split("train").rows


@pytest.mark.parametrize(
    "line",
    ["", "{", "[]", "7", '{"id": 1, "file": "x"}', '{"id": 1, "file": "x", "captions": null}', "[" * 100_000, "\0"],
)
def test_a_damaged_captions_line_is_named(path, line):
    file = path / "train" / "captions.jsonl"
    file.write_text("".join([*file.read_text().splitlines(keepends=True)[:2], line + "\n"]))
    with pytest.raises(StoreError, match=rf"^{file}: line 3 cannot be read"):
        _ = Split(file.parent, 3, 2).rows


def test_unreadable_and_missing_captions_are_named(path):
    file = path / "train" / "captions.jsonl"
    file.write_bytes(b"\xff")
    with pytest.raises(StoreError, match=rf"^{file}: cannot be read"):
        _ = Split(file.parent, 3, 2).rows
    file.unlink()
    with pytest.raises(StoreError, match=rf"^{file}: cannot be read \(.*No such file"):
        _ = Store(path).split("train").rows


@pytest.mark.parametrize(
    "text",
    [
        *("", "{}", "[]", "[" * 100_000, '{"skipped": [], "file": null}'),
        *map(integrity.seal, ({}, {"skipped": []}, {"skipped": 3, "file": None})),
        integrity.seal({"skipped": [{"row": 1}], "file": None}),
        integrity.seal({"skipped": [], "file": {"size": 3}}),
    ],
)
def test_a_damaged_record_of_a_shard_is_named(path, text):
    file = path / "train" / "shards" / "00001.json"
    file.write_text(text)
    with pytest.raises(StoreError, match=rf"^{file}: cannot be read .*; `flaxcap prepare` computes this shard again"):
        Store(path).split("train").skipped()


def test_a_vocabulary_that_the_manifest_does_not_name_is_refused(path, tmp_path):
    # A prepare that is killed between the two files leaves this.
    file = path / "vocabulary.json"
    file.write_text(Vocabulary.of_captions(["a dog"], 10).to_json())
    with pytest.raises(
        StoreError, match=rf"^{file}: found another vocabulary than the manifest names; `flaxcap prepare`"
    ):
        Store.finished(tmp_path, Config()).vocabulary()
    file.write_text(file.read_text().replace("dog", "cat"))
    with pytest.raises(VocabularyError, match=rf"^{file}: not a vocabulary: the words do not match"):
        Store(path).vocabulary()
    file.write_bytes(b"\xff")
    with pytest.raises(StoreError, match=rf"^{file}: cannot be read .*`flaxcap prepare` writes it again"):
        Store(path).vocabulary()
    file.unlink()
    with pytest.raises(StoreError, match=rf"^{file}: cannot be read"):
        Store(path).vocabulary()


@given(st.lists(st.builds(Row, st.integers(), st.text(), st.lists(st.text()).map(tuple)), min_size=1, max_size=5))
def test_captions_are_read_as_they_were_written(tmp_path_factory, rows):
    path = epath.Path(tmp_path_factory.mktemp("rows"))
    write_rows(path, rows)
    assert Split(path, len(rows), 10).rows == rows
