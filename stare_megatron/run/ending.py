"""How a run ends that did not come to its end."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from types import TracebackType

from stare_megatron.data.tokenizer import first_line
from stare_megatron.errors import RunError, UserError
from stare_megatron.metrics.events import Events
from stare_megatron.run import folder as run_folder


@contextlib.contextmanager
def on_record(events: Events) -> Iterator[None]:
    """What ends the run before its end is an event of it."""
    try:
        yield
    except (RunError, KeyboardInterrupt) as e:
        events.happened("run", "FAILED", "stopped at once" if isinstance(e, KeyboardInterrupt) else first_line(e))
        raise


def ended(
    folder: run_folder.RunFolder,
    how_to_go_on: Callable[[], str],
    kind: type[BaseException] | None,
    error: BaseException | None,
    trace: TracebackType | None,
) -> None:
    """Say below an error that ended the run what is left of it. The folder goes if that is nothing, unless its logs are
    needed. For an ExitStack's `push`, the first two arguments given."""
    if isinstance(error, UserError | KeyboardInterrupt):
        run_folder.discard(folder)
    if error is not None and folder.path.exists():
        error.add_note(how_to_go_on())
