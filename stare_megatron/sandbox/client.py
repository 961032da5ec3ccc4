"""What callers hold: a box that runs code, here or elsewhere, and how to make the one that `[sandbox]` asks for."""

from __future__ import annotations

import contextlib
import math
from collections.abc import AsyncIterator
from typing import Protocol

from stare_megatron.config.sandbox import SandboxConfig
from stare_megatron.sandbox.pool import Sandbox
from stare_megatron.sandbox.remote import RemoteSandbox
from stare_megatron.sandbox.result import Result
from stare_megatron.sandbox.session import Session


class SandboxClient(Protocol):
    """`Sandbox` on this machine, `RemoteSandbox` on a server."""

    async def run(self, code: str, stdin: str = "", *, echo: bool = False, seconds: float = math.inf) -> Result:
        """Run a program from a fresh state."""
        ...

    def session(self) -> contextlib.AbstractAsyncContextManager[Session]:
        """A state kept across cells."""
        ...

    async def check(self) -> bool:
        """Whether a call gets through now."""
        ...


@contextlib.asynccontextmanager
async def open_sandbox(config: SandboxConfig) -> AsyncIterator[SandboxClient]:
    """The box of `[sandbox]`: a server if `url` is set, else this machine.

    Raises:
        UserError: the required level is not available, or no server answers.
        RunError: no worker starts.
    """
    box = RemoteSandbox(config) if config.url else Sandbox(config)
    async with box:
        yield box
