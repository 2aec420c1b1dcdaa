"""BLEU, ROUGE-L and CIDEr: equal to pycocoevalcap's and to their formulas, and with the expected properties."""

import collections
import math
import random
import subprocess
import sys

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from flaxcap.errors import UserError
from flaxcap.metrics import scorer as scorer_lib
from flaxcap.metrics.ptb import tokenize
from flaxcap.metrics.rouge import rouge_l

# Written for this test.
REFERENCES = [
    ["A tabby cat naps on a warm radiator.", "The cat is asleep on the radiator", "a cat, sleeping, on a heater"],
    ["Two kids fly a red kite over the dunes.", "Children fly a kite at the beach.", "Kids' kite above a dune"],
    ["A cook isn't happy with his burnt pie", "The cook holds a burnt pie; he looks sad."],
    ["An old tram climbs a steep street", "A yellow tram on a hill.", "Tram no. 5 goes up the hill", "A tram, uphill"],
    ["A heron stands in shallow water", "A grey heron waits in the water by the reeds.", "a heron in a pond"],
    ["Someone repairs a bicycle in a workshop.", "A mechanic fixes the wheel of a bicycle", "bike repair"],
    ["Snow covers the roofs of the village.", "A village with snow on its roofs", "a a a snowy snowy village", ""],
    ["Three musicians play brass on a stage."],
]
CANDIDATES = [
    "a cat sleeping on a radiator",
    "Two kids fly a red kite over the dunes.",  # a reference
    "",
    "tram",
    "a heron heron heron in the the water",
    "an unknown zebra zebra repairs an unknown zebra",
    "a village with snow on its roofs and and snow on its roofs and snow",
    "Three musicians play",
]
NAMES = ["Bleu_1", "Bleu_2", "Bleu_3", "Bleu_4", "ROUGE_L", "CIDEr", "CIDEr_original"]


def by_pycocoevalcap(candidates, references) -> tuple[dict[str, float], dict[str, np.ndarray]]:
    def scorer(module: str, name: str):
        return getattr(pytest.importorskip(f"pycocoevalcap.{module}"), name)

    truth = {i: [" ".join(tokenize(caption)) for caption in some] for i, some in enumerate(references)}
    found = {i: [" ".join(tokenize(caption))] for i, caption in enumerate(candidates)}
    bleu, bleu_each = scorer("bleu.bleu", "Bleu")(4).compute_score(truth, found, verbose=0)
    corpus, each = dict(zip(NAMES, bleu, strict=False)), dict(zip(NAMES, map(np.array, bleu_each), strict=False))
    corpus["ROUGE_L"], each["ROUGE_L"] = scorer("rouge.rouge", "Rouge")().compute_score(truth, found)
    corpus["CIDEr"], each["CIDEr"] = scorer("cider.cider", "Cider")().compute_score(truth, found)
    return corpus, each


def assert_equal_to_pycocoevalcap(candidates, references):
    corpus, each = by_pycocoevalcap(candidates, references)
    found, found_each = scorer_lib.Scorer(references).score_each(candidates)
    assert list(found) == list(found_each) == NAMES
    for name in corpus:
        assert found[name] == pytest.approx(corpus[name], rel=1e-9, abs=1e-12), name
        np.testing.assert_allclose(found_each[name], each[name], rtol=1e-9, atol=1e-12, err_msg=name)


def test_equal_to_pycocoevalcap():
    assert_equal_to_pycocoevalcap(CANDIDATES, REFERENCES)
    assert_equal_to_pycocoevalcap(CANDIDATES[:1], REFERENCES[:1])


def test_equal_to_pycocoevalcap_on_flickr8k(flickr_dir):
    captions = collections.defaultdict(list)
    for line in (flickr_dir / "Flickr8k.token.txt").read_text(encoding="utf-8").splitlines():
        name, _, caption = line.partition("\t")
        captions[name.partition("#")[0]].append(caption)
    images = [some for some in captions.values() if len(some) == 5][:300]
    rng = random.Random(0)
    candidates, references = [], []
    for number, (first, *rest) in enumerate(images):
        words = first.split()
        other = images[(number + 1) % len(images)][0]
        changes = [
            first,
            "",
            words[0],
            rest[0],
            " ".join(rng.sample(words, len(words))),
            f"{first} qqq qqq {first}",
            other,
        ]
        candidates.append(changes[number % len(changes)])
        references.append(rest[: rng.randint(1, 4)] + [""] * (number % 11 == 0))
    assert_equal_to_pycocoevalcap(candidates, references)


def original_cider(candidate: str, number: int, references: list[list[str]]) -> float:
    """Returns CIDEr by equations 1 to 3 of arXiv:1411.5726."""

    def counts(caption: str, n: int) -> collections.Counter:
        words = tokenize(caption)
        return collections.Counter(tuple(words[i : i + n]) for i in range(len(words) - n + 1))

    total = 0.0
    for n in (1, 2, 3, 4):

        def vector(caption: str, n=n) -> dict:
            found = counts(caption, n)
            images = {gram: sum(any(gram in counts(c, n) for c in some) for some in references) for gram in found}
            return {
                gram: count / found.total() * math.log(len(references) / max(1, images[gram]))
                for gram, count in found.items()
            }

        g = vector(candidate)
        for reference in references[number]:
            h = vector(reference)
            length = math.hypot(*g.values()) * math.hypot(*h.values())
            dot = sum(weight * h.get(gram, 0) for gram, weight in g.items())
            total += dot / length / len(references[number]) / 4 if length else 0
    return total


def test_the_original_cider_is_the_papers_formula():
    _, each = scorer_lib.Scorer(REFERENCES).score_each(CANDIDATES)
    expected = [original_cider(caption, i, REFERENCES) for i, caption in enumerate(CANDIDATES)]
    np.testing.assert_allclose(each["CIDEr_original"], expected, rtol=1e-9, atol=1e-12)
    assert max(expected) > 0.3


def test_known_scores():
    # "the the the": one match, and 3 words for 4 in the reference.
    found = scorer_lib.score(["the the the"], [["the dog ran off", "a b c d e f g"]])
    assert found["Bleu_1"] == pytest.approx(1 / 3 * math.exp(1 - 4 / 3))
    assert found["Bleu_2"] == pytest.approx(0, abs=1e-6)
    # The common subsequence is "a c d": precision 3/4, recall 3/5.
    assert rouge_l(list("axcd"), [list("abcde")]) == pytest.approx(2.44 * 0.45 / (0.6 + 1.44 * 0.75))
    # Equal captions, of words that no other image has: the cosines are 1.
    found, each = scorer_lib.Scorer([["a b c d"], ["e f g h"]]).score_each(["a b c d", "e f g h"])
    assert found["CIDEr"] == pytest.approx(10)
    assert found["CIDEr_original"] == pytest.approx(1)
    # "c" occurs twice, in the reference once: its count is clipped, and the caption is one word too long.
    _, each = scorer_lib.Scorer([["a b c"], ["x y z"]]).score_each(["a b c c", "x"])
    grams = [4 / (math.sqrt(3 * 6)), 2 / math.sqrt(2 * 3), 1 / math.sqrt(1 * 2), 0]
    clipped = [3 / (math.sqrt(3 * 6)), *grams[1:]]
    assert each["CIDEr_original"][0] == pytest.approx(sum(grams) / 4)
    assert each["CIDEr"][0] == pytest.approx(10 * sum(clipped) / 4 * math.exp(-1 / 72))


words_ = st.lists(st.sampled_from(list("abcde")), max_size=8)
captions_ = words_.map(" ".join)
corpora_ = st.lists(st.tuples(captions_, st.lists(captions_, min_size=1, max_size=3)), min_size=1, max_size=5)


@given(corpora_)
@settings(max_examples=50)
def test_scores_of_random_captions_equal_those_of_pycocoevalcap(corpus):
    candidates, references = map(list, zip(*corpus, strict=True))
    assume(any(caption for some in references for caption in some))  # pycocoevalcap fails without a word
    assert_equal_to_pycocoevalcap(candidates, references)


@given(corpora_, st.randoms(use_true_random=False))
def test_the_order_of_images_and_references_does_not_matter(corpus, rng):
    candidates, references = zip(*corpus, strict=True)
    found, each = scorer_lib.Scorer(references).score_each(candidates)
    order = rng.sample(range(len(corpus)), len(corpus))
    shuffled = [rng.sample(references[i], len(references[i])) for i in order]
    again, each_again = scorer_lib.Scorer(shuffled).score_each([candidates[i] for i in order])
    for name in NAMES:
        assert again[name] == pytest.approx(found[name], rel=1e-9, abs=1e-12)
        np.testing.assert_allclose(each_again[name], each[name][order], rtol=1e-9, atol=1e-12)


@given(corpora_)
def test_the_corpus_score_is_the_mean_of_the_images_scores(corpus):
    candidates, references = zip(*corpus, strict=True)
    found, each = scorer_lib.Scorer(references).score_each(candidates)
    for name in NAMES:
        assert each[name].shape == (len(corpus),)
        assert (each[name] >= 0).all()
        assert (each[name] <= (10 if name == "CIDEr" else 1) + 1e-9).all()
        if not name.startswith("Bleu"):
            assert found[name] == pytest.approx(each[name].mean())


def common(a: list[str], b: list[str]) -> int:
    """Returns the length of the longest common subsequence, by its recursive definition."""
    if not a or not b:
        return 0
    if a[0] == b[0]:
        return 1 + common(a[1:], b[1:])
    return max(common(a[1:], b), common(a, b[1:]))


@given(words_, words_)
@settings(max_examples=50)
def test_rouge_uses_the_longest_common_subsequence(a, b):
    if not a or not b:
        return
    precision, recall = common(a, b) / len(a), common(a, b) / len(b)
    expected = 2.44 * precision * recall / (recall + 1.44 * precision) if precision else 0
    assert rouge_l(a, [b]) == pytest.approx(expected)


def test_a_reference_has_the_best_score():
    exact = [some[0] for some in REFERENCES]
    found, each = scorer_lib.Scorer(REFERENCES).score_each(exact)
    for name in ("Bleu_1", "Bleu_2", "Bleu_3", "Bleu_4", "ROUGE_L"):
        assert found[name] == pytest.approx(1)
        np.testing.assert_allclose(each[name], 1, rtol=1e-6)
    assert scorer_lib.score(exact[1:] + exact[:1], REFERENCES)["CIDEr"] < found["CIDEr"] / 10


def test_cider_of_several_captions_an_image():
    scorer = scorer_lib.Scorer(REFERENCES)
    _, each = scorer.score_each(CANDIDATES)
    np.testing.assert_array_equal(scorer.cider(CANDIDATES), each["CIDEr"])
    # Several captions of some images: the reward of a caption does not depend on the others.
    images = [4, 4, 0, 4, 6, 6]
    captions = [CANDIDATES[4], "a heron in a pond", CANDIDATES[0], "", CANDIDATES[6], "an unknown word"]
    rewards = scorer.cider(captions, images)
    alone = [scorer.cider([caption], np.array([image]))[0] for caption, image in zip(captions, images, strict=True)]
    np.testing.assert_allclose(rewards, alone, rtol=1e-12)
    assert rewards[0] == pytest.approx(each["CIDEr"][4])
    assert rewards[1] > rewards[0] > rewards[3] == rewards[5] == 0
    assert scorer.cider([], []).shape == (0,)


@pytest.mark.parametrize(
    ("candidates", "references", "reason"),
    [
        ([], [], "found none, expected at least one for each image"),
        (["a"], [["a"], []], "image 1, counted from 0: found no reference"),
        (["a"], [["a"], ["b"]], "found 1, expected one for each of 2 images"),
        (["a", "b", "c"], [["a"], ["b"]], "found 3, expected one for each of 2 images"),
    ],
)
def test_mismatched_captions_and_references_are_refused(candidates, references, reason):
    with pytest.raises(UserError, match=reason):
        scorer_lib.score(candidates, references)


@pytest.mark.parametrize("image", [-1, 2])
def test_an_image_index_out_of_range_is_refused(image):
    with pytest.raises(UserError, match=f"found indices {min(image, 0)} to {max(image, 0)}, expected 0 to 1"):
        scorer_lib.Scorer([["a"], ["b"]]).cider(["a", "b"], [0, image])


def test_jax_is_not_imported():
    names = ", ".join(f"flaxcap.metrics.{name}" for name in ("scorer", "meteor_spice", "diagnostics"))
    code = f"import {names}, sys; print('jax' in sys.modules)"
    found = subprocess.run([sys.executable, "-W", "error", "-c", code], capture_output=True, text=True, timeout=120)
    assert found.stdout.strip() == "False", found.stderr
