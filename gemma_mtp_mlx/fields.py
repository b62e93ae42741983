"""Read values of a JSON object that anybody may have written: each is checked when it is read."""

import reprlib
from collections.abc import Mapping
from typing import Any

Bounds = Mapping[str, tuple[float, float]]

_REPR = reprlib.Repr()
_REPR.maxstring = _REPR.maxother = _REPR.maxlong = 60


def shown(value: Any) -> str:
    """Return a value as a message shows it: on one line, and short whatever it is."""
    return _REPR.repr(value)


class Fields:
    """An object, read by name; null is as good as absent.

    where: what it is, as messages say it: "config.json: ". bounds: the least and the greatest
    value of each number, by name.
    Raises: ValueError naming the value and what it must be for any other.
    """

    def __init__(self, values: Any, where: str, bounds: Bounds) -> None:
        if not isinstance(values, dict):
            raise ValueError(f"{where}{shown(values)} is not an object of names and values")
        self.values: dict[str, Any] = values
        self._where = where
        self._bounds = bounds

    def whole(self, name: str, default: int | None = None) -> int:
        """Return a whole number; without a default it must be there."""
        value = self.values.get(name, default)
        if value is None:
            raise ValueError(f"{self._where}it has no {name}; the file is incomplete")
        low, high = self._bounds[name]
        if type(value) is not int or not low <= value <= high:
            raise self.wrong(name, f"a whole number from {low} to {high}")
        return value

    def whole_or(self, name: str, default: int) -> int:
        """Return a whole number; the default also for null and, where the bounds allow it, 0."""
        value = self.values.get(name)
        return default if value is None else self.whole(name) or default

    def number(self, name: str, default: float) -> float:
        """Return a finite number."""
        value = self.values.get(name, default)
        low, high = self._bounds[name]
        if type(value) not in (int, float) or not low <= value <= high:
            raise self.wrong(name, f"a number from {low:g} to {high:g}")
        return value

    def flag(self, name: str) -> bool:
        """Return whether it is true; it is not if it is absent."""
        value = self.values.get(name)
        if value is not None and type(value) is not bool:
            raise self.wrong(name, "true or false")
        return bool(value)

    def one_of(self, name: str, known: tuple[Any, ...]) -> Any:
        """Return one of the known values, None among them if it may be absent."""
        value = self.values.get(name)
        if not any(value == one and type(value) is type(one) for one in known):
            raise self.wrong(name, "one of " + ", ".join(str(one) for one in known))
        return value

    def object(self, name: str) -> "Fields":
        """Return an object, empty if it is absent."""
        value = self.values.get(name)
        return Fields({} if value is None else value, f"{self._where}{name}: ", self._bounds)

    def wrong(self, name: str, expected: str) -> ValueError:
        """Say what a value must be."""
        return ValueError(
            f"{self._where}{shown(name)[1:-1]} is {shown(self.values.get(name))}; "
            f"it must be {expected}"
        )
