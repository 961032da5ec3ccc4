"""What `stare-megatron sample` does, and what it says."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from dataclasses import dataclass

from stare_megatron.chat.policy import Message, Policy, Sampling, asks_by_template, hf_folder, template_variables
from stare_megatron.errors import UserError
from stare_megatron.host.signals import interruptible


@dataclass(frozen=True)
class Screen:
    """`write`: responses, piece by piece, which may go to a file. `say`: a line beside them."""

    write: Callable[[str], None]
    say: Callable[[str], None]


def run(args: argparse.Namespace, screen: Screen) -> int:
    """Answer the prompt, or each line that is typed until Ctrl-D or Ctrl-C.

    Raises:
        UserError: no policy there, an option out of range, or a prompt that it cannot take.
    """
    how = Sampling(args.max_tokens, args.temperature, args.top_p, args.samples, args.seed)
    how.check()
    with interruptible(), hf_folder(args.policy, screen.say) as folder:  # which a closed terminal would leave
        policy = Policy(folder, template_variables(args.policy))
        chat = args.chat or (not args.raw and asks_by_template(args.policy, policy.tokenizer))
        if args.system and not chat:
            raise UserError("--system is for a chat template, and prompts are given as they are; add --chat")
        start: list[Message] = [{"role": "system", "content": args.system}] if args.system else []
        if args.prompt:
            _answer(policy, args.prompt, how, start if chat else None, screen.write)
            return 0
        form = "as chat messages, /new starts a new conversation" if chat else "as they are, each by itself"
        screen.say(f"{args.policy}: prompts are given {form}; Ctrl-D ends")
        _talk(policy, how, start if chat else None, screen)
    return 0


def _talk(policy: Policy, how: Sampling, start: list[Message] | None, screen: Screen) -> None:
    """`start`: what a conversation begins with; None: there is none, each line is a prompt of its own."""
    said = list(start or [])
    while True:
        try:
            line = input("> ")
        except (EOFError, KeyboardInterrupt):
            screen.say("")
            return
        if line.strip() == "/new" and start is not None:
            said = list(start)
        elif line.strip():
            try:
                responses = _answer(policy, line, how, None if start is None else said, screen.write)
            except UserError as e:
                screen.say(str(e))
                continue
            if start is not None:
                said += [{"role": "user", "content": line}, {"role": "assistant", "content": responses[0]}]


def _answer(
    policy: Policy, prompt: str, how: Sampling, before: list[Message] | None, write: Callable[[str], None]
) -> list[str]:
    """Write the responses to a prompt, behind the messages `before` it; None: it is no message."""
    asked = prompt if before is None else [*before, {"role": "user", "content": prompt}]
    responses = policy.respond(policy.encode(asked), how, write)
    if how.samples == 1:
        write("\n")
    else:
        for number, text in enumerate(responses, 1):
            write(f"--- {number}\n{text}\n")
    return responses
