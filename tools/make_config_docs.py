"""Write docs/configuration.md from the configuration's models: `python tools/make_config_docs.py`."""

from __future__ import annotations

from pathlib import Path

from stare_megatron.config import all_keys
from stare_megatron.config.describe import default_of, field_of, models_to, type_name

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

Written by `python tools/make_config_docs.py` from `stare_megatron/config.py`.
"""


def page() -> str:
    """The whole page."""
    tables: dict[str, list[str]] = {}
    for key, meaning in all_keys().items():
        section, _, name = key.rpartition(".")
        field = field_of(key)
        line = f"| `{name}` | {type_name(field.annotation)} | {default_of(field)} | {_cell(meaning)} |"
        tables.setdefault(section, []).append(line)
    parts = [_HEAD]
    for section, lines in tables.items():
        title = f"[{section}]" if _one_table(section) else f"[[{section}]]"
        parts.append(f"\n## {title}\n\n{_about(section)}\n\n| key | type | default | meaning |\n|---|---|---|---|\n")
        parts.append("\n".join(lines) + "\n")
    return "".join(parts)


def _one_table(section: str) -> bool:
    return isinstance(field_of(section).annotation, type) if "." in section else True


def _about(section: str) -> str:
    parent = models_to(section)[-2]
    return parent.model_fields[section.rpartition(".")[2]].description or ""


def _cell(text: str) -> str:
    return text.replace("|", "\\|")


if __name__ == "__main__":
    PAGE.write_text(page())
