"""Numbers as callers have them: Python's own, NumPy's, fractions. What comes out is Python's."""

from __future__ import annotations

import math
import numbers
import operator


def real_number(name: str, value: object, expected: str = "a number") -> float:
    """Any ``numbers.Real`` but a bool, as a float, which may be infinite or NaN.

    Args:
        name: Name of the argument, for the message.
        value: What was given for it.
        expected: What it must be, for the message.

    Raises:
        TypeError: It is of another type. A tensor is, too: reading it would wait for its device.
    """
    # Python's own come first: they are what torch.compile traces.
    is_pythons = isinstance(value, (int, float))
    if isinstance(value, bool) or not (is_pythons or isinstance(value, numbers.Real)):
        raise TypeError(f"{name} must be {expected}; got {type(value).__name__}")
    try:
        return float(value)  # type: ignore[arg-type]
    except OverflowError:  # whole numbers and fractions have no bound
        return math.inf


def finite_number(name: str, value: object, expected: str = "a number") -> float:
    """Any finite :func:`real_number`.

    Raises:
        TypeError: It is no real number.
        ValueError: It is not finite, or too large for a float.
    """
    number = real_number(name, value, expected)
    if not math.isfinite(number):
        raise ValueError(f"{name} must be finite; got {value}")
    return number


def whole_number(name: str, value: object, expected: str = "an int") -> int:
    """Whatever ``operator.index`` takes but a bool, as an int.

    Args:
        name, value, expected: As for :func:`real_number`.

    Raises:
        TypeError: It is of another type. A tensor is, too: reading it would wait for its device.
    """
    if isinstance(value, int) and not isinstance(value, bool):
        return int(value)
    from torch import Tensor  # here, because settings need numbers and must not wait for PyTorch

    if not isinstance(value, (bool, Tensor)) and hasattr(value, "__index__"):
        try:
            return operator.index(value)
        except TypeError:  # an array of several numbers
            pass
    raise TypeError(f"{name} must be {expected}; got {type(value).__name__}")
