"""A policy in this process, by transformers: prompts in, text out."""

from __future__ import annotations

import tempfile
import tomllib
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from stare_megatron.data.chat import ChatTemplate
from stare_megatron.data.tokenizer import load_tokenizer
from stare_megatron.errors import UserError
from stare_megatron.host import device, program
from stare_megatron.host.exported import exported

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Message = dict[str, str]


@dataclass(frozen=True)
class Sampling:
    """`temperature` 0: greedy. `seed`: of the response's random numbers."""

    max_tokens: int
    temperature: float
    top_p: float
    samples: int
    seed: int

    def check(self) -> None:
        """Raises: UserError: out of range."""
        for name, value, least in (("samples", self.samples, 1), ("max-tokens", self.max_tokens, 1)):
            if value < least:
                raise UserError(f"--{name} {value}: at least {least}")
        if not 0 <= self.temperature <= 10:
            raise UserError(f"--temperature {self.temperature:g}: from 0 to 10")
        if not 0 < self.top_p <= 1:
            raise UserError(f"--top-p {self.top_p:g}: above 0 and at most 1")


@contextmanager
def hf_folder(policy: Path, say: Callable[[str], None]) -> Iterator[Path]:
    """The Hugging Face folder of a policy: itself, what its run exported, if that did not go on after it, or its newest
    training checkpoint, converted into a folder that is removed.

    Raises:
        UserError: no policy there.
    """
    found = policy if (policy / "config.json").is_file() else exported(policy)
    if found is not None:
        yield found
        return
    from rich.console import Console

    from stare_megatron.convert.run import Options, convert
    from stare_megatron.convert.source import resolve

    what = resolve(policy).what
    say(f"{what}, converted for this once; `{program.called()} convert {policy} FOLDER` keeps it")
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "hf"
        convert(Options(source=policy, out=out), Console(quiet=True))
        yield out


def asks_by_template(policy: Path, tokenizer: PreTrainedTokenizerBase) -> bool:
    """Whether its prompts are messages: of a run, as it was trained; else where there is a chat template."""
    data = _data(policy)
    return bool(tokenizer.chat_template) if data is None else bool(data.get("chat_template", False))


def template_variables(policy: Path) -> dict[str, Any]:
    """What the chat template of a run's policy finds set, as it was trained."""
    return (_data(policy) or {}).get("chat_template_kwargs", {})


def _data(policy: Path) -> dict[str, Any] | None:
    """The table `[data]` of the policy's run; None where it is of none."""
    file = next((f for f in [p / "config.toml" for p in (policy, *policy.parents[:2])] if f.is_file()), None)
    return None if file is None else tomllib.loads(file.read_text()).get("data", {})


class Policy:
    """A model and its tokenizer. `variables`: for its chat template.

    Raises:
        UserError: no such model, or one that does not fit its configuration.
    """

    def __init__(self, folder: Path, variables: Mapping[str, Any]) -> None:
        self.tokenizer = load_tokenizer(folder, variables)
        import transformers

        transformers.utils.logging.set_verbosity_error()
        transformers.utils.logging.disable_progress_bar()
        try:
            model: Any = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype="auto", local_files_only=True)
        except (OSError, ValueError, RuntimeError) as e:
            raise UserError(f"{folder}: transformers cannot load it: {str(e).strip().partition(chr(10))[0]}") from e
        self._model = model.to(device.torch_device(0)).eval()
        self._ends = self._model.generation_config.eos_token_id
        # What a call leaves open, `generate` takes from there.
        self._model.generation_config = transformers.GenerationConfig()

    def encode(self, prompt: str | Sequence[Message]) -> list[int]:
        """Tokens of a text, or of messages by the chat template.

        Raises:
            UserError: the template refuses the messages, or the tokenizer has none.
        """
        if isinstance(prompt, str):
            return self.tokenizer(prompt)["input_ids"]  # pyright: ignore[reportReturnType]
        try:
            text = ChatTemplate(self.tokenizer, "").render(list(prompt))
        except ValueError as e:
            raise UserError(f"{e}; --raw gives the prompt to the model as it is") from e
        return self.tokenizer(text, add_special_tokens=False)["input_ids"]  # pyright: ignore[reportReturnType]

    def respond(self, token_ids: list[int], how: Sampling, written: Callable[[str], None]) -> list[str]:
        """The responses. `written`: gets the text of a single one piece by piece.

        Raises:
            UserError: the prompt is empty, or leaves no room in the model's window.
        """
        import transformers

        class Stream(transformers.TextStreamer):
            def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
                written(text)

        room = self._model.config.max_position_embeddings - len(token_ids)
        if not token_ids or room < 1:
            raise UserError(f"the prompt has {len(token_ids)} tokens, the model's window {room + len(token_ids)}")
        transformers.set_seed(how.seed)
        ids = transformers.BatchEncoding(
            {"input_ids": [token_ids], "attention_mask": [[1] * len(token_ids)]}, tensor_type="pt"
        ).to(self._model.device)
        out = self._model.generate(
            **ids,
            generation_config=self._generation(how, min(how.max_tokens, room)),
            streamer=Stream(self.tokenizer, skip_prompt=True, skip_special_tokens=True) if how.samples == 1 else None,
        )
        return [str(self.tokenizer.decode(row[len(token_ids) :], skip_special_tokens=True)) for row in out.tolist()]

    def _generation(self, how: Sampling, most: int) -> Any:
        """As engines sample: of the checkpoint's own settings only the tokens that end a response."""
        import transformers

        drawn = {"temperature": how.temperature, "top_p": how.top_p, "top_k": 0} if how.temperature else {}
        return transformers.GenerationConfig(
            do_sample=how.temperature > 0,
            max_new_tokens=most,
            num_return_sequences=how.samples,
            eos_token_id=self.tokenizer.eos_token_id if self._ends is None else self._ends,
            pad_token_id=self.tokenizer.pad_token_id or 0,
            **drawn,
        )
