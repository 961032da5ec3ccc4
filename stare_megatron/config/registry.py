"""Objects that a table names: registered ones, and the user's own as `package.module:object` or `path/file.py:object`.

The object says which settings it has. A registered name and the user's address give the same kind of object, and
everything after the look-up treats them alike.
"""

from __future__ import annotations

import contextlib
import hashlib
import importlib
import importlib.util
import operator
import os
import sys
import traceback
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any, ClassVar, Generic, TypeVar

from pydantic import Field, SerializeAsAny, SerializerFunctionWrapHandler, model_serializer, model_validator

from stare_megatron.config import beside
from stare_megatron.config.base import Section
from stare_megatron.errors import ORDINARY, UserError, nearest
from stare_megatron.host import paths

FORMS = "package.module:object or path/to/file.py:object"
# What others call a reward, environment or method -> its name here.
_SYNONYMS = {
    **dict.fromkeys(
        ("gsm8k", "math_verify", "math500", "aime", "aime24", "amc", "deepscaler", "math_dapo", "prime_math", "boxed"),
        "math",
    ),
    **dict.fromkeys(("accuracy", "rule_based", "minerva", "mathematics", "numeric", "dapo_math"), "math"),
    **dict.fromkeys(("exact_match", "string_match", "equals", "equality", "em"), "exact"),
    **dict.fromkeys(("gym", "reasoning"), "reasoning_gym"),
    **dict.fromkeys(
        ("multi_turn", "agent", "tool", "tools", "tool_call", "tool_calling", "code_interpreter", "python", "retool"),
        "tool_use",
    ),
    **dict.fromkeys(("none", "default", "chat", "single"), "single_turn"),
    **dict.fromkeys(("ppo", "reinforce"), "grpo"),
    **dict.fromkeys(("clip_higher", "decoupled_clip"), "dapo"),
    **dict.fromkeys(("80_20", "forking_tokens", "entropy_mask"), "high_entropy_tokens"),
    "reinforce_plus_plus": "w_reinforce",
}


@dataclass(frozen=True, kw_only=True)
class Kind:
    """What the configuration knows of an object that a table names.

    `settings`: its own settings; `Section` itself: none. `columns`: columns of the data files that it reads from
    `Prompt.extra`; they are added to `data.extra_keys`.
    """

    settings: type[Section] = Section
    columns: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if not (isinstance(self.settings, type) and issubclass(self.settings, Section)):
            raise TypeError(f"settings = {self.settings!r} is no subclass of stare_megatron.config.Section")

    def columns_of(self, settings: Any) -> tuple[str, ...]:
        """`columns`, where these settings decide no others."""
        return self.columns

    def addresses_of(self, settings: Any) -> Mapping[str, str]:
        """The further objects that these settings name, by their keys below the table: label -> name or address."""
        return {}


def is_address(name: str) -> bool:
    """Whether the name is an address and not a registered name."""
    return ":" in name


def absolute(name: str) -> str:
    """The name; of an address with a file, with its path made absolute (`paths.absolute`, which may raise)."""
    where, colon, what = name.rpartition(":")
    return f"{paths.absolute(where)}:{what}" if colon and where.endswith(".py") else name


def source_file(address: str) -> Path | None:
    """The file that a loaded address came from; None for a registered name and a module without a file."""
    if not is_address(address):
        return None
    file = sys.modules[_module_name(address.rpartition(":")[0])].__file__
    return Path(file) if file else None


def load_object(address: str, key: str) -> Any:
    """The object at an address. A process loads a file once; what it imports is looked for in its folder last.

    `key` names the setting in errors.

    Raises:
        UserError: no such file, module or object, or an exception while it is imported.
    """
    fault = f"{key} = {address!r}"
    try:
        where, _, name = absolute(address).rpartition(":")
    except ValueError as e:
        raise UserError(f"{fault}: {e}") from e
    if not where or not all(part.isidentifier() for part in name.split(".")):
        raise UserError(f"{fault}: not of the form {FORMS}")
    module = sys.modules.get(_module_name(where)) or _import(where, fault)
    try:
        return operator.attrgetter(name)(module)
    except AttributeError as e:
        names = [n for n in vars(module) if not n.startswith("_")]
        near = nearest(name, names)
        hint = f"did you mean {near!r}?" if near else f"it has {', '.join(names) or 'no names'}"
        raise UserError(f"{fault}: {where} has no {name!r}; {hint}") from e


def _module_name(where: str) -> str:
    """What a module is called in `sys.modules`: the same in every process, so that its objects can be pickled."""
    if not where.endswith(".py"):
        return where
    path = paths.absolute(where)
    return f"stare_user_{path.stem}_{hashlib.blake2b(os.fsencode(path), digest_size=6).hexdigest()}"


def _import(where: str, fault: str) -> ModuleType:
    try:
        return _import_file(Path(where), fault) if where.endswith(".py") else importlib.import_module(where)
    except ORDINARY as e:
        if isinstance(e, ModuleNotFoundError) and e.name and f"{where}.".startswith(f"{e.name}."):
            raise UserError(
                f"{fault}: no module named {e.name!r}; install it, put its folder on PYTHONPATH, or give "
                "path/to/file.py:object"
            ) from e
        last = traceback.extract_tb(e.__traceback__)[-1]
        place = (e.filename, e.lineno) if isinstance(e, SyntaxError) else (last.filename, last.lineno)
        said = (str(e).splitlines() or [""])[0]
        cure = ""
        if isinstance(e, ModuleNotFoundError):
            cure = f"; install it in this environment ({sys.prefix}), or put its folder on PYTHONPATH"
        elif isinstance(e, AttributeError | ImportError) and (taken := beside.hidden(Path(last.filename))):
            cure = f"; {taken} has the name of a package, which is what an import gives: rename it"
        raise UserError(f"{fault}: cannot be imported: {place[0]}:{place[1]}: {type(e).__name__}: {said}{cure}") from e


def _import_file(path: Path, fault: str) -> ModuleType:
    if not path.is_file():
        raise UserError(f"{fault}: there is no file {path}; a relative path starts at the current directory")
    name = _module_name(str(path))
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec
    assert spec.loader
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    beside.serve(path.parent, name)
    with contextlib.ExitStack() as undo:
        undo.callback(sys.modules.pop, name)
        spec.loader.exec_module(module)
        undo.pop_all()
    return module


K = TypeVar("K", bound=Kind)


class Registry(dict[str, K], Generic[K]):
    """The registered kinds by name. Asked for an address, it loads the user's object.

    `adapt`: what else, besides a `kind`, is taken from a user; it raises TypeError with the reason for what is not.
    """

    def __init__(
        self, key: str, kind: type[K], registered: Mapping[str, K], adapt: Callable[[object], K] | None = None
    ) -> None:
        super().__init__(registered)
        self._key = key
        self._kind = kind
        self._adapt = adapt

    def __missing__(self, name: str) -> K:
        """Raises: UserError: not registered and no address, or an object of another kind."""
        fault = f"{self._key} = {name!r}"
        if not is_address(name):
            known = {other: ours for other, ours in _SYNONYMS.items() if ours in self}
            meant = nearest(name, self, known) or (f"{name}:OBJECT" if name.endswith(".py") else "")
            hint = f" (did you mean {meant!r}?)" if meant else ""
            raise UserError(f"{fault} is not registered{hint}; use one of {', '.join(sorted(self))}, or give {FORMS}")
        found = load_object(name, self._key)
        if isinstance(found, self._kind):
            return found
        if self._adapt is None:
            raise UserError(f"{fault}: is of type {type(found).__name__}, want {self._kind.__name__}")
        try:
            return self._adapt(found)
        except TypeError as e:
            raise UserError(f"{fault}: {e}") from e


class Choice(Section):
    """A table with a key, `chooser`, that names an object with settings of its own.

    `registry`: the address of its `Registry`, looked up when a table is read, since the registered objects are made
    in packages that import this one.
    """

    chooser: ClassVar[str] = "name"
    registry: ClassVar[str]

    @classmethod
    def kinds(cls) -> Registry[Any]:
        return load_object(cls.registry, cls.__name__)

    @classmethod
    def sections(cls, tree: Mapping[str, Any] | None) -> list[type[Section]]:
        """The settings of the object that a table names; of all registered ones for None, or if it names none."""
        name = None if tree is None else tree.get(cls.chooser, cls.model_fields[cls.chooser].default)
        chosen = [cls.kinds()[name]] if isinstance(name, str) else cls.kinds().values()
        return list(dict.fromkeys(kind.settings for kind in chosen))

    @property
    def kind(self) -> Any:
        """The object that the table names."""
        return self.kinds()[getattr(self, self.chooser)]

    def __reduce__(self) -> tuple[Any, ...]:
        """The settings as what was written, so that a process that reads them loads the user's file first."""
        state = self.__dict__ | {"settings": self.__dict__["settings"].model_dump()}
        return _restore, (type(self), state, self.model_fields_set)


def _restore(table: type[Choice], state: dict[str, Any], given: set[str]) -> Choice:
    settings = table.kinds()[state[table.chooser]].settings.model_validate(state["settings"])
    return table.model_construct(given, **(state | {"settings": settings}))


class OpenTable(Choice):
    """A `Choice` whose keys beside its own are the settings of the object that `name` names."""

    name: str
    settings: SerializeAsAny[Section] = Field(default_factory=Section)

    @model_validator(mode="before")
    @classmethod
    def _open(cls, tree: Any) -> Any:
        name = tree.get("name", cls.model_fields["name"].default) if isinstance(tree, dict) else None
        if not isinstance(name, str):
            return tree
        name, kinds = absolute(name), cls.kinds()
        kind = kinds[name]
        own = cls.model_fields.keys() - {"settings"}
        if taken := own & kind.settings.model_fields.keys():
            raise ValueError(f"name = {name!r} has a setting {min(taken)!r}, which the table has itself; rename it")
        rest = {key: value for key, value in tree.items() if key not in own}
        if isinstance(given := rest.get("settings"), Section):  # from Python, not from a file
            rest = given.model_dump()
        for key in sorted(rest.keys() - kind.settings.model_fields.keys()) if name in kinds else ():
            user = next((n for n, k in kinds.items() if key in k.settings.model_fields), None)
            # Folders of runs of earlier versions hold the default of every key.
            if user and rest.pop(key) != kinds[user].settings.model_fields[key].get_default():
                raise ValueError(f'{key} is not used by name = "{name}"; set name = "{user}"')
        settled = {key: value for key, value in tree.items() if key in own} | {"name": name}
        return settled | {"settings": kind.settings.model_validate(rest)}

    @model_serializer(mode="wrap")
    def _flat(self, handler: SerializerFunctionWrapHandler) -> dict[str, Any]:
        flat: dict[str, Any] = {}
        for key, value in handler(self).items():
            flat |= value if key == "settings" else {key: value}
        return flat
