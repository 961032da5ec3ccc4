import pytest

from stare_megatron.config.logging import REFLECTION_WORDS
from stare_megatron.rollout.reflection import word_counter


@pytest.mark.parametrize(
    ("text", "count"),
    [
        ("Wait, that is wrong. WAIT! However, fine.", 3),
        ("waiting, await, waiter", 0),
        ("Let me\n  check this. let me checker", 1),
        ("double-check, double check", 1),
        ("let's verify: actually", 2),
        ("", 0),
    ],
)
def test_whole_words_in_any_case(text, count):
    assert word_counter(REFLECTION_WORDS)(text) == count


def test_of_two_phrases_at_one_place_the_longer_counts_once():
    assert word_counter(["let me", "let me check"])("let me check; let me see") == 2


def test_special_characters_are_themselves():
    assert word_counter(["hmm..."])("hmm... hmm") == 1


def test_no_words_no_count():
    assert word_counter([])("wait") == 0
