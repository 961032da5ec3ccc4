"""Generated tasks: name -> task. A task here is also a reward of the same name."""

from __future__ import annotations

from stare_megatron.errors import UserError, suggest
from stare_megatron.tasks import number_walk, order_free_sum, tool_arithmetic
from stare_megatron.tasks.base import Task

_TASKS: tuple[Task, ...] = (order_free_sum.TASK, order_free_sum.LARGE, number_walk.TASK, tool_arithmetic.TASK)
TASKS: dict[str, Task] = {task.name: task for task in _TASKS}


def get(name: str) -> Task:
    """The task of that name.

    Raises:
        UserError: there is none.
    """
    if name not in TASKS:
        raise UserError(f"unknown task {name!r} (there are {', '.join(sorted(TASKS))}){suggest(name, TASKS)}")
    return TASKS[name]
