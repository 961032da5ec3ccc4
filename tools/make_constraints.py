"""Write the versions of an environment in which the suite passed, as constraints for pip.

.venv/bin/python tools/make_constraints.py            # tools/constraints/cpu-py311.txt under Python 3.11

Run it in the environment of `make venv`. In the file are the packages that the extras `cpu` and `dev` lead to, without
others that lie in the environment and without those that tools/make_venv.sh takes out again.
"""

from __future__ import annotations

import argparse
import datetime
import platform
import sys
import tomllib
from importlib import metadata
from pathlib import Path

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).parents[1]
EXTRAS = ("cpu", "dev")

_HEAD = """\
# Every package of the CPU environment at the version with which the suite passed: Python {python}, {system}, {date}.
# Written by `.venv/bin/python tools/make_constraints.py`; used by `make venv CONSTRAINTS={name}`, or `pip install -c`.
"""


def asked() -> list[str]:
    """The requirements of pyproject.toml and its extras `cpu` and `dev`, which an older install's metadata may lack."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    return project["dependencies"] + [line for extra in EXTRAS for line in project["optional-dependencies"][extra]]


def pins(requirements: list[str]) -> dict[str, str]:
    """Version by normalised name of all installed packages that requirements lead to.

    One whose marker is false here is left out, as is a package's that is not installed, with what only it leads to.

    Raises:
        PackageNotFoundError: one of `requirements` is not installed.
    """
    found: dict[str, str] = {}
    seen: set[tuple[str, str]] = set()
    first = [r for r in map(Requirement, requirements) if _applies(r, {""})]
    for requirement in first:
        metadata.distribution(requirement.name)
    queue = [*first]
    while queue:
        requirement = queue.pop()
        name = canonicalize_name(requirement.name)
        new = {(name, extra) for extra in {"", *requirement.extras}} - seen
        if not new:
            continue
        seen |= new
        try:
            package = metadata.distribution(name)
        except metadata.PackageNotFoundError:
            continue
        found[name] = package.version
        queue += [r for r in map(Requirement, package.requires or []) if _applies(r, {extra for _, extra in new})]
    return dict(sorted(found.items()))


def _applies(requirement: Requirement, extras: set[str]) -> bool:
    return requirement.marker is None or any(requirement.marker.evaluate({"extra": extra}) for extra in extras)


def page(name: str) -> str:
    """Text of the file that `make venv CONSTRAINTS=NAME` names."""
    head = _HEAD.format(
        python=platform.python_version(),
        system=f"{platform.system()} {platform.machine()}",
        date=datetime.date.today(),
        name=name,
    )
    return head + "".join(f"{package}=={version}\n" for package, version in pins(asked()).items())


def main(argv: list[str]) -> int:
    default = Path("tools/constraints") / f"cpu-py{sys.version_info.major}{sys.version_info.minor}.txt"
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=ROOT / default, help=f"file to write (default: {default})")
    args = parser.parse_args(argv)
    args.out.parent.mkdir(parents=True, exist_ok=True)
    args.out.write_text(page(default.as_posix()))
    print(args.out)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
