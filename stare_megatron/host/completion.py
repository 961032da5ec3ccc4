"""Completion for shells, from the parser of the command line: `stare-megatron completion bash`."""

from __future__ import annotations

import argparse
import shlex
from collections.abc import Iterable, Mapping, Sequence

from stare_megatron.errors import suggest

ABOUT = "print the completion of commands, options, keys and pages for a shell"
EXAMPLES = ("completion bash >> ~/.bashrc", "completion zsh >> ~/.zshrc")
SHELLS = ("bash", "zsh")

_BASH = """_stare_megatron() {{
    local cur=${{COMP_WORDS[COMP_CWORD]}} prev=${{COMP_WORDS[COMP_CWORD-1]}} words= options= value=
    local keys={keys}
    COMPREPLY=()
    compopt +o nospace 2>/dev/null
    if [ "$COMP_CWORD" -eq 1 ]; then
        COMPREPLY=($(compgen -W {commands} -- "$cur"))
        return
    fi
    case ${{COMP_WORDS[1]}} in
{cases}
    esac
    if [ -n "$value" ]; then
        COMPREPLY=($(compgen -W "$value" -- "$cur"))
    elif [[ $cur == -* ]]; then
        COMPREPLY=($(compgen -W "$options" -- "$cur"))
    elif [ -n "$words" ]; then
        COMPREPLY=($(compgen -W "$words" -- "$cur"))
        [[ ${{COMPREPLY[0]}} == *= ]] && compopt -o nospace 2>/dev/null
    fi
}}
complete -o default -F _stare_megatron stare-megatron
"""
_ZSH = "autoload -U +X compinit && compinit\nautoload -U +X bashcompinit && bashcompinit\n"


def script(parser: argparse.ArgumentParser, shell: str, keys: Iterable[str], pages: Mapping[str, Iterable[str]]) -> str:
    """What the shell reads. Where nothing else is known, files are completed.

    Args:
        keys: of the configuration; commands that take `key.sub=value` offer them.
        pages: a command's name -> what its argument may be.
    """
    commands = _commands(parser)
    cases = [_case(name, command, pages.get(name, ())) for name, command in commands.items()]
    made = _BASH.format(
        keys=shlex.quote(" ".join(f"{key}=" for key in keys)),
        commands=shlex.quote(" ".join(commands)),
        cases="\n".join(cases),
    )
    return made if shell == "bash" else _ZSH + made


def check_command(parser: argparse.ArgumentParser, words: Sequence[str]) -> None:
    """End with the name that was meant where a command line's first word is near one; argparse lists them all."""
    commands = _commands(parser)
    if words and words[0] not in commands and (meant := suggest(words[0], commands)):
        parser.error(f"no command {words[0]!r}{meant}")


def _commands(parser: argparse.ArgumentParser) -> Mapping[str, argparse.ArgumentParser]:
    (tree,) = (action for action in parser._actions if isinstance(action, argparse._SubParsersAction))
    return tree.choices


def _case(name: str, command: argparse.ArgumentParser, pages: Iterable[str]) -> str:
    actions = command._actions
    options = " ".join(option for action in actions for option in action.option_strings)
    words = " ".join([*pages, *(str(c) for a in actions if not a.option_strings for c in a.choices or ())])
    takes_keys = any("key.sub=value" in str(action.metavar) for action in actions)
    lines = [f"{name})", f"    options={shlex.quote(options)} words={shlex.quote(words)}"]
    if takes_keys:
        lines.append('    words="$words $keys"')
    values = [a for a in actions if a.option_strings and a.choices]
    if values:
        lines.append("    case $prev in")
        for action in values:
            chosen = shlex.quote(" ".join(map(str, action.choices or ())))
            lines.append(f"        {'|'.join(action.option_strings)}) value={chosen} ;;")
        lines.append("    esac")
    return "\n".join(f"        {line}" for line in [*lines, "    ;;"])
