"""Warnings about a data set's captions: unknown words, cut captions, captions without a word."""

from collections.abc import Iterator, Mapping, Sequence

from flaxcap.errors import quoted
from flaxcap.text import scripts
from flaxcap.text.vocabulary import SPECIAL, UNK, Vocabulary
from flaxcap.text.words import words

Captions = Sequence[tuple[str, str]]  # (name of the image, caption)

MANY_UNKNOWN = 0.2  # share of words; Flickr8k's validation split has 0.02 with its preset
# Mean characters of a word. Chinese, Thai and Khmer words that someone has separated have 1.5 to 4.
LONG_WORDS = 6


def warnings(captions: Mapping[str, Captions], vocabulary: Vocabulary, max_length: int) -> Iterator[str]:
    """Yields a line for each fault of the captions.

    Args:
      captions: by role, "train" and "val" among them.
      vocabulary: of the training captions.
      max_length: most tokens of a caption, <start> and <end> included.
    """
    for role, some in captions.items():
        if line := _without_words(role, some):
            yield line
    if line := _cut(captions["train"], vocabulary, max_length):
        yield line
    if line := _unknown(captions["val"], vocabulary):
        yield line


def _without_words(role: str, captions: Captions) -> str:
    found = [(name, caption) for name, caption in captions if not words(caption)]
    if not found:
        return ""
    name, caption = found[0]
    return (
        f"{role}: {_share(len(found), len(captions))} captions contain no word, only punctuation or symbols; the first"
        f" is {quoted(caption)}, of {quoted(name)}"
    )


def _cut(captions: Captions, vocabulary: Vocabulary, max_length: int) -> str:
    lengths = [len(vocabulary.tokenizer.split(caption)) + 2 for _, caption in captions]  # 2: <start> and <end>
    cut = sum(length > max_length for length in lengths)
    if not cut:
        return ""
    return (
        f"train: {_share(cut, len(lengths))} captions are cut: they have more tokens than"
        f" --config.data.max_length={max_length}; the longest has {max(lengths)}"
    )


def _unknown(captions: Captions, vocabulary: Vocabulary) -> str:
    """Returns the line about validation words that no caption can contain, with a remedy if they are many."""
    tokens = [token for _, caption in captions for token in vocabulary.tokenizer.split(caption)]
    if not tokens:
        return ""
    unknown = sum(vocabulary.ids.get(token, UNK) == UNK for token in tokens)
    name = vocabulary.tokenizer_name
    noun = {"words": "words", "characters": "characters and words", "bpe": "pieces of words"}[name]
    line = f"val: {_share(unknown, len(tokens))} {noun} are not in the vocabulary" if unknown else ""
    many = unknown >= MANY_UNKNOWN * len(tokens)
    long = sum(map(len, tokens)) > LONG_WORDS * len(tokens)
    if name == "words" and (many or long) and scripts.written_without_spaces(caption for _, caption in captions):
        line = line or f"val: words have {sum(map(len, tokens)) / len(tokens):.0f} characters on average"
        return f"{line}: the captions have no spaces between words; use --config.data.tokenizer=characters"
    if many:
        full = len(vocabulary) - len(SPECIAL)
        return f"{line}, which has {full}: see --config.data.vocab_size and the languages of both splits"
    return line


def _share(part: int, total: int) -> str:
    """Returns "3 of 40 (7.5%)"."""
    percent = 100 * part / total
    return f"{part} of {total} ({'<0.1' if 0 < percent < 0.05 else f'{percent:.1f}'.removesuffix('.0')}%)"
