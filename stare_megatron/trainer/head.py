"""The policy's output layer: only positions that carry a loss meet it, all at once or in chunks that are recomputed."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from megatron.core.models.gpt.gpt_model import GPTModel
from megatron.core.tensor_parallel import gather_from_sequence_parallel_region

from stare_megatron.trainer.logprobs import head_log_probs, head_token_scores, log_probs, token_scores
from stare_megatron.trainer.partials import TokenScores, VocabShard


class PolicyModel(GPTModel):
    """Upstream's model, whose last stage can stop before the output layer.

    `model(..., rows_R=None)` gives logits [1, P, V_local]. With `rows_R` (int64 [R], positions of the packed row) the
    last stage gives the hidden states of those positions instead, [R, H], whole under sequence parallelism: prompts and
    tool output cost neither GEMM nor logits. Multi-token prediction is not supported.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._rows_R: torch.Tensor | None = None
        if self.post_process:
            # Positions are picked from all of them, so the gather of sequence parallelism comes before the output
            # layer, which then sums its input's gradient over TP itself.
            self.output_layer.sequence_parallel = False
            self.output_layer.allreduce_dgrad = self.config.tensor_model_parallel_size > 1

    def forward(self, *args: Any, rows_R: torch.Tensor | None = None, **kwargs: Any) -> torch.Tensor:
        self._rows_R = rows_R
        return super().forward(*args, **kwargs)

    def _postprocess(self, hidden_states: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        """Called by upstream's forward (0.16 to 0.19) with the decoder's output [P, 1, H]."""
        if not self.post_process:
            return hidden_states
        if self.config.sequence_parallel:
            # Every TP rank has the whole gradient of the gathered states: the backward only takes this rank's part.
            hidden_states = gather_from_sequence_parallel_region(hidden_states, tensor_parallel_output_grad=False)
        if self._rows_R is not None:
            return hidden_states[:, 0].index_select(0, self._rows_R)
        return self.logits(hidden_states[:, 0])[None]

    def output_weight(self) -> torch.Tensor:
        """The output layer's weight on this rank, [V_local, H]; the embedding's when tied."""
        if self.share_embeddings_and_output_weights:
            return self.shared_embedding_or_output_weight()
        return self.output_layer.weight  # pyright: ignore[reportReturnType]

    def logits(self, hidden_RH: torch.Tensor) -> torch.Tensor:
        """[R, H] to [R, V_local]; the gradient of the hidden states is summed over TP."""
        logits_R1V, _ = self.output_layer(hidden_RH[:, None], weight=self.output_weight())
        return logits_R1V.squeeze(1)  # a view backward too: an index would copy the whole gradient into zeros


@dataclass(frozen=True, eq=False)
class Head:
    """Hidden states in, log-probs out, on the last pipeline stage.

    `chunk_tokens`: 0, all logits of a micro-batch exist at once and are kept for the backward; else at most
    `chunk_tokens` rows of logits exist at any time, made once more in the backward. The two agree to rounding.
    """

    model: PolicyModel
    vocab: VocabShard
    chunk_tokens: int

    def token_scores(self, hidden_RH: torch.Tensor, target_R: torch.Tensor, *, temperature: float) -> TokenScores:
        """As `logprobs.token_scores`, of the rows of `hidden_RH`; no graph."""
        if not self.chunk_tokens:
            return token_scores(self.model.logits(hidden_RH), target_R, self.vocab, temperature=temperature)
        weight_VH = self.model.output_weight()
        return head_token_scores(
            hidden_RH, weight_VH, target_R, self.vocab, temperature=temperature, chunk=self.chunk_tokens
        )

    def log_probs(
        self,
        hidden_RH: torch.Tensor,
        target_R: torch.Tensor,
        *,
        temperature: float,
        entropy_gradient: bool,
        sensitivity: bool,
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """As `logprobs.log_probs`, differentiable in the hidden states and the output weight; then S, which has no
        gradient: 0 unless `sensitivity`, which costs a second read of the logits (in chunks: a second making)."""
        how = {"temperature": temperature, "entropy_gradient": entropy_gradient}
        if self.chunk_tokens:
            weight_VH, chunk = self.model.output_weight(), self.chunk_tokens
            logprob_R, entropy_R = head_log_probs(hidden_RH, weight_VH, target_R, self.vocab, chunk=chunk, **how)
            sensitivity_R = torch.zeros_like(logprob_R)
            if sensitivity:
                sensitivity_R = self.token_scores(hidden_RH.detach(), target_R, temperature=temperature).sensitivity_T
            return logprob_R, entropy_R, sensitivity_R
        logits_RV = self.model.logits(hidden_RH)
        logprob_R, entropy_R = log_probs(logits_RV, target_R, self.vocab, **how)
        sensitivity_R = torch.zeros_like(logprob_R)
        if sensitivity:  # the logits are whole until the backward overwrites them
            found = token_scores(logits_RV.detach(), target_R, self.vocab, temperature=temperature)
            sensitivity_R = found.sensitivity_T
        return logprob_R, entropy_R, sensitivity_R
