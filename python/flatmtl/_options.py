"""What aggregators, weightings and flatness modes share: each is a frozen dataclass whose fields are its options."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import fields
from typing import Any


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
