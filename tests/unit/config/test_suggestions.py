from stare_megatron.errors import nearest, suggest


def test_near_words_are_suggested_and_far_ones_are_not():
    words = ["math", "number_walk", "order_free_sum"]
    assert suggest("maths", words) == "; did you mean 'math'?"
    assert suggest("gsm8k", words) == ""
    assert suggest("anything", []) == ""


def test_synonyms_come_before_likeness_and_may_name_several():
    known = {"clip_ratio": "clip_low clip_high"}
    assert nearest("clip_ratio", ["clip_cov"], known) == "clip_low clip_high"
    assert suggest("clip_ratio", ["clip_cov"], known) == "; did you mean 'clip_low' or 'clip_high'?"
