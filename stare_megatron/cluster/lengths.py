"""How long the responses to a prompt are going to be, from how long those before were."""

from __future__ import annotations

from collections.abc import Sequence

from stare_megatron.types import Prompt

_NEW = 0.5  # weight of a prompt's newest group: the policy that sampled it is the nearest to the one of now
_NEW_OF_MANY = 0.05
_ALL = None


class Lengths:
    """Running means, of each prompt, of each source and of all.

    Kept in memory only: what is expected says when a group is sampled and where, never what is sampled, and a run that
    is resumed learns it again.
    """

    def __init__(self) -> None:
        self._prompts: dict[str, float] = {}
        self._sources: dict[str | None, float] = {}

    def saw(self, prompt: Prompt, tokens: Sequence[int]) -> None:
        """A group of `prompt` had so many action tokens in each sample."""
        found = sum(tokens) / len(tokens)
        before = self._prompts.get(prompt.id, found)
        self._prompts[prompt.id] = before + _NEW * (found - before)
        for source in (prompt.source, _ALL):
            before = self._sources.get(source, found)
            self._sources[source] = before + _NEW_OF_MANY * (found - before)

    def expected(self, prompt: Prompt) -> float:
        """Tokens of a response: the prompt's own mean, or its source's, or that of all; 0: nothing is known."""
        known = (self._prompts.get(prompt.id), self._sources.get(prompt.source), self._sources.get(_ALL))
        return next((mean for mean in known if mean is not None), 0.0)
