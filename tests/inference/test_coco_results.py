"""Files in COCO's results format: written, read, and refused."""

import json

import pytest

from flaxcap.features.shards import Row
from flaxcap.inference import coco_results
from flaxcap.inference.coco_results import PredictionsError

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
    assert coco_results.read(file, ROWS) == TEXTS


@pytest.mark.parametrize(
    ("records", "message"),
    [
        ("{", "not JSON"),
        ("[" * 100_000, "not JSON"),
        ({}, "found dict, expected a list"),
        ([{"image_id": 7}], "record 0: found .*expected an object with image_id and caption"),
        ([["image_id", "caption"]], "record 0: found"),
        ([{"image_id": "7", "caption": "a dog"}], "record 0: found '7' and 'a dog', expected a number and a string"),
        ([{"image_id": True, "caption": "a dog"}], "record 0: found True"),
        ([{"image_id": 7, "caption": None}], "record 0: found 7 and None"),
        ([{"image_id": 7, "caption": "a dog"}] * 2, "record 1: found a second caption for image_id 7"),
        ([{"image_id": 8, "caption": "a dog"}], "record 0: found image_id 8, expected an image of the split"),
        (
            [{"image_id": 7, "caption": "a dog"}],
            "no caption for 3 of the split's 4 images, expected one for each; the first is image_id 3",
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
