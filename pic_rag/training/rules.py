"""The rules a training configuration's fields have to keep. Standard library only."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from typing import Any


def are_weights(weights: Any) -> bool:  # noqa: ANN401 - whatever a file holds, here and below
    """Whether it is a mapping to numbers, none below 0 and not all 0."""
    if not isinstance(weights, Mapping) or not all(map(_is_number, weights.values())):
        return False
    return min(weights.values(), default=0) >= 0 and sum(weights.values()) > 0


def read_fields(cls: type[Any], values: Mapping[str, Any], what: str) -> dict[str, Any]:
    """A dataclass's fields out of a file, lists as tuples; one that is unknown or missing raises ValueError by name."""
    fields = dataclasses.fields(cls)
    unknown = sorted(set(values) - {field.name for field in fields})
    if unknown:
        known = ", ".join(sorted(field.name for field in fields))
        raise ValueError(f"Unknown {what} field {unknown[0]!r}. Known fields: {known}.")
    for field in fields:
        needed = field.default is field.default_factory is dataclasses.MISSING
        if needed and values.get(field.name) is None:
            raise ValueError(f"A {what} configuration must set {field.name!r}.")
    return {name: tuple(value) if isinstance(value, list) else value for name, value in values.items()}


def require_choice(name: str, value: Any, allowed: tuple[Any, ...]) -> None:  # noqa: ANN401
    """Raise ValueError unless the value is one of those allowed; 1 is not True here."""
    if not any(value is choice or (isinstance(choice, str) and value == choice) for choice in allowed):
        raise ValueError(f"{name} must be one of {', '.join(map(str, allowed))}, got {value!r}.")


def require_number(name: str, value: Any, least: float, most: float) -> None:  # noqa: ANN401
    """Raise ValueError unless the value is a finite number from `least` to `most`."""
    if not _is_number(value) or not least <= value <= most:
        rule = f"of {least:g} or more" if most == math.inf else f"from {least:g} to {most:g}"
        hint = " YAML reads 3e-4 as text: write 3.0e-4." if isinstance(value, str) else ""
        raise ValueError(f"{name} must be a number {rule}, got {value!r}.{hint}")


def require_path(name: str, value: Any, *, optional: bool) -> None:  # noqa: ANN401
    """Raise ValueError unless the value is a string, or None where that is allowed."""
    if not isinstance(value, str) and not (optional and value is None):
        raise ValueError(f"{name} must be a path{' or null' if optional else ''}, got {value!r}.")


def require_paths(name: str, values: Any) -> None:  # noqa: ANN401
    """Raise ValueError unless the value is a tuple of strings."""
    if not isinstance(values, tuple) or not all(isinstance(value, str) for value in values):
        raise ValueError(f"{name} must be a list of files, got {values!r}.")


def require_range(name: str, values: Any, least: int) -> None:  # noqa: ANN401
    """Raise ValueError unless the value is two whole numbers in order, `least` or more."""
    whole = isinstance(values, tuple) and len(values) == 2 and all(type(value) is int for value in values)
    if not whole or not least <= values[0] <= values[1]:
        raise ValueError(f"{name} must be two whole numbers, {least} <= shortest <= longest, got {values!r}.")


def require_rows(values: Any) -> None:  # noqa: ANN401
    """Raise ValueError unless the value is three whole numbers of 1 or more."""
    whole = isinstance(values, tuple) and len(values) == 3 and all(type(value) is int for value in values)
    if not whole or min(values) < 1:
        raise ValueError(
            f"rows must be three whole numbers of 1 or more, for encoder, generator and teacher, got {values!r}."
        )


def _is_number(value: Any) -> bool:  # noqa: ANN401
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
