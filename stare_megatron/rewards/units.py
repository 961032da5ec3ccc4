"""Units at the end of an answer: dropped, and two different ones are told apart."""

from __future__ import annotations

import re

# Unit: its spellings. An area or a volume is a unit of its own.
_TABLE = """
$: dollars dollar usd bucks
¢: cents cent
€: euros euro eur
£: pounds_sterling gbp
¥: yen jpy
元: yuan rmb cny
₹: rupees rupee rs inr
km: km kilometers kilometer kilometres kilometre kms
m: m meters meter metres metre mtr
cm: cm centimeters centimeter centimetres centimetre cms
mm: mm millimeters millimeter millimetres millimetre
mi: miles mile mi
yd: yards yard yd
ft: feet foot ft
in: inches inch
kg: kg kilograms kilogram kgs kilos
g: g grams gram gm
mg: mg milligrams milligram
t: tons ton tonnes tonne
lb: pounds pound lbs lb
oz: ounces ounce oz
l: l L liters liter litres litre
ml: ml mL milliliters milliliter millilitres millilitre
gal: gallons gallon gal
s: s seconds second secs sec
min: minutes minute mins min
h: h hours hour hrs hr
d: days day
wk: weeks week
mo: months month
yr: years year yrs yr
ms: ms milliseconds millisecond
mph: mph
km/h: kmh kmph kph
°: ^{\\circ} ^\\circ degrees degree deg
°C: ^{\\circ}C ^\\circ_C celsius
°F: ^{\\circ}F ^\\circ_F fahrenheit
rad: radians radian rad
N: N newtons newton
J: J joules joule
kJ: kJ
W: W watts watt
kW: kW
V: V volts volt
A: A amperes ampere amps amp
Ω: ohms ohm \\Omega
Hz: Hz hertz
Pa: Pa pascals pascal
K: K kelvin kelvins
mol: mol moles mole
eV: eV
erg: erg ergs
Å: \\AA angstroms angstrom
unit: units unit
"""
_NAMES = {
    spelling.replace("_", " "): name
    for name, _, spellings in (line.partition(": ") for line in _TABLE.strip().splitlines())
    for spelling in spellings.split()
}
_SIGNS = {"\\$": "$", "$": "$", "€": "€", "£": "£", "¥": "¥", "₹": "₹", "\\pounds": "£", "\\euro": "€", "\\yen": "¥"}
_WORD = "|".join(re.escape(word) for word in sorted(_NAMES, key=len, reverse=True))
_POWER = r"(?:\s*\^\s*\{?\s*[23]\s*\}?)?"
_ONE = rf"(?:(?:square|cubic|sq\.?|cu\.?)\s+)?(?:{_WORD}){_POWER}(?![A-Za-z])"
_UNIT = re.compile(rf"({_ONE}(?:\s*(?:/|\\cdot|\\times|\*|per\s)\s*{_ONE})*)$")
_PART = re.compile(rf"(square|cubic|sq|cu)?\.?\s*({_WORD})(?:\s*\^\s*\{{?\s*([23]))?")
_WRAPPED = re.compile(r"\\(?:text(?:bf|it|rm|normal)?|math(?:rm|bf|it|sf)|mbox|operatorname|rm)\s*\{([^{}]*)\}")
_SIGN = re.compile(r"^(-?)\s*(\\\$|\$|€|£|¥|₹|\\(?:euro|pounds|yen)(?![A-Za-z])|(?:USD|Rs\.?)(?=\s*\d))\s*(?=[-\d.\\])")
_SIGN_AT_END = re.compile(r"\s*(\\\$|\$|€|£|¥|₹|元|\\(?:euro|pounds|yen))\s*$")
# Of Chinese and Japanese all but the characters of large numbers and parts.
_COUNTER = re.compile(r"(?<=[\d})])\s*[\u3040-\u30ff\u4e00-\u9fff]{1,4}$")
_CHANGES = re.compile("[百千万萬亿億兆十分半倍成折点至到或和]")
# Words of several letters after a number are what is counted (`18 apples`), but for those that change its value.
_COUNTED = re.compile(r"(?<=[\d})])\s+[A-Za-z]{2,}(?:['-][A-Za-z]+)*(?:\s+[A-Za-z]+(?:['-][A-Za-z]+)*){0,3}$")
_VALUE_WORDS = re.compile(
    r"\b(?:or|and|to|of|mod|base|hundred|thousand|million|billion|trillion|dozens?|squared|cubed|factorial|choose"
    r"|times|plus|minus|over|divided|less|more|than|least|most|fewer|not|percent|pct|per|cent|half|halves|thirds?"
    r"|quarters?|pi|sqrt|sin|cos|tan|log|ln|if|from|between|either|except|unless|wrong|false|pm|am|choice|option|for"
    r"|where|in|is|but|i|x|y|e|remainder|[a-z]*ths?|st|nd|rd)\b",
    re.IGNORECASE,
)


def split(text: str) -> tuple[str, str]:
    """An answer without the unit before or after its number, and that unit; "" where none is known."""
    unit = ""
    if sign := _SIGN.match(text):
        text, unit = sign[1] + text[sign.end() :], _SIGNS.get(sign[2], "$" if sign[2] == "USD" else "₹")
    elif sign := _SIGN_AT_END.search(text):
        text, unit = text[: sign.start()], _SIGNS.get(sign[1], sign[1])
    loose = _WRAPPED.sub(_loosened, text)
    loose = loose.replace(f"\\circ {_STYLED}", "\\circ ").replace(f"\\circ}} {_STYLED}", "\\circ}")
    found = _UNIT.search(loose)
    styled = found is not None and loose[: found.start()].endswith(_STYLED)
    loose, value = (part.replace(_STYLED, "") for part in (loose, loose[: found.start()] if found else ""))
    # A lone letter right after a number is a variable, `2t`.
    whole = value.strip() and (styled or _counts(value))
    if found and whole and (len(found[1]) > 1 or value != value.rstrip()):
        return value.strip(), _name(found[1])
    if (found := _COUNTED.search(loose)) and not _VALUE_WORDS.search(found[0]):
        return loose[: found.start()].strip(), unit
    if (found := _COUNTER.search(loose)) and not _CHANGES.search(found[0]):
        return loose[: found.start()].strip(), unit
    return text.strip(), unit


def differ(one: str, other: str) -> bool:
    """Whether two units that are both known are not the same. Degrees may be of an angle or a temperature."""
    vague = {"unit", ""}
    if one in vague or other in vague or one == other:
        return False
    return not (one[:1] == other[:1] == "°" and "°" in (one, other))


def _loosened(match: re.Match[str]) -> str:
    """What is in a style, apart from what is before it; a word of one's own stays in it."""
    inner = match[1].strip()
    return f" {_STYLED}{inner}" if inner and match.start() else match[0]


_STYLED = "\x1f"  # before what was in a style


def _counts(value: str) -> bool:
    """Whether what is before a unit ends as a value does."""
    value = value.rstrip()
    return value[-1:].isdigit() or value.endswith(("}", ")", "]", "\\pi", "thousand", "million", "billion", "trillion"))


def _name(written: str) -> str:
    return _PART.sub(_part, written).replace("per", "/").replace("\\cdot", "*").translate(_NO_SPACES)


_NO_SPACES = str.maketrans("", "", " }")


def _part(match: re.Match[str]) -> str:
    power = match[3] or {"s": "2", "c": "3"}.get((match[1] or "")[:1], "")
    return _NAMES[match[2]] + power
