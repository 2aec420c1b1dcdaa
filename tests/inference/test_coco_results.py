"""Files in COCO's results format: written, read, and refused."""

import json

import pytest
from tiny_store import tiny_config, write_store

from flaxcap import presets
from flaxcap.commands.main import main
from flaxcap.features.shards import Row
from flaxcap.inference import coco_results
from flaxcap.inference.coco_results import PredictionsError
from flaxcap.metrics import scorer

pytestmark = pytest.mark.usefixtures("without_java")

ROWS = [
    Row(7, "a.jpg", ("a dog runs on grass", "the dog is running")),
    Row(3, "b.jpg", ("a red bus in a street", "a bus stands in the street")),
    Row(5, "c.jpg", ("two girls eat ice cream", "girls with ice cream")),
    Row(9, "d.jpg", ("a man climbs a rock", "a climber on a steep rock")),
]
TEXTS = ["a dog on grass", "a bus in a street", "two girls with ice cream", "a man on a rock"]


def test_captions_are_read_in_the_order_of_the_images(tmp_path):
    file = tmp_path / "predictions.json"
    file.write_text(coco_results.to_json(ROWS, TEXTS))
    records = json.loads(file.read_text())
    assert records[1] == {"image_id": 3, "caption": "a bus in a street"}
    file.write_text(json.dumps(records[::-1]))
    assert coco_results.read(file, ROWS) == (ROWS, TEXTS)


@pytest.mark.parametrize(
    ("records", "message"),
    [
        ("{", "not JSON"),
        ("[" * 100_000, "not JSON"),
        ({}, "found dict, expected a list"),
        ([{"image_id": 7}], "record 0: found .*expected an object with image_id and caption"),
        ([["image_id", "caption"]], "record 0: found"),
        ([{"image_id": "a7", "caption": "a dog"}], "record 0: found 'a7' and 'a dog', expected a number and a string"),
        ([{"image_id": "", "caption": "a dog"}], "record 0: found '' and 'a dog'"),
        ([{"image_id": "-7", "caption": "a dog"}], "record 0: found '-7' and"),
        ([{"image_id": "\u0667", "caption": "a dog"}], "record 0: found '\u0667' and"),
        ([{"image_id": 7.0, "caption": "a dog"}], "record 0: found 7.0 and"),
        ([{"image_id": "8", "caption": "a dog"}], "record 0: found image_id 8, expected an image of the split"),
        (
            [{"image_id": 7, "caption": "a dog"}, {"image_id": "007", "caption": "a dog"}],
            "record 1: found a second caption for image_id 7",
        ),
        ([{"image_id": True, "caption": "a dog"}], "record 0: found True"),
        ([{"image_id": 7, "caption": None}], "record 0: found 7 and None"),
        ([{"image_id": 7, "caption": "a dog"}] * 2, "record 1: found a second caption for image_id 7"),
        ([{"image_id": 8, "caption": "a dog"}], "record 0: found image_id 8, expected an image of the split"),
        (
            [{"image_id": 7, "caption": "a dog"}],
            "no caption for 3 of the split's 4 images, expected one for each; the first is image_id 3; --subset scores",
        ),
        ([], "no caption for 4"),
    ],
)
def test_the_error_of_a_bad_file_names_it(tmp_path, records, message):
    file = tmp_path / "predictions.json"
    file.write_text(records if isinstance(records, str) else json.dumps(records))
    with pytest.raises(PredictionsError, match=message) as error:
        coco_results.read(file, ROWS)
    assert str(file) in str(error.value)


def test_the_error_of_a_missing_file_names_it(tmp_path):
    with pytest.raises(PredictionsError, match=r"--predictions=.*nothere\.json: cannot be read"):
        coco_results.read(tmp_path / "nothere.json", ROWS)


def test_ids_may_be_strings_of_digits(tmp_path):
    """COCO's file names pad them with zeros."""
    file = tmp_path / "predictions.json"
    ids = ["000000000007", "3", 5, "09"]
    records = [{"image_id": n, "caption": text} for n, text in zip(ids, TEXTS, strict=True)]
    file.write_text(json.dumps(records))
    assert coco_results.read(file, ROWS) == (ROWS, TEXTS)


def test_a_subset_is_the_named_images_in_the_order_of_the_split(tmp_path):
    file = tmp_path / "predictions.json"
    file.write_text(json.dumps([{"image_id": "5", "caption": "ice"}, {"image_id": 7, "caption": "a dog"}]))
    assert coco_results.read(file, ROWS, subset=True) == ([ROWS[0], ROWS[2]], ["a dog", "ice"])
    for content, message in (
        ("[]", "found no caption, expected one at least"),
        ('[{"image_id": 8, "caption": ""}]', "8"),
    ):
        file.write_text(content)
        with pytest.raises(PredictionsError, match=message):
            coco_results.read(file, ROWS, subset=True)


def test_a_subset_is_scored_with_its_own_references(tmp_path, capsys):
    """The CIDEr is that of the images alone: the split's other references do not count."""
    config = tiny_config()
    rows = write_store(tmp_path / "data", config).split("test").rows
    (tmp_path / "p.json").write_text(json.dumps([{"image_id": f"{n:012}", "caption": "a dog runs"} for n in (5, 1, 2)]))
    preset = tmp_path / "preset.json"
    preset.write_text(presets.to_json(config))
    command = ["evaluate", f"--predictions={tmp_path / 'p.json'}", f"--config={preset}", "--split=test"]
    command += [f"--data_dir={tmp_path / 'data'}", f"--out_dir={tmp_path / 'out'}"]
    assert main(command) == 1
    assert "no caption for 4 of the split's 7 images" in capsys.readouterr().err
    assert main([*command, "--subset"]) == 0
    assert "\n3 of 7 images\n" in capsys.readouterr().out
    report = json.loads((tmp_path / "out" / "scores.json").read_text())
    assert (report["images"], report["split_images"]) == (3, 7)
    expected = scorer.score(["a dog runs"] * 3, [rows[n].captions for n in (1, 2, 5)])
    assert {name: report["scores"][name] for name in expected} == pytest.approx(expected)
    written = json.loads((tmp_path / "out" / "predictions.json").read_text())
    assert [record["image_id"] for record in written] == [1, 2, 5]


def test_subset_needs_predictions(capsys):
    assert main(["evaluate", "--subset", "--workdir=run", "--config=experiments/shapes.py"]) == 1
    assert "--subset scores a part of a split: give it with --predictions=FILE" in capsys.readouterr().err
