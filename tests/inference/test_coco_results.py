"""Anyone's captions against a split: the scores, and a file that is not what it should be is named."""

import json

import pytest

from flaxcap.features.shards import Row
from flaxcap.inference import coco_results
from flaxcap.inference.coco_results import PredictionsError
from flaxcap.metrics import scorer

ROWS = [
    Row(7, "a.jpg", ("a dog runs on grass", "the dog is running")),
    Row(3, "b.jpg", ("a red bus in a street", "a bus stands in the street")),
    Row(5, "c.jpg", ("two girls eat ice cream", "girls with ice cream")),
    Row(9, "d.jpg", ("a man climbs a rock", "a climber on a steep rock")),
]
TEXTS = ["a dog on grass", "a bus in a street", "two girls with ice cream", "a man on a rock"]
WORDS = sorted({word for row in ROWS for text in row.captions for word in text.split()})


def test_scores_are_those_of_the_metrics_and_swapped_captions_are_worth_less():
    found, missing = coco_results.score(
        ROWS, TEXTS, WORDS, is_true=lambda image_id, text: (image_id == 7) == ("dog" in text)
    )
    expected = scorer.score(TEXTS, [row.captions for row in ROWS])
    assert found.items() >= expected.items()
    assert found["CIDEr_swapped"] < 0.1 * found["CIDEr"]
    assert (found["true"], found["true_swapped"]) == (1.0, 0.5)
    assert found["health/unique"] == 1.0
    assert found["health/function_word_end"] == 0.0
    # What is not in the scores is told with a reason: nothing is zero for want of a program.
    assert {"METEOR", "SPICE"} == set(missing) | ({"METEOR", "SPICE"} & set(found))
    assert not set(missing) & set(found)


def test_a_file_comes_back_in_the_order_of_the_images(tmp_path):
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
        ([{"image_id": 7, "caption": "a dog"}] * 2, "record 1: image_id 7 has a caption already"),
        ([{"image_id": 8, "caption": "a dog"}], "record 0: image_id 8 is not in the split"),
        ([{"image_id": 7, "caption": "a dog"}], "no caption for 3 of the split's 4 images, the first is 3"),
        ([], "no caption for 4"),
    ],
)
def test_a_bad_file_is_named(tmp_path, records, message):
    file = tmp_path / "predictions.json"
    file.write_text(records if isinstance(records, str) else json.dumps(records))
    with pytest.raises(PredictionsError, match=message) as error:
        coco_results.read(file, ROWS)
    assert str(file) in str(error.value)


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(PredictionsError, match=r"--predictions=.*nothere\.json: cannot be read"):
        coco_results.read(tmp_path / "nothere.json", ROWS)
