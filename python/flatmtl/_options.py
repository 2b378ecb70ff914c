"""What aggregators, weightings and flatness modes share: each is a frozen dataclass whose fields are its options."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import fields
from typing import Any, TypeVar


class HasOptions:
    @property
    def options(self) -> dict[str, Any]:
        return {field: getattr(self, field) for field in self.option_names()}

    @classmethod
    def option_names(cls) -> list[str]:
        return [field.name for field in fields(cls)]  # type: ignore[arg-type]


class CoreMethod(HasOptions):
    """A method of the C core."""

    def option_values(
        self, num_tasks: int, seed: int = 0, draw: int = 0, present: Sequence[int] | None = None
    ) -> list[float]:
        """The options as the C core takes them.

        Args:
            num_tasks: the number of tasks.
            seed: seed of methods that draw and have none of their own.
            draw: number of the draw (of the optimizer's step) for methods that draw.
            present: the tasks that take part, if not all of them.
        """
        return [float(value) for value in self.options.values()]


Method = TypeVar("Method", bound=HasOptions)


def by_name(
    name: str | Method, base: type[Method], table: Mapping[str, type[Method]], options: Mapping[str, Any], *,
    kind: str, example: str, subject: str,
) -> Method:  # fmt: skip
    """The method of this name with these options, or the object itself if `name` is one.

    Args:
        base: the class of the objects.
        table: the known names.
        kind, example, subject: for messages: "aggregator", "CAGrad(c=0.4)", "an aggregator".

    Raises:
        ValueError: no such name.
        TypeError: neither a name nor an object, options beside an object, or options that the method does not have.
    """
    if isinstance(name, base):
        if options:
            raise TypeError(f"options {quoted(options)} beside the object {name!r}, which has its own")
        return name
    if not isinstance(name, str):
        raise TypeError(f"{subject} is a name, or an object like {example}, not {name!r}")
    cls = table.get(name)
    if cls is None:
        close = difflib.get_close_matches(name.lower(), table, n=1)
        hint = f" Did you mean {close[0]!r}?" if close else ""
        raise ValueError(f"there is no {kind} {name!r}.{hint} Known: {quoted(table)}")
    names = cls.option_names()
    unknown = [option for option in options if option not in names]
    if unknown:
        has = f"its options are {quoted(names)}" if names else "it has no options"
        raise TypeError(f"{kind} {name!r} has no option {quoted(unknown)}; {has}")
    if name == "fixed" and "values" not in options:
        raise TypeError(f"{kind} 'fixed' needs its option 'values', one number a task: {cls.__name__}([0.5, 2.0])")
    return cls(**options)


def quoted(names: Iterable[Any]) -> str:
    return ", ".join(repr(name) for name in names)
