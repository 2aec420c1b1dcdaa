"""The tokeniser of the COCO caption evaluation, without Java.

`tokenize` returns what pycocoevalcap's PTBTokenizer returns: the words of Stanford's PTBTokenizer (CoreNLP 3.4.1 with
-preserveLines and -lowerCase), without COCO's list of punctuation. The rules were found by black-box experiments, and
the tests compare the two tokenisers. At each position the longest match wins, and the first rule of equals.

Three differences are intended:

- A caption is read alone. Java reads all captions as one file: "plan b." loses its period if the next caption starts
  with "The".
- Every line end is a space. pycocoevalcap miscounts the captions at any line end except "\\n".
- Words that Java joins by a no-break space ("1 1/2", a tag's attributes) stay separate. BLEU and CIDEr split them
  again.

These are not matched, because captions have none: telephone numbers in several parts, tags with attributes, file names
that start with a digit, letters written as entities (&eacute;), the C1 control characters, words run together
("I'mhere", "Jan.a"), "5 1/2-inch", accented letters before n't, and scripts other than Latin, Greek, Cyrillic, kana,
hangul and han.
"""

import functools
import re

# A letter. \w includes numbers that Java does not count as digits, and excludes combining accents.
_L = r"(?:[^\W\d_²³¹¼-¾⁰⁴-₉⅐-↏①-⓿❶-➓]|[\u0300-\u036f])"
_W = rf"(?:{_L}|\d)"
_APOSTROPHE = "['’]"
_INNER = "['’`‘‛]"  # between letters, any single quote can be an apostrophe
_ENDING = r"(?:'(?i:[smd]|ll|re|ve)(?![A-Za-z])|’(?i:[smd]|ll|re|ve))"
_JOINED = rf"(?:(?i:[dol]){_INNER}(?={_L}{_L}))?{_W}+"
_DASHED = rf"[A-Za-z0-9][A-Za-z0-9.,]*(?:-(?:(?:{_L}\.){{2,}}|{_JOINED}))+"
_SLASHED = rf"{_W}+(?:-{_L}+)?"
_JOINT = "[A-Z]+&[A-Z]+"
_EYE = "[-^x=~<>']"
_URL = r"[^\s\0\"()<>|{}]"
_PATH = r"(?:/[^\s\0\"()<>|]+(?![!,.?{}-])[^\s\0\"()<>|])?"

# Their period is part of the word.
_ABBREVIATION = r"""(?x:
    (?i: adj|adm|adv|al|ala|alex|apr|ariz|assn|assoc|asst|attys?|aug|ave|bhd|bldg|blvd|brig|bros|calif|capt|cf|cie|cmdr
    |co|col|colo|comdr|conn|corp|cos|cpl|ct|dak|dec|dept|det|drs?|ed\.d|elec|ens|esq|est|etc|ext|feb|fla|fri|ft|ga|gen
    |govs?|hon|inc|ind|insp|intl|invt|jan|jos|jr|jul|jun|kans?|ky|lieut|lt|ltd|maj|mar|md|messrs|mich|minn|mlle|mme|mo
    |mon|mont|mrs?|ms|msgr|mt|natl|neb|nev|nov|oct|okla|penn|pfc|ph(?:\.d)?|plc|pres|profs?|pvt|rd|reps?|rev|rt|sens?|sep
    |sept|seq|sfc|sgt|spc|sq|sr|ste?|supts?|sys|tel|tenn|thu|thurs|treas|tue|tues|univ|va|vs|vt|wed|wisc?|wm|wyo )
    | [Mm][ft]g | [Pp]?[Pp][Tt][ey][Ss]?
    | A(?i:rk|z) | D(?i:el) | I(?i:ll) | L(?i:a) | M(?i:ass|iss) | O(?i:re) | P(?i:a) | T(?i:ex) | W(?i:ash) )\."""
_NUMBERED = r"(?i:art|ca|figs?|nos?|op|pp|prop)\."  # abbreviations only before a number
# After "b. " these start a sentence: the period is then not part of the initial.
_STARTER = r"""(?x:
    A|About|According|Additionally|After|An|As|At|But|Earlier|He|Her|Here|However|If|In|It|Last|Many|More|Now|Once|One
    |Other|Our|She|Since|So|Some|Such|That|The|Their|Then|There|These|They|This|We|What|When|While|Yet|You|M[rs]\.
    |</?[A-Za-z]+/?> )"""

# (the word, the text that must follow it). Both count for the length of the match.
_RULES = (
    # gonna -> gon na
    ("(?i:can)", rf"(?i:not)(?!{_W})"),
    ("(?i:gon|wan)", rf"(?i:na)(?!{_W})"),
    ("(?i:got)", rf"(?i:ta)(?!{_W})"),
    ("(?i:gim|lem)", rf"(?i:me)(?!{_W})"),
    # words, possibly with a period inside; don't -> do n't; it's -> it 's
    (rf"{_L}{_W}*(?:[.!?]{_L}{_W}*)*", ""),
    (rf"{_W}+", ""),
    (rf"{_L}*(?![nN]){_L}", rf"(?i:n{_INNER}t)"),
    (rf"(?i:n{_INNER}t)", ""),
    (rf"{_L}+", _ENDING),
    (_ENDING, ""),
    # apostrophes within a word: o'clock, y'all, shi'ite, li'l, 'n', '90s
    (rf"(?i:[dlno]){_INNER}{_L}{{2}}{_W}*|[A-HJ-XZ]{_INNER}{_L}{{2,}}", ""),
    (rf"(?i:o{_INNER}o)|(?i:[djl]|ol){_APOSTROPHE}", ""),
    (rf"(?i:y){_APOSTROPHE}", _L),
    (rf"{_L}+(?i:[aeiouy]){_INNER}[aeiouA-Z]{_L}*", ""),
    (rf"(?i:c{_APOSTROPHE}(?:est|mon)|cap{_APOSTROPHE}n|e{_APOSTROPHE}er|ev{_APOSTROPHE}ry|li{_APOSTROPHE}l)", ""),
    (rf"(?i:(?:dunkin|somethin){_APOSTROPHE}|nat{_APOSTROPHE}l|s{_APOSTROPHE}mores)", ""),
    (rf"(?i:{_APOSTROPHE}(?:cause|em|till?|n{_APOSTROPHE}))|'[nN](?!\S)|’[nN]", ""),
    (r"'[tT]", "(?i:is|was)"),
    (rf"{_APOSTROPHE}(?:\d\d(?!\S)|[2-9]0[sS])", ""),
    # -5, 3:30, 1,000.5, 1/2, 1-1/2
    (r"[-+]?\d*(?:[.:,]\d+)+|[-+]?\d+", ""),
    (r"(?:\d{1,4}-)?\d{1,4}\\?/\d{1,4}", ""),
    # t-shirt, U.S.-based, 1,000-foot, a_b, and/or
    (_DASHED, ""),
    (rf"{_JOINED}(?:[-_]{_JOINED})+", ""),
    (rf"{_SLASHED}(?:\\?/{_SLASHED}){{1,2}}", ""),
    # U.S., an initial, abbreviations, any word with a period before a comma
    (r"[A-Za-z](?:\.[A-Za-z])*\.|[A-Za-z](?:\.[A-Za-z])+", ""),
    (_ABBREVIATION, ""),
    (_NUMBERED, r"[\d\0]"),
    (rf"(?:{_JOINED}(?:[-_]{_JOINED})*|{_L}{_W}*(?:\.{_L}{_W}*)+|{_DASHED}|{_JOINT})\.", "[,;:]"),
    # AT&T, US$, #tag, @name, addresses, tags, entities
    (rf"{_JOINT}|[A-Z]+\$|#{_L}+|@[A-Za-z_][A-Za-z0-9_]*", ""),
    (rf"<?[A-Za-z0-9]{_URL}*@(?:(?!\.){_URL})+(?:\.(?:(?!\.){_URL})+)*>?", ""),
    (rf"(?i:https?://){_URL}+(?![!,.?-]){_URL}", ""),
    (rf"(?i:www)\.(?:[^\s!\"(),.<>?{{|}}]+\.)+[A-Za-z]{{2,4}}{_PATH}", ""),
    (rf"(?:[a-z#%&*+~¡-\uffff]+\.)+(?:com|edu|net|org){_PATH}", ""),
    (r"</?[A-Za-z!?][\w.:-]*/?>", ""),
    (r"&(?i:amp|lt|gt|nbsp|[mn]dash|md);|&(?:quot|apos);", ""),
    # :-) and ^_^
    (r"[<>]?[:;=][-o*']?[]()@DOPdp[{|\\]|:\d", "(?![A-Za-z0-9])"),
    (rf"{_EYE}_{_EYE}|\({_EYE}[_.-]?{_EYE}\)", ""),
    # runs of punctuation, and single characters; other characters are not words
    (r"[!?]+|\.{3,5}|-+|#+|_+|\\\*|\*+|@+|<<|>>|''|[`‘’‛‹›“”«»]{1,2}", ""),
    (r"-(?i:[lr][rsc]b)-", ""),
    (r"[!-~¡-¿×÷⁰-₎‚„†-‣…‰-‸–—€℀-⅏⅓-⅞←-⯿]", ""),
)
_LEXER = [re.compile(f"({word}){follow}") for word, follow in _RULES]

_TYPOGRAPHIC = re.compile("[`‘’‛‹›“”«»]+|’(?:[smd]|ll|re|ve)|n[’‘‛]t")  # replaced only in these words, not in o’clock
_PLAIN = str.maketrans({"‘": "`", "‛": "`", "‹": "`", "’": "'", "›": "'", "“": "``", "«": "``", "”": "''", "»": "''"})
_PUNCTUATION = re.compile(r"[.?!,:;'`\"…–—]|''|``|\.{3,5}|-{1,4}|&(?:nbsp|[mn]dash|md|quot|apos);")
_WRITTEN = {
    "(": "-lrb-", ")": "-rrb-", "[": "-lsb-", "]": "-rsb-", "{": "-lcb-", "}": "-rcb-",
    "&amp;": "&", "&lt;": "<", "&gt;": ">", "¢": "cents", "£": "#", "¤": "$", "€": "$",
    "½": "1/2", "¼": "1/4", "¾": "3/4", "⅓": "1/3", "⅔": "2/3",
}  # fmt: skip

_INITIAL = re.compile(rf"(?<![\w.])([A-Za-z])\.(?=\s+(?:{_STARTER}|(?=[A-Z]+\.?(?!\S))(?i:{_STARTER}))(?!\S))")
_SENTENCE = re.compile(r"\.\s+\S")
_NUMBER = re.compile(rf"(?<![\w/])(?<!\w-)({_NUMBERED})(?=\s\d)")
# Bounded because the rules look ahead: "a,a,a,…" of 4,000 characters takes 1.4 s as one part.
_PART = re.compile(r"\S{1,500}")
_CONTRACTIONS = {"cannot", "gonna", "wanna", "gotta", "gimme", "lemme"}


def tokenize(caption: str) -> list[str]:
    """Returns the caption's words: "A dog's ball isn't here." -> ["a", "dog", "'s", "ball", "is", "n't", "here"]."""
    text = caption.replace("\u00ad", "")
    if _SENTENCE.search(text):  # initials and numbers: the only rules that look past a space
        text = _NUMBER.sub("\\1\0", _INITIAL.sub(r"\1", text))
    return [word for part in _PART.findall(text) for word in _words(part)]


@functools.lru_cache(maxsize=1 << 16)
def _words(part: str) -> tuple[str, ...]:
    """Returns the words of a text without spaces."""
    if part.isascii() and part.isalpha() and part.lower() not in _CONTRACTIONS:
        return (part.lower(),)
    words, position = [], 0
    while position < len(part):
        matches = [m for m in (rule.match(part, position) for rule in _LEXER) if m]
        longest = max(matches, key=re.Match.end, default=None)
        position = longest.end(1) if longest else position + 1
        words.append(_written(longest[1].lower()) if longest else "")
    return tuple(w for w in words if w)


def _written(word: str) -> str:
    """Returns a word as Java writes it; "" for punctuation."""
    if _TYPOGRAPHIC.fullmatch(word):
        word = word.translate(_PLAIN)
    if _PUNCTUATION.fullmatch(word):
        return ""
    return _WRITTEN.get(word) or word.replace("(", "-lrb-").replace(")", "-rrb-")
