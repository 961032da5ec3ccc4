"""Dr. GRPO (arXiv 2503.20783, section 3.2): GRPO without its two biases, of length and of difficulty.

A = reward - group mean, no division by the standard deviation
loss = sum over tokens of l / (number of sequences * response_tokens): a constant in place of each sequence's length

Both are settings that `methods.METHODS` fixes for this name; the token loss is GRPO's.
"""

from __future__ import annotations

from stare_megatron.algo.algorithm import Algorithm
from stare_megatron.algo.losses.grpo import grpo_loss

ALGORITHM = Algorithm(grpo_loss)
