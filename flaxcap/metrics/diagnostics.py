"""Faults of captions that scores do not show: cut-off endings, repetitions, a small vocabulary."""

import itertools
from collections.abc import Sequence

from flaxcap.errors import UserError
from flaxcap.metrics.units import WORDS, Unit
from flaxcap.text import function_words
from flaxcap.text.vocabulary import SPECIAL, Vocabulary

REPEATED = (1, 2, 3, 4)  # words


def health(
    candidates: Sequence[str], references: Sequence[Sequence[str]], vocabulary: Vocabulary, unit: Unit = WORDS
) -> dict[str, float]:
    """Returns a report on the captions of a split. Values are shares from 0 to 1 unless the table says otherwise.

        empty                captions without a word
        function_word_end    captions that end in one of `function_words.ENGLISH`
        unique               distinct captions, of all captions
        words_used           distinct words in the captions (a number)
        vocabulary_used      tokens of the vocabulary that the captions contain
        repeats_1            captions with a word twice in a row
        repeats_2 … 4        captions with a sequence of 2 … 4 words at two positions, which may overlap
        length               words of a caption (mean)
        reference_length     words of a reference (mean)

    Args:
      candidates: one caption for each image.
      references: for each image, its captions.
      vocabulary: of the model.
      unit: what the table calls words.

    Raises:
      UserError: there is no candidate, no reference or no vocabulary.
    """
    captions = [tuple(unit.split(caption)) for caption in candidates]
    known = frozenset(vocabulary.tokens[len(SPECIAL) :])
    reference_lengths = [len(unit.split(caption)) for some in references for caption in some]
    if not captions or not reference_lengths or not known:
        found = f"{len(captions)} captions, {len(reference_lengths)} references, {len(known)} vocabulary words"
        raise UserError(f"caption health: found {found}, expected at least one of each")
    used = {word for caption in captions for word in caption}
    used_tokens = {token for caption in candidates for token in vocabulary.tokenizer.split(caption)}

    def share(values: Sequence[bool]) -> float:
        return sum(values) / len(values)

    return {
        "empty": share([not caption for caption in captions]),
        "function_word_end": share([bool(caption) and caption[-1] in function_words.ENGLISH for caption in captions]),
        "unique": len(set(captions)) / len(captions),
        "words_used": float(len(used)),
        "vocabulary_used": len(used_tokens & known) / len(known),
        **{f"repeats_{n}": share([_repeats(caption, n) for caption in captions]) for n in REPEATED},
        "length": sum(map(len, captions)) / len(captions),
        "reference_length": sum(reference_lengths) / len(reference_lengths),
    }


def _repeats(caption: tuple[str, ...], n: int) -> bool:
    """Tells whether `n` words occur twice; a single word counts only twice in a row."""
    if n == 1:
        return any(a == b for a, b in itertools.pairwise(caption))
    ngrams = list(zip(*(caption[k:] for k in range(n)), strict=False))
    return len(set(ngrams)) < len(ngrams)
