"""Write docs/configuration.md from the configuration's models: `python tools/make_config_docs.py`."""

from __future__ import annotations

from pathlib import Path

from pydantic.fields import FieldInfo

from stare_megatron.config import SftConfig, upstream
from stare_megatron.config.describe import default_of, models_to, type_name
from stare_megatron.config.loader import Key, walk

PAGE = Path(__file__).resolve().parents[1] / "docs" / "configuration.md"

_HEAD = """# Configuration

A run is one TOML file. Any key can be set on the command line, after the file, as `key.sub=value`; values are TOML, a
bare word is a string.

    stare-megatron train run.toml rollout.group_size=16 run.name=wider
    stare-megatron train run.toml --print-config

**Every key does something, or is refused.** An unknown key or name is an error that says the nearest one. Where a
setting would do nothing beside another (a `min_lr` under a constant schedule, a warm-up longer than the run), or would
mean another thing than it says (a temperature that vLLM would raise to 0.01), the start is refused with both keys and
the cure. Settings of a part that is switched off wait for it: `[eval]` without `benchmarks`, the section of another
method.

* Paths: `~`, `$HOME` and `${VARIABLE}` are expanded, and a variable that is not defined is refused. A relative path
  starts at the current directory, also for processes that run elsewhere; this holds on the command line too.
* Names (of methods, rewards, environments, choices) are written in lower case, as listed.
* Lists hold no entry twice and no empty string; `"a"` is `["a"]`.
* Numbers are finite. Where a key sets no bounds of its own, whole numbers are below 2^31, others at most 1e9 and not
  smaller than 1e-30.

## Files that share settings

```toml
include = "../base/long_cot.toml"   # or a list; relative to this file

[rollout]
max_response_tokens = 24576         # this file's own keys win, later files over earlier ones
```

Tables are merged key by key; a list is a value, and is replaced whole. Included files may include others. A file that
is not there, files that include each other, and a table in one where another has a value are refused; a message about a
value names the file that it came from, or the command line. A run records what came out (`config.toml` of its folder),
which includes nothing.

## Options of Megatron-Core and vLLM

`[trainer.megatron]` and `[inference.vllm]` take these fields of Megatron-Core's `TransformerConfig` and of vLLM's
`EngineArgs`, by their upstream names. All others are refused with the reason: the checkpoint or the run decides them,
the layers here do not read them, or engine and trainer would compute different things. Those for Transformer Engine
are passed on and not run by the tests. To try another one, add it to
`stare_megatron/config/upstream.py` with a test of what it does.

{options}
Written by `python tools/make_config_docs.py` from `stare_megatron/config/`.
"""

_COLUMNS = "| key | type | default | meaning |\n|---|---|---|---|\n"


def page() -> str:
    """The whole page."""
    tables: dict[str, list[str]] = {}
    for key in walk():
        tables.setdefault(key.name.rpartition(".")[0], []).append(_line(key))
    parts = [_HEAD.replace("{options}", _options())]
    for section, lines in tables.items():
        title = f"[{section}]" if _one_table(section) else f"[[{section}]]"
        parts.append(f"\n## {title}\n\n{_about(section)}\n\n{_COLUMNS}")
        parts += lines
    return "".join([*parts, _SFT, *_sft()])


_SFT = """
## stare-megatron sft

[Supervised training](sft.md) reads a file of its own, with these tables and, as above, `[model]`, `[trainer]`,
`[checkpoint]`, `[logging]`, `[cluster]` and `[watchdog]`. `[run]` has the keys above, but `run.steps` may be left out.
"""


def _sft() -> list[str]:
    """The tables that `train` has not, or has otherwise."""
    parts = []
    for table in ("data", "sft"):
        about = SftConfig.model_fields[table].description
        parts.append(f"\n### [{table}] of sft\n\n{about}\n\n{_COLUMNS}")
        parts += [_line(key) for key in walk(root=SftConfig) if key.name.startswith(f"{table}.")]
    steps = next(key for key in walk(root=SftConfig) if key.name == "run.steps")
    parts.append(f"\n### [run] of sft\n\n{_COLUMNS}{_line(steps)}")
    return parts


def _line(key: Key) -> str:
    name, field = key.name.rpartition(".")[2], key.field
    return f"| `{name}` | {type_name(field.annotation)} | {default_of(field)} | {_cell(field.description or '')} |\n"


def _options() -> str:
    lines = ["| option | value | note |", "|---|---|---|"]
    for table, options in (
        ("trainer.megatron", upstream.MEGATRON_OPTIONS),
        ("inference.vllm", upstream.ENGINE_OPTIONS),
    ):
        for name, option in options.items():
            need = upstream.NEEDS[option.needs].partition(";")[0].partition(",")[0] if option.needs else ""
            lines.append(f"| `{table}.{name}` | {option.wants} | {need} |")
    return "\n".join(lines) + "\n"


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
