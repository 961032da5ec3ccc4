"""Write docs/configuration.md from the configuration's models: `python tools/make_config_docs.py`."""

from __future__ import annotations

from pathlib import Path

from pydantic.fields import FieldInfo

from stare_megatron.config.describe import default_of, models_to, type_name
from stare_megatron.config.loader import walk

PAGE = Path(__file__).resolve().parents[1] / "docs" / "configuration.md"

_HEAD = """# Configuration

A run is one TOML file. Any key can be set on the command line, after the file, as `key.sub=value`; values are TOML, a
bare word is a string. An unknown key is an error that names the nearest one. Relative paths start at the current
directory.

    stare-megatron train run.toml rollout.group_size=16 run.name=wider
    stare-megatron train run.toml --print-config

The tables `[trainer.megatron]` and `[inference.vllm]` take further fields of Megatron-Core's `TransformerConfig` and of
vLLM's `EngineArgs` by their upstream names, checked against the installed packages. Fields that have a key here, or
that the checkpoint or the run decides, are refused there.

Written by `python tools/make_config_docs.py` from `stare_megatron/config/`.
"""


def page() -> str:
    """The whole page."""
    tables: dict[str, list[str]] = {}
    for key in walk():
        section, _, name = key.name.rpartition(".")
        meaning = _cell(key.field.description or "")
        line = f"| `{name}` | {type_name(key.field.annotation)} | {default_of(key.field)} | {meaning} |"
        tables.setdefault(section, []).append(line)
    parts = [_HEAD]
    for section, lines in tables.items():
        title = f"[{section}]" if _one_table(section) else f"[[{section}]]"
        parts.append(f"\n## {title}\n\n{_about(section)}\n\n| key | type | default | meaning |\n|---|---|---|---|\n")
        parts.append("\n".join(lines) + "\n")
    return "".join(parts)


def _one_table(section: str) -> bool:
    return "." not in section or isinstance(_field(section).annotation, type)


def _about(section: str) -> str:
    return _field(section).description or ""


def _field(section: str) -> FieldInfo:
    return models_to(section)[-2].model_fields[section.rpartition(".")[2]]


def _cell(text: str) -> str:
    return text.replace("|", "\\|")


if __name__ == "__main__":
    PAGE.write_text(page())
