"""Graded cases: what `math` says of an answer, the whole way from the response's text but for the worker process."""

import pytest

from stare_megatron.data.boxed import last_boxed
from stare_megatron.rewards.math_worker import compare


def verdict(reference: str, response: str):
    boxed = last_boxed(response)
    assert boxed != "", "MathReward says that an empty box is wrong before it asks"
    return compare(reference, boxed, response)


# Reference answer, what the response's box holds, whether that is right.
FRACTIONS = [
    (r"\frac{1}{2}", r"1/2", True),
    (r"\frac{1}{2}", r"0.5", True),
    (r"\frac{1}{2}", r".5", True),
    (r"\frac{1}{2}", r"\dfrac12", True),
    (r"\frac{1}{2}", r"\tfrac{2}{4}", True),
    (r"\frac{1}{2}", r"\frac{1}{3}", False),
    (r"-\frac{2}{3}", r"\frac{-2}{3}", True),
    (r"-\frac{2}{3}", r"\frac{2}{3}", False),
    (r"\frac{1}{3}", r"0.333333", True),
    (r"\frac{1}{3}", r"0.33", False),
    ("2/3", r"\frac{2}{3}", True),
    ("33.3", r"\frac{100}{3}", False),
    (r"4\frac{2}{3}", r"\frac{14}{3}", True),
    (r"\frac{14}{3}", r"4\frac{2}{3}", True),
    (r"\frac{14}{3}", r"4\frac{1}{3}", False),
    ("0.1", "0.10", True),
    (r"\frac{1}{12}", "0.083333", True),
]
PERCENT_AND_CURRENCY = [
    (r"50\%", r"50\%", True),
    (r"50\%", r"5\%", False),
    (r"50\%", "50", True),
    ("50", r"50\%", True),
    (r"50\%", "0.5", True),
    ("0.5", r"50\%", True),
    ("3/4", r"75\%", True),
    ("12.5", r"12.5\%", True),
    (r"12.5\%", "12.5", True),
    (r"12.5\%", "12.6", False),
    ("18", r"\$18", True),
    ("18", "$18", True),
    (r"\$18.50", "18.5", True),
    ("18", "€18", True),
    ("18", "18 €", True),
    (r"\$32,\!348", "32348", True),
]
UNITS = [
    ("5", r"5\text{ cm}", True),
    ("5", r"5 \mathrm{cm}", True),
    ("5", r"5\text{ cm}^2", True),
    (r"5\text{ cm}^2", "5", True),
    ("5", "5 cm", True),
    ("5", r"6\text{ cm}", False),
    (r"864 \mbox{ inches}^2", "864", True),
    ("18", r"18 \text{ dollars}", True),
    ("5", r"5\,\text{m/s}", True),
    ("1/2 hour", r"\frac12", True),
    ("60", r"60^\circ", True),
    (r"60^\circ", "60", True),
    (r"60^\circ", r"60 \text{ degrees}", True),
    (r"60^\circ", r"\frac{\pi}{3}", False),
    ("9.6", r"9.6 \text{ \AA}", True),
    ("4.5e33", r"4.5\times 10^{33} \text{ erg/s}", True),
    ("2t", "2", False),
    (r"x(t)=5\cos t", r"5\cos t", True),
]
DIGITS = [
    ("1234", "1,234", True),
    ("1,234", "1234", True),
    ("1{,}234", "1234", True),
    ("1234", r"1\,234", True),
    ("1234", r"1,\!234", True),
    ("1234", "1 234", True),
    ("1234567", "1,234,567", True),
    ("1234", "1,235", False),
    ("1000000", r"1\,000\,000", True),
    ("033", "33", True),
    ("33", "033", True),
    ("007", "7", True),
    ("10", "010", True),
    ("10", "01", False),
    ("0", "-0", True),
    ("0.0", "-0.0", True),
    ("-5", "5", False),
    ("-5", "\N{MINUS SIGN}5", True),
    ("17", "17.", True),
    ("17.", "17", True),
    ("17", "17,", True),
    ("142.0", "142", True),
    ("1500", r"1.5 \times 10^{3}", True),
    (r"1.5\times 10^3", "1500", True),
    ("1500", "1.5e3", True),
    ("6.02e23", r"6.02 \times 10^{23}", True),
    ("6.02e23", r"6.02 \cdot 10^{22}", False),
    ("1.2e-8", "3e-8", False),
    ("1.2e-8", r"1.2 \times 10^{-8}", True),
    ("2516_8", "2516_8", True),
    ("2516_8", "2516_{8}", True),
    ("2516_8", "2516", True),
    ("2516_8", "2516_7", False),
]
SETS = [
    ("(1,2)", "(1, 2)", True),
    ("(1,2)", "(2,1)", False),
    ("(1,2)", "[1,2]", False),
    ("[1,2)", "[1,2)", True),
    ("[1,2)", "(1,2]", False),
    (r"(-\infty, 2]", r"(-\infty,2]", True),
    (r"(-\infty, 2]", r"x \le 2", True),
    (r"(-\infty, 2]", "x < 2", False),
    (r"(0,\infty)", "x>0", True),
    (r"[0,1]\cup[2,3]", r"[2,3]\cup[0,1]", True),
    (r"(-\infty,-1)\cup(1,\infty)", r"(-\infty,-1) \cup (1,+\infty)", True),
    ("1<x<3", "(1,3)", True),
    ("x>5", "5<x", True),
    ("x>5", r"x\ge5", False),
    (r"\{1,2,3\}", r"\{3,2,1\}", True),
    (r"\{1,2,3\}", r"\{1,2\}", False),
    ("1,2,3", "3,2,1", True),
    ("1,2", r"1 \text{ and } 2", True),
    ("1,2", r"1 \text{ or } 2", True),
    ("1,2", "1", False),
    ("1", "1,2", False),
    ("1,2", "x=1, x=2", True),
    ("x=1, x=2", "1,2", True),
    (r"\pm 2", "2,-2", True),
    (r"\pm 2", "2", False),
    (r"1 \pm \sqrt{2}", r"1+\sqrt2, 1-\sqrt2", True),
    ("(11, 13)", "11, 13", True),
    ("(1,2),(3,4)", "(3,4),(1,2)", True),
    ("(1,2),(3,4)", "(1,2),(4,3)", False),
    (r"\left( 3, \frac{\pi}{2} \right)", r"(3, \frac{\pi}{2})", True),
    (r"\left( 3, \frac{\pi}{2} \right)", r"(3, \frac{2\pi}{3})", False),
    (r"\emptyset", r"\varnothing", True),
    ("n=2,3,4", "n=1,2,3", False),
]
ALGEBRA = [
    ("x^2+1", "1+x^2", True),
    ("(x+1)^2", "x^2+2x+1", True),
    (r"\sqrt{12}", r"2\sqrt{3}", True),
    (r"\frac{1}{\sqrt{2}}", r"\frac{\sqrt2}{2}", True),
    (r"2\sqrt{2}", "2.828427", True),
    (r"2\sqrt{2}", "2.83", False),
    ("2^{10}", "1024", True),
    (r"\pi", "3.14", False),
    (r"\log_2 8", "3", True),
    (r"\binom{10}{3}", "120", True),
    ("2+3i", "3i+2", True),
    ("2+3i", "2-3i", False),
    ("5", "x=5", True),
    ("x=5", "5", True),
    ("x=5", "x=6", False),
    ("x=5", "y=5", False),
    ("y=2x+3", "2x-y+3=0", True),
    ("y=2x+3", "y=2x+4", False),
    ("3", "n=3k", False),
    ("3:2", "2:3", False),
    ("12:00", "1:00", False),
    (r"\begin{pmatrix}1&2\\3&4\end{pmatrix}", r"\begin{bmatrix}1&2\\3&4\end{bmatrix}", True),
    (r"\begin{pmatrix}1&2\\3&4\end{pmatrix}", r"\begin{pmatrix}1&2\\4&3\end{pmatrix}", False),
    (r"\begin{pmatrix}-7\\16\\5\end{pmatrix}", r"\begin{pmatrix}-7\\16\\5\end{pmatrix}", True),
    (r"\frac{1}{2004!}", r"\frac{1}{2006!}", False),
    (r"\frac{1}{2^{99}}", r"\frac{1}{2^{98}}", False),
    (r"\frac{2^{2005}+1}{3 \cdot 2^{2006}}", r"\frac{1}{3\cdot 2^{2006}}", False),
    (r"1 - \frac{1}{\mathrm{e}}", r"1 + \frac{1}{\mathrm{e}}", False),
    (r"7 \unknown{5}", r"7 \other{5}", False),
    ("{7", "(7", False),
]
WORDS = [
    (r"\text{Yes}", r"\text{yes}", True),
    ("Yes", r"\text{Yes}", True),
    ("Yes", r"\text{No}", False),
    (r"\text{even}", "even", True),
    (r"\text{Evelyn}", r"\text{Evelyn}", True),
    ("Monday", r"\text{Tuesday}", False),
    ("17", r"\text{17}", True),
    ("B", "B", True),
    ("B", r"\text{B}", True),
    ("B", "(B)", True),
    ("B", r"\textbf{(B)}", True),
    ("(B)", "B", True),
    (r"\text{(B)}", "B", True),
    ("B", "C", False),
    ("D", r"\textbf{(D)}\ 42", True),
    ("D", "D. 42", True),
    ("A", r"\textbf{(D)}\ 42", False),
    ("E", "E", True),
    ("E", "A", False),
]
# What math-verify gets wrong and no small rewrite mends: asserted as it is, listed in docs/rewards.md.
KNOWN_WRONG = [
    (r"\sqrt{1/n}", r"\frac{1}{\sqrt n}", False, "equal for n > 0 only, and nothing says that n > 0"),
    (r"m \frac{d^2 x}{dt^2}", r"m\ddot{x}", False, "dots are not read as derivatives"),
    ("(1,3)", "1<x<3", False, "an open interval looks like a point"),
    ("5", "5t", True, "a letter that is a unit elsewhere is dropped from a response"),
    ("100,200", "100200", True, "a list of groups of three digits looks like one number"),
]
# Reference, a whole response, whether it is right.
RESPONSES = [
    ("17", r"\boxed{16} wait, \boxed{17}", True),
    ("16", r"\boxed{16} wait, \boxed{17}", False),
    ("840", r"could be \boxed{84}. So **Final Answer** \boxed{840}", True),
    ("17", r"\boxed{\boxed{17}}", True),
    (r"\frac{\sqrt{3}}{2}", r"so $\boxed{\frac{\sqrt{3}}{2}}$.", True),
    (r"\{1,2\}", r"$$\boxed{\{1,2\}}$$", True),
    ("5", r"\fbox{5}", True),
    ("5", r"\boxed 5", True),
    ("17", "The answer is 17.", True),
    ("17", "The answer is 18.", False),
    ("18", "The total is $18.", True),
    ("73", "so 234.\n\n✅ Final Answer: **73**", True),
    ("B", "The answer is (B).", True),
    ("B", "The answer is (C).", False),
    ("17", "no idea", False),
    ("17", "", False),
    ("17", r"it is \boxed{17", False),  # cut off
]
BOXED = FRACTIONS + PERCENT_AND_CURRENCY + UNITS + DIGITS + SETS + ALGEBRA + WORDS


def test_the_table_is_no_smaller_than_promised():
    assert len(BOXED) + len(RESPONSES) + len(KNOWN_WRONG) >= 180


@pytest.mark.parametrize(("reference", "content", "right"), BOXED)
def test_boxed_answers(reference, content, right):
    said = verdict(reference, rf"so the answer is $\boxed{{{content}}}$.")
    assert (said.graded, said.correct) == (True, right)
    assert bool(said.note) is not right


@pytest.mark.parametrize(("reference", "content", "said", "why"), KNOWN_WRONG)
def test_known_errors_are_as_documented(reference, content, said, why):
    assert verdict(reference, rf"\boxed{{{content}}}").correct is said


@pytest.mark.parametrize(("reference", "response", "right"), RESPONSES)
def test_whole_responses(reference, response, right):
    assert verdict(reference, response).correct is right


@pytest.mark.parametrize("reference", sorted({r for r, _, _ in BOXED}))
def test_every_reference_equals_itself(reference):
    assert verdict(reference, rf"\boxed{{{reference}}}").correct


def test_alternatives_are_each_right():
    reference = '["6630.65", "6630", "\\\\frac{1}{2}"]'
    assert verdict(reference, r"\boxed{6630}").correct
    assert verdict(reference, r"\boxed{0.5}").correct
    assert not verdict(reference, r"\boxed{6631}").correct
    assert verdict("[1, 2]", r"\boxed{[1,2]}").correct  # an interval is no list of alternatives


@pytest.mark.parametrize("reference", ["", "  "])
def test_a_reference_that_cannot_be_read_grades_nothing(reference):
    said = verdict(reference, r"\boxed{5}")
    assert not said.graded
    assert "cannot be read" in said.note


@pytest.mark.parametrize(
    ("text", "content"),
    [
        (r"\boxed{1} or \boxed{ \frac{1}{2} }.", r"\frac{1}{2}"),
        (r"\boxed{1} then \boxed{2", "1"),
        (r"\boxed{\{1,2\}}", r"\{1,2\}"),
        (r"\boxed{\{1,2}", r"\{1,2"),
        (r"\boxed {5}", "5"),
        (r"\boxed -5.", "-5"),
        (r"\fbox{3}", "3"),
        (r"\boxed{\boxed{17}}", "17"),
        (r"\boxed{}", ""),
        (r"\boxed", None),
        ("none", None),
    ],
)
def test_last_boxed(text, content):
    assert last_boxed(text) == content
