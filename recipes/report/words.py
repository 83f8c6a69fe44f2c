"""Figures as the page writes them."""

from __future__ import annotations

from typing import Any

NONE = "–"


def estimate(value: float | None, stderr: float | None = None, digits: int = 4) -> str:
    """A value with its standard error, both to the same place: 1.0948 ± 0.0192; large ones without decimals."""
    if value is None:
        return NONE
    if abs(value) >= 1000:
        digits = 0
    return f"{value:,.{digits}f}" + ("" if stderr is None else f" ± {stderr:,.{digits}f}")


def percent(value: float | None, stderr: float | None = None, digits: int = 1) -> str:
    """A share from 0 to 1 in percent."""
    if value is None:
        return NONE
    return estimate(100 * value, None if stderr is None else 100 * stderr, digits) + " %"


def of(entry: dict[str, Any] | None, as_percent: bool = False, digits: int | None = None) -> str:
    """A {"value", "stderr"}."""
    if not entry or entry.get("value") is None:
        return NONE
    write, places = (percent, 1) if as_percent else (estimate, 4)
    return write(entry["value"], entry.get("stderr"), places if digits is None else digits)


def significant(value: float | None, digits: int = 3) -> str:
    """A loss or an error, to so many significant digits."""
    return NONE if value is None else f"{value:.{digits}g}"


def whole(value: float | None) -> str:
    """A count, written out."""
    return NONE if value is None else f"{value:,.0f}"


def smaller(before: float, after: float) -> str:
    """How many times smaller: ÷41, ÷3.7; nothing is left of what is divided by nothing."""
    if not after:
        return "÷∞"
    factor = before / after
    return f"÷{factor:,.{0 if factor >= 9.95 else 1}f}"


def plain(value: Any) -> str:
    """An option's value."""
    if value is None:
        return "none"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, dict):
        return ", ".join(f"{key} {plain(item)}" for key, item in value.items())
    if isinstance(value, list):
        return ", ".join(map(plain, value))
    return f"{value:g}" if isinstance(value, float) else str(value)
