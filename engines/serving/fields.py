"""The fields of a request: each is checked by a function that returns its value or says what is allowed."""

import json
from collections.abc import Callable, Mapping
from typing import Any

from coatrt.engines.serving.errors import ApiError, invalid

__all__ = ["Check", "at_most_texts", "bias", "flag", "number", "read_fields", "shown", "text", "whole"]

Check = Callable[[str, Any], Any]
"""(name of the field, JSON value) → value; raises `ApiError`."""

_MOST_BIASES = 1024


def shown(value: Any) -> str:
    """Return a value for a message, cut to 40 characters."""
    result = json.dumps(value)
    return result if len(result) <= 40 else f"{result[:39]}…"


def number(low: float, high: float, *, above: bool = False) -> Check:
    """Return the check of a number from `low` to `high`; `above` excludes `low` itself."""
    least = f"more than {low:g}" if above else f"at least {low:g}"

    def check(name: str, value: Any) -> float:
        good = isinstance(value, int | float) and not isinstance(value, bool)
        if not (good and (low < value if above else low <= value) and value <= high):
            raise invalid(name, f"{name} must be a number of {least} and at most {high:g}, got {shown(value)}")
        return float(value)

    return check


def whole(low: int, high: int) -> Check:
    """Return the check of a whole number from `low` to `high`."""

    def check(name: str, value: Any) -> int:
        if type(value) is not int or not low <= value <= high:
            raise invalid(name, f"{name} must be a whole number from {low} to {high}, got {shown(value)}")
        return value

    return check


def flag(name: str, value: Any) -> bool:
    """Check a boolean."""
    if not isinstance(value, bool):
        raise invalid(name, f"{name} must be true or false, got {shown(value)}")
    return value


def text(name: str, value: Any) -> str:
    """Check a text; one with half a surrogate pair stands for no characters and is refused."""
    if not isinstance(value, str):
        raise invalid(name, f"{name} must be a text, got {shown(value)}")
    try:
        value.encode()
    except UnicodeEncodeError:
        raise invalid(name, f"{name} has half of a surrogate pair; send whole characters") from None
    return value


def at_most_texts(most: int, longest: int) -> Check:
    """Return the check of a text or a list of at most `most` texts, each of 1 to `longest` characters."""

    def check(name: str, value: Any) -> tuple[str, ...]:
        values = value if isinstance(value, list) else [value]
        if len(values) > most:
            raise invalid(name, f"{name} has {len(values)} texts; give at most {most}")
        for each in values:
            if not 1 <= len(text(name, each)) <= longest:
                raise invalid(name, f"{name} must be texts of 1 to {longest} characters, got {len(each)} characters")
        return tuple(values)

    return check


def bias(name: str, value: Any) -> dict[int, float]:
    """Check a logit bias: token id → number; whether the model has the token is checked later."""
    if not isinstance(value, dict):
        raise invalid(name, f"{name} must be an object of token id → number, got {shown(value)}")
    if len(value) > _MOST_BIASES:
        raise invalid(name, f"{name} has {len(value)} tokens; give at most {_MOST_BIASES}")
    result = {}
    for key, added in value.items():
        if not (key.isascii() and key.isdigit() and len(key) < 10):
            raise invalid(name, f"{name} has the key {shown(key)}; give token ids")
        result[int(key)] = number(-100, 100)(f"{name}.{key}", added)
    return result


def read_fields(body: Mapping[str, Any], checks: Mapping[str, Check]) -> dict[str, Any]:
    """Return name → checked value of the fields of a request that are not null.

    Raises:
        ApiError: a field is unknown, or a value is refused.
    """
    for name in body:
        if name not in checks:
            allowed = ", ".join(checks)
            message = f"the request has the unknown field {name[:60]!r}; allowed: {allowed}"
            raise ApiError(message, param=name[:60])
    return {name: checks[name](name, value) for name, value in body.items() if value is not None}
