"""What is wrong with captions that a score does not tell: endings, repeats, a small vocabulary."""

import itertools
from collections.abc import Collection, Sequence

from flaxcap.errors import UserError
from flaxcap.text.words import words

# They want a word to follow. One caption in a hundred of Flickr8k's ends in one, most of those in "on".
FUNCTION_WORDS = frozenset({
    "a", "an", "the", "this", "these", "his", "its", "their", "and", "or", "but", "while", "as", "that", "which", "who",
    "of", "with", "in", "on", "at", "to", "from", "by", "for", "into", "onto", "near", "next", "over", "under", "very",
    "between", "through", "across", "beside", "along", "against", "during", "is", "are", "was", "were", "be", "being",
})  # fmt: skip
REPEATED = (1, 2, 3, 4)


def health(
    candidates: Sequence[str], references: Sequence[Sequence[str]], vocabulary: Collection[str]
) -> dict[str, float]:
    """A report on the captions of a split, as shares from 0 to 1 where nothing else is said.

    `vocabulary`: the words that the model can write. Words are those of `flaxcap.text.words.words`.

        empty                captions without a word
        function_word_end    captions that end in one of FUNCTION_WORDS
        unique               different captions, of all captions
        words_used           different words in the captions (a number)
        vocabulary_used      words of the vocabulary that some caption has
        repeats_1            captions with a word twice in a row
        repeats_2 … 4        captions with the same 2 … 4 words in a row at two places, which may overlap
        length               words of a caption (mean)
        reference_length     words of a reference (mean)

    UserError if there is no candidate, no reference or no vocabulary.
    """
    captions = [tuple(words(caption)) for caption in candidates]
    reference_lengths = [len(words(caption)) for some in references for caption in some]
    if not captions or not reference_lengths or not vocabulary:
        raise UserError("a caption-health report needs captions, references and a vocabulary")
    used = {word for caption in captions for word in caption}

    def share(holds: Sequence[bool]) -> float:
        return sum(holds) / len(holds)

    return {
        "empty": share([not caption for caption in captions]),
        "function_word_end": share([bool(caption) and caption[-1] in FUNCTION_WORDS for caption in captions]),
        "unique": len(set(captions)) / len(captions),
        "words_used": float(len(used)),
        "vocabulary_used": len(used.intersection(vocabulary)) / len(set(vocabulary)),
        **{f"repeats_{n}": share([_repeats(caption, n) for caption in captions]) for n in REPEATED},
        "length": sum(map(len, captions)) / len(captions),
        "reference_length": sum(reference_lengths) / len(reference_lengths),
    }


def _repeats(caption: tuple[str, ...], n: int) -> bool:
    if n == 1:
        return any(a == b for a, b in itertools.pairwise(caption))
    ngrams = list(zip(*(caption[k:] for k in range(n)), strict=False))
    return len(set(ngrams)) < len(ngrams)
