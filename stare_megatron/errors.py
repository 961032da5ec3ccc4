"""The error model, on one page.

* Data: a bad rollout (truncated, failed, not graded) is a `Status` on its trajectory. It is counted and, where it
  cannot be learned from, masked. Nothing is raised.
* `UserError`: the user's configuration, files or machine are wrong. Raised before anything is started, printed as one
  line that names the culprit and the cure, exit code 2.
* `RunError`: the run cannot go on (non-finite loss, an engine that disagrees with the trainer, a dead actor). The run
  stops with one line that names the culprit, exit code 1; it resumes from its last checkpoint.
* Anything else is a bug, and shows its traceback.
"""

from __future__ import annotations


class UserError(Exception):
    """Something the user can mend. The message is one line: what is wrong, where, and the cure."""


class RunError(Exception):
    """The run must stop. The message is one line naming the culprit."""
