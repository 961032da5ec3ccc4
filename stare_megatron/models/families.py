"""The registry of architectures. Pure Python: a driver can check a checkpoint with it."""

from __future__ import annotations

import os
from pathlib import Path

from stare_megatron.errors import UserError, suggest
from stare_megatron.host.files import read_object
from stare_megatron.models import llama, mistral, mixtral, phi3, qwen2, qwen2_moe, qwen3, qwen3_moe
from stare_megatron.models.shape import Family, Fields, ModelShape

FAMILIES: dict[str, Family] = {
    "llama": llama.FAMILY,
    "mistral": mistral.FAMILY,
    "mixtral": mixtral.FAMILY,
    "phi3": phi3.FAMILY,
    "qwen2": qwen2.FAMILY,
    "qwen2_moe": qwen2_moe.FAMILY,
    "qwen3": qwen3.FAMILY,
    "qwen3_moe": qwen3_moe.FAMILY,
}


def read_hf_config(path: Path) -> ModelShape:
    """The shape of the checkpoint in folder `path`.

    Raises:
        UserError: no readable config.json, an unsupported architecture, or a field that is not understood.
    """
    file = path / "config.json"
    name = os.path.relpath(path)
    if not path.exists() and name.count("/") == 1 and not name.startswith(".."):
        fetch = f"hf download {name} --local-dir {name}"
        raise UserError(f"model.path = {str(path)!r}: no such folder; to fetch it from the Hugging Face hub: {fetch}")
    if not path.exists():
        raise UserError(f"model.path = {str(path)!r}: no such folder; set it, or make what it names first")
    inner = [found.parent for found in sorted(path.glob("*/config.json"))]
    meant = f" = {str(inner[0])!r}" if len(inner) == 1 else ""
    fields = read_object(file, f": not a Hugging Face checkpoint; set model.path{meant}")
    family = FAMILIES.get(str(fields.get("model_type")))
    architectures = fields.get("architectures") or []
    if not isinstance(architectures, list):
        raise UserError(f"{file}: architectures = {architectures!r:.60} should be a list")
    if family is None or (architectures and family.architecture not in architectures):
        what = ", ".join(map(str, architectures)) or f"model_type {fields.get('model_type')!r}"
        known = ", ".join(f.architecture for f in FAMILIES.values())
        near = suggest(str(fields.get("model_type")), FAMILIES) if family is None else ""
        raise UserError(f"{file}: architecture {what} is not supported; supported are {known}{near}")
    reader = Fields(file, fields)
    shape = family.read(reader)
    reader.finish()
    return shape
