"""The scores of a split's captions."""

from flaxcap.features.shards import Row
from flaxcap.metrics import scorer
from flaxcap.metrics.split_scores import score_split
from flaxcap.text.vocabulary import Vocabulary

ROWS = [
    Row(7, "a.jpg", ("a dog runs on grass", "the dog is running")),
    Row(3, "b.jpg", ("a red bus in a street", "a bus stands in the street")),
    Row(5, "c.jpg", ("two girls eat ice cream", "girls with ice cream")),
    Row(9, "d.jpg", ("a man climbs a rock", "a climber on a steep rock")),
]
TEXTS = ["a dog on grass", "a bus in a street", "two girls with ice cream", "a man on a rock"]
WORDS = Vocabulary.of_captions([text for row in ROWS for text in row.captions], 1000)


def test_scores_are_those_of_the_metrics_and_swapped_captions_score_lower():
    found, missing, unit = score_split(
        ROWS, TEXTS, WORDS, is_true=lambda image_id, text: (image_id == 7) == ("dog" in text)
    )
    expected = scorer.score(TEXTS, [row.captions for row in ROWS])
    assert unit == "words"
    assert found.items() >= expected.items()
    assert found["CIDEr_swapped"] < 0.1 * found["CIDEr"]
    assert (found["true"], found["true_swapped"]) == (1.0, 0.5)
    assert found["health/unique"] == 1.0
    assert found["health/function_word_end"] == 0.0
    # METEOR and SPICE have either a score or a reason.
    assert {"METEOR", "SPICE"} == set(missing) | ({"METEOR", "SPICE"} & set(found))
    assert not set(missing) & set(found)


def test_the_truth_is_not_scored_where_it_is_unknown():
    found = score_split(ROWS, TEXTS, WORDS).values
    assert not {"true", "true_swapped"} & set(found)
