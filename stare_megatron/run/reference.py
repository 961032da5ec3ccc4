"""What must hold of the folder of a reference policy, before anything is started. No torch."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import TYPE_CHECKING

from stare_megatron.config import Config
from stare_megatron.data.tokenizer import has_tokenizer, load_tokenizer
from stare_megatron.errors import UserError
from stare_megatron.models import weights
from stare_megatron.models.families import read_hf_config
from stare_megatron.models.shape import ModelShape

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_KEY = "algorithm.kl.reference"


def check_reference(config: Config, shape: ModelShape) -> None:
    """`shape`: the policy's.

    Raises:
        UserError: no such folder, one without weights or tokenizer, or a model of another shape.
    """
    if not config.algorithm.kl.on or not config.algorithm.kl.reference:
        return
    folder = Path(config.algorithm.kl.reference)
    if not (folder / "config.json").is_file():
        raise UserError(f"{_KEY} = {str(folder)!r}: not a Hugging Face folder (no config.json)")
    own = dataclasses.replace(read_hf_config(folder), max_positions=shape.max_positions)
    differ = [f.name for f in dataclasses.fields(shape) if vars(own)[f.name] != vars(shape)[f.name]]
    if differ:
        name = differ[0]
        raise UserError(
            f"{_KEY} = {str(folder)!r}: another model than model.path = {str(config.model.path)!r}: {name} is "
            f"{vars(own)[name]}, not {vars(shape)[name]}; the reference must have the policy's architecture and "
            "vocabulary"
        )
    weights.check(folder, own)
    if not has_tokenizer(folder):
        raise UserError(f"{_KEY} = {str(folder)!r}: no tokenizer; copy the tokenizer's files beside config.json")


def check_reference_tokenizer(config: Config, tokenizer: PreTrainedTokenizerBase) -> None:
    """`tokenizer`: the policy's.

    Raises:
        UserError: a token has another id under the reference.
    """
    if not config.algorithm.kl.on or not config.algorithm.kl.reference:
        return
    folder = Path(config.algorithm.kl.reference)
    mine, other = tokenizer.get_vocab(), load_tokenizer(folder).get_vocab()
    differ = sorted(token for token in mine.keys() | other.keys() if mine.get(token) != other.get(token))
    if differ:
        raise UserError(
            f"{_KEY} = {str(folder)!r}: its tokenizer is not that of model.path: {len(differ)} tokens have another id, "
            f"such as {differ[0]!r}; the two must have one vocabulary"
        )
