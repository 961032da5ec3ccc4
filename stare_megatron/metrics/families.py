"""Metrics whose names have parts that a run fills in."""

from __future__ import annotations

from stare_megatron.metrics.entry import Entry
from stare_megatron.metrics.entry import Reduction as R


def _with_interval(name: str, meaning: str) -> tuple[Entry, ...]:
    ends = (("low", "lower"), ("high", "upper"))
    intervals = (Entry(f"{name}/ci_{e}", "fraction", R.ONE, f"Its confidence interval, {end} end.") for e, end in ends)
    return (Entry(name, "fraction", R.MEAN, meaning), *intervals)


# Names with parts that a run fills in: {source}, {benchmark} and {name} are labels, {k} is a positive number and
# {age} any.
FAMILY_ENTRIES = (
    Entry("source/{source}/reward", "reward", R.MEAN, "Sampled trajectories of one source of the prompts."),
    Entry("source/{source}/correct", "fraction", R.MEAN, "Those whose answer is correct."),
    Entry("reward/part/{name}", "reward", R.MEAN, "One part of a `sum` before its weight, by label: graded samples."),
    Entry("age/{age}/tokens", "tokens", R.ONE, "Trained action tokens of a policy so many versions behind."),
    Entry("age/{age}/entropy", "nats/token", R.TOKEN_MEAN, "Entropy there of the policy about to be updated."),
    Entry("age/{age}/mismatch", "nats/token", R.TOKEN_MEAN, "|trainer - engine| log-prob of these tokens."),
    Entry("age/{age}/ess", "fraction", R.ONE, "Effective share of these tokens under their ratios, as `mismatch/ess`."),
    Entry("age/{age}/bounded", "fraction", R.FRACTION, "Of these tokens: correction truncated, or masked (rejected)."),
    Entry("age/{age}/selected", "fraction", R.FRACTION, "Of those with A != 0: in L+ or L-."),
    *_with_interval(
        "eval/{benchmark}/avg@{k}", "Accuracy of k samples a prompt: correct by graded, averaged over prompts."
    ),
    *_with_interval(
        "eval/{benchmark}/pass@{k}",
        "Prompts with a correct one among k samples: the unbiased estimate, averaged over prompts with k graded ones.",
    ),
    *_with_interval("eval/{benchmark}/greedy", "Prompts that greedy decoding gets right, of the graded."),
    Entry("eval/{benchmark}/length_mean", "tokens", R.MEAN, "Action tokens a sample."),
    Entry("eval/{benchmark}/truncated", "fraction", R.MEAN, "Samples ended by the token or turn budget."),
    Entry("eval/{benchmark}/greedy_length_mean", "tokens", R.MEAN, "Action tokens a greedy response."),
    Entry("eval/{benchmark}/greedy_truncated", "fraction", R.MEAN, "Greedy responses ended by the budget."),
    Entry(
        "eval/{benchmark}/distinct_correct",
        "responses/prompt",
        R.MEAN,
        "Different token sequences among a prompt's correct samples.",
    ),
    Entry("eval/{benchmark}/reflections", "words/response", R.MEAN, "Reflection words in samples."),
    Entry(
        "eval/{benchmark}/ungraded",
        "trajectories",
        R.SUM,
        "Samples and greedy responses without a grade (failed ones among them); they are in no accuracy.",
    ),
    Entry("eval/{benchmark}/failed", "trajectories", R.SUM, "Those that the engine or environment failed."),
    Entry("eval/{benchmark}/{source}/avg@{k}", "fraction", R.MEAN, "avg@k of one source of several."),
    Entry("eval/{benchmark}/{source}/pass@{k}", "fraction", R.MEAN, "pass@k of one source of several."),
    Entry("eval/{benchmark}/{source}/greedy", "fraction", R.MEAN, "Greedy accuracy of one source of several."),
    Entry("user/mean/{name}", "as reported", R.MEAN, "What code from outside this package reports as a mean."),
    Entry("user/sum/{name}", "as reported", R.SUM, "What code from outside this package reports as a sum."),
    Entry("user/max/{name}", "as reported", R.MAX, "The largest of what code from outside this package reports."),
)
