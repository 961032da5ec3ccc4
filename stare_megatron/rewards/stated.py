"""Which part of a response without a box is its answer, and which letter of a multiple choice it states."""

from __future__ import annotations

import re

from stare_megatron.rewards.math_text import plain

_TAG = re.compile(r"<answer>(.*?)</answer>", re.DOTALL | re.IGNORECASE)
_OPEN_BOX = re.compile(r"\\(?:boxed|fbox)\s*\{")
_STATED = re.compile(
    r"(?:(?:\b(?:answer|result|solution)s?\b|答案|结果)[^\n.:=?$\\是为：]{0,40}?(?:\b(?:is|are|be|equals?)\b|[:=：是为])|####)"
    r"(?:\s*(?:simply|just|therefore|thus|exactly|approximately|about|equal to|given by|as follows|either|that|:|="
    r"|\*\*(?=\s))(?!\w))*\s*",
    re.IGNORECASE,
)
_NEGATED = re.compile(r"(?:not|n't|wrong|unknown|unclear)\b", re.IGNORECASE)
_MATH = re.compile(
    r"\$\$([^$]+)\$\$|(?<![\\$])\$(?!\s)((?:[^$\n\\]|\\.)+?)(?<!\s)\$(?![\d$])|\\\(((?:[^\\]|\\[^)])*)\\\)"
    r"|\\\[((?:[^\\]|\\[^\]])*)\\\]"
)
_EMPHASIS = re.compile(r"(?:\*\*|__|`)([^*_`\n]+)(?:\*\*|__|`)")
_JOINED = re.compile(r"\s*(?:,\s*and|,\s*or|,|and|or)\s*")
_END = re.compile(
    r"\n|[.!?](?=\s+[A-Z\\(*]|\s*$)|;\s|\s[—–]\s|,?\s+(?=(?:because|since|as|which|where|so|for|when|given|if|after|by"
    r"|thus|therefore|hence|but|not|while|i\.e|e\.g|with|in order|although|rather|instead)\b)|\s+\((?=[a-z]{2,}\s)"
)
_LEAD = re.compile(
    r"(?:(?:the|a|an|number|value|total|sum|of|equal|equals|to|is|it|that|we|get|have|find|there|are|so|then|just|final|result"
    r"|will|be|approximately|about|roughly|answer)\b\s*(?::\s*)?)+(?=[-+$\\(\[{.\d])",
    re.IGNORECASE,
)
_THUS = re.compile(r"^(?:(?:therefore|thus|hence|so|then|finally|consequently)\b[,:]?\s+|∴\s*)", re.IGNORECASE)
_CLUSTER = re.compile(
    r"(?<![\w.])[-+−]?[$€£¥₹]?(?:\d|\.\d|\\frac|\\sqrt|√)[\w.,/^%√π°:{}\\+*()−-]*(?:\s+[ap]\.?m\b\.?)?"
)
_UNSURE = re.compile(
    r"(?:n't|\b(?:or|between|either|at least|at most|less than|more than|fewer than|greater than|not|except|over|under"
    r"|twice|half|negative|minus))\s*[($\\]*\s*$",
    re.IGNORECASE,
)
_PROSE = re.compile(r"(?<![\\A-Za-z{])[A-Za-z]{2,}")


def statement(tail: str) -> str | None:
    """The answer that the end of a response states: in the last `<answer>` tags; else after the last "answer is",
    "answer:", "####"; else the last formula or number of its last line that has one. None: there is none, or it was to
    stand in a box that was cut off."""
    if tags := _TAG.findall(tail):
        return _stated(tags[-1]) or tags[-1].strip()
    if _OPEN_BOX.search(tail):
        return None
    return _stated(tail) or _last(tail) or _yes_or_no(tail)


def within(box: str) -> str:
    """What a box holds; of a sentence the answer that it states."""
    return _stated(plain(box)) or box


def _stated(text: str) -> str | None:
    for match in reversed(list(_STATED.finditer(text))):
        rest = text[match.end() :].lstrip()
        if rest and not _NEGATED.match(rest):
            return _cut(rest)
    return None


def _cut(rest: str) -> str:
    """Where a stated answer ends: after a formula, emphasised text, or the clause it is in."""
    if formulas := _joined(rest):
        return formulas
    if strong := _EMPHASIS.match(rest):
        return _formula(strong[1])
    rest = rest.lstrip("*")
    end = _END.search(rest)
    clause = (rest[: end.start()] if end else rest).replace("**", "").strip()
    if lead := _LEAD.match(clause):
        clause = clause[lead.end() :]
        if formulas := _joined(clause):
            return formulas
    return clause


def _joined(text: str) -> str | None:
    """The formula that the text begins with and those it is joined to by commas, "and", "or"."""
    found, match = [], _MATH.match(text)
    while match:
        found.append(_inside(match))
        end = match.end()
        if not (comma := _JOINED.match(text, end)):
            break
        match = _MATH.match(text, comma.end())
        if not match and (number := _CLUSTER.match(text, comma.end())):
            found.append(number[0].rstrip(".,"))
    if not found:
        return None
    percent = re.match(r"\s*(\\?%|percent\b)", text[end:])
    return ", ".join(found) + ("%" if percent else "")


def _formula(text: str) -> str:
    match = _MATH.fullmatch(text.strip(" .,:"))
    return _inside(match) if match else text


def _inside(match: re.Match[str]) -> str:
    return next(group for group in match.groups() if group is not None).strip()


def _last(tail: str) -> str | None:
    """Without a statement: the last line if it is nothing but an answer, else its last formula or number, else that of
    the lines before it."""
    lines = [line.strip() for line in tail.splitlines() if line.strip()]
    line = lines[-1] if lines else ""
    bare = _THUS.sub("", line)
    if bare and len(line) <= _SHORT and len(_PROSE.findall(plain(bare))) <= 1 and not _NEGATED.search(line):
        return _LEAD.sub("", bare, count=1) if _LEAD.match(bare) else bare
    for text in (line, tail):
        formulas, numbers = list(_MATH.finditer(text)), list(_CLUSTER.finditer(text))
        if formulas and (not numbers or numbers[-1].start() < formulas[-1].end() or "." not in _after(text, formulas)):
            first = len(formulas) - 1
            while first and _JOINED.fullmatch(text[formulas[first - 1].end() : formulas[first].start()]):
                first -= 1
            return None if _unsure(text, formulas[first]) else ", ".join(map(_inside, formulas[first:]))
        if numbers:
            return None if _unsure(text, numbers[-1]) else _balanced(numbers[-1][0])
    return None


def _after(text: str, found: list[re.Match[str]]) -> str:
    return text[found[-1].end() :]


def _unsure(text: str, match: re.Match[str]) -> bool:
    """Whether the words before it make it a bound or an alternative."""
    return bool(_UNSURE.search(text[max(0, match.start() - 24) : match.start()]))


def _yes_or_no(tail: str) -> str | None:
    """The word that a response begins with, if it never says the other."""
    said = [word.lower() for word in _YES_OR_NO.findall(tail)]
    first = _YES_OR_NO.match(tail.lstrip())
    return said[0] if first and len(set(said)) == 1 else None


_YES_OR_NO = re.compile(r"\b(?:yes|no)\b", re.IGNORECASE)
_SHORT = 60  # characters of a line that may be nothing but an answer


def _balanced(number: str) -> str:
    """Without the punctuation and the parenthesis of the sentence it ends."""
    number = number.rstrip(".,:*-+")
    while number.endswith(")") and number.count("(") < number.count(")"):
        number = number[:-1].rstrip(".,")
    return number


# A choice is a letter A to J, in parentheses or alone; alone and small it is one only if nothing else is there.
_LETTER = re.compile(r"\(([A-Ja-j])\)|([A-J])")
_WORD = r"(?:(?:clearly|indeed|definitely|therefore|thus|simply|option|choice|answer|letter)\s+)*"
_WHOLE = re.compile(rf"{_WORD}(?:\(([A-Ja-j])\)|([A-Ja-j]))", re.IGNORECASE)
_FIRST = re.compile(
    rf"{_WORD}(?:\(([A-Ja-j])\)(?![\w(])|([A-J])(?:[.):](?=\s|\\|$)|\s*\)|(?=,\s+(?:because|since|as)\b)))",
    re.IGNORECASE,
)
_OTHER = re.compile(r"\s*(?:,|/|;|\bor\b|\band\b|&)+\s*(?:\(([A-Ja-j])\)|([A-J])(?![\w']))")
# After a lone letter a word goes on that belongs to the sentence; "a triangle", "I think" begin something else.
_GOES_ON = "because|since|as|which|where|with|for|that|is|not|due|by|and|or|in|if|but|so"
_ALONE = rf"([A-J])(?![\w'(^_=])(?!\s+(?!(?:{_GOES_ON})\b)[A-Za-z])"
_TOKEN = rf"(?:\(\s*([A-Ja-j])\s*\)|{_ALONE})"
_CHOSEN = re.compile(
    r"(?:(?i:answer|choice|option|choose|chose|select|pick|go with)(?i:\s+(?:is|are|be|would be|should be|must be))?"
    r"|(?i:so|therefore|thus|hence|∴),?(?=\s+\(|\s+[A-J](?:\s*$|\.\s*$))|(?i:\bis|\bit's)(?=:?\s*\([A-Ja-j]\))"
    r"|(?i:must be)"
    rf"|故选|应选|选择?|答案[是为]?)\s*[:：]?\s*(?i:{_WORD}){_TOKEN}"
    rf"|{_TOKEN}(?=\s+(?i:is|must be)\s+(?i:the\s+)?(?i:correct|right|answer|best|true))"
    rf"|^\s*(?i:{_WORD}){_TOKEN}\s*[.:]?\s*$",
    re.MULTILINE,
)
_LISTED = re.compile(r"^\s*(?:\(([A-Ja-j])\)|([A-J])[.:)])", re.MULTILINE)
_DENIED = re.compile(r"\s*(?:is|are|was)?\s*(?:not|n't|wrong|incorrect|false|is\s+(?:wrong|incorrect|false|not))\b")
_MARKUP = re.compile(r"[*$`]|\\[()\[\]]|\\boxed|[{}]")


def is_choice(reference: str) -> str | None:
    """The letter (A to J) of a reference that is a multiple-choice letter, bracketed or not; else None."""
    match = _LETTER.fullmatch(plain(reference).strip("$. "))
    return (match[1] or match[2]).upper() if match else None


def choice_in(content: str) -> str | None:
    """The letter that a box or tag holds, as in `D`, `\\textbf{(D)}\\ 42`, `D. 42`, `Option D`; "" where it holds two;
    None where what it holds begins otherwise."""
    text = plain(content.replace("$", "").replace("**", "")).strip(" .:")
    match = _WHOLE.fullmatch(text) or _FIRST.match(text) or (_LETTER.match(text) if _OTHER.match(text, 1) else None)
    return _alone(text, match) if match else None


def stated_choice(tail: str) -> str | None:
    """The letter that running text states last; "" where it states two at once, None where it states none."""
    if tags := _TAG.findall(tail):
        if (letter := choice_in(tags[-1])) is not None:
            return letter
        tail = tags[-1]
    text = _MARKUP.sub("", plain(tail))
    found = [m for m in _CHOSEN.finditer(text) if not _DENIED.match(text, m.end())]
    if not found and len(listed := list(_LISTED.finditer(text))) == 1:  # not the options over again
        found = [m for m in listed if not _DENIED.match(text, m.end())]
    return _alone(text, found[-1]) if found else None


def _alone(text: str, match: re.Match[str]) -> str:
    """The letter of a match, "" if another is named beside it."""
    letter = next(group for group in match.groups() if group).upper()
    other = _OTHER.match(text, match.end())
    return letter if other is None or (other[1] or other[2]).upper() == letter else ""
