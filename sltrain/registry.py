"""Plug-ins by name: what `method=`, `optimizer=` and `data=` may be, and the layers that an export names.

A plug-in is a class registered under a name:

    @register("relora")                      # in methods/relora.py, with its defaults in conf/method/relora.yaml
    @dataclass
    class ReLoRA(Method): ...

Built-in ones are files of one folder, one a file, named as the plug-in. Another installed package brings its own as
entry points, with NAME.yaml beside the module (or without one, if the dataclass has a default for every field):

    [project.entry-points."sltrain.methods"]
    my_method = "my_package.my_method"

Which names there are is known without importing anything. One of another package that cannot be imported is an error
only for whoever chooses it.
"""

import importlib
import importlib.util
import pkgutil
import sys
from collections.abc import Callable
from functools import cache
from importlib.metadata import EntryPoint, entry_points
from pathlib import Path
from typing import Generic, TypeVar

T = TypeVar("T")
C = TypeVar("C", bound=type)


class Registry(Generic[T]):
    """The plug-ins of one kind.

    Args:
        group: what a user types, as in `method=relora`; also the folder of conf/ with the defaults.
        package: the folder of the built-in ones, as an import name. Files that begin with an underscore are none, nor
            are those in `helpers`.
        entry_point_group: where other packages list theirs.
    """

    def __init__(self, group: str, package: str, entry_point_group: str, helpers: tuple[str, ...] = ("base",)) -> None:
        self.group, self.package, self.entry_point_group = group, package, entry_point_group
        self._helpers = helpers
        self._classes: dict[str, type[T]] = {}

    def register(self, name: str) -> Callable[[C], C]:
        """A decorator: make a class known under `name`. A name has one class; the same module may be executed twice."""

        def remember(cls: C) -> C:
            known = self._classes.get(name)
            if known is not None and (known.__module__, known.__qualname__) != (cls.__module__, cls.__qualname__):
                raise ValueError(f"{self.group}={name} is registered twice: by {known.__module__} and {cls.__module__}")
            self._classes[name] = cls
            return cls

        return remember

    def names(self) -> list[str]:
        """Every name that can be chosen, sorted."""
        return sorted({*self._built_in(), *self._entry_points(), *self._classes})

    def load(self, name: str) -> type[T]:
        """The class of this name, imported if need be. Raises ValueError for an unknown name, and for a plug-in that
        cannot be imported or registers no such name."""
        if name not in self._classes:
            module = self._module(name)
            if module is None:
                raise ValueError(f"{self.group}={name} does not exist; there are: {', '.join(self.names())}")
            try:
                importlib.import_module(module)
            except Exception as error:  # another package's code can raise anything
                if name in self._built_in():
                    raise
                raise ValueError(f"{self.group}={name}: {module} cannot be imported ({error})") from error
        if name not in self._classes:
            raise ValueError(f"{self.group}={name}: {module} registers nothing under this name")
        return self._classes[name]

    def defaults_file(self, name: str) -> Path | None:
        """NAME.yaml beside the module of another package; None if there is none, and for built-in ones, whose defaults
        are in conf/."""
        if name in self._built_in():
            return None
        module = self._module(name) or self.load(name).__module__
        spec = importlib.util.find_spec(module)
        file = Path(spec.origin).with_name(f"{name}.yaml") if spec is not None and spec.origin else None
        return file if file is not None and file.is_file() else None

    def is_built_in(self, name: str) -> bool:
        return name in self._built_in()

    def _module(self, name: str) -> str | None:
        if name in self._built_in():
            return f"{self.package}.{name}"
        point = self._entry_points().get(name)
        return point.module if point is not None else None

    def _built_in(self) -> set[str]:
        spec = importlib.util.find_spec(self.package)
        folders = spec.submodule_search_locations if spec is not None else None
        found = {module.name for module in pkgutil.iter_modules(folders or [])}
        return {name for name in found if not name.startswith("_")} - {*self._helpers}

    def _entry_points(self) -> dict[str, EntryPoint]:
        return _entry_points(self.entry_point_group, tuple(sys.path))


@cache
def _entry_points(group: str, search_path: tuple[str, ...]) -> dict[str, EntryPoint]:
    """What installed packages list. Read once for a `sys.path`: it means opening a file of every installed package."""
    return {point.name: point for point in entry_points(group=group)}
