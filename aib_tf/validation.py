"""Checks of argument values; each error names the value and what is allowed."""

import math
import numbers


def check_count(name, value, minimum=1, maximum=None):
    """Returns `value` as an int; ValueError unless it is an integer from `minimum` to `maximum` (None: no end)."""
    is_integer = isinstance(value, numbers.Integral) and not isinstance(value, bool)
    if not is_integer or value < minimum or (maximum is not None and value > maximum):
        end = f"to {maximum}" if maximum is not None else "up"
        raise ValueError(f"`{name}` must be an integer from {minimum} {end}. Received: {name}={value!r}")
    return int(value)


def check_weight(name, value, positive=False):
    """Returns `value` as a float; ValueError unless it is finite and 0 or more (more than 0 if `positive`)."""
    is_number = isinstance(value, numbers.Real) and not isinstance(value, bool)
    if not is_number or not math.isfinite(value) or value < 0 or (positive and value == 0):
        allowed = "more than 0" if positive else "0 or more"
        raise ValueError(f"`{name}` must be a finite number, {allowed}. Received: {name}={value!r}")
    return float(value)


def check_rate(name, value):
    """Returns `value` as a float; ValueError unless it is from 0 to below 1."""
    if check_weight(name, value) >= 1:
        raise ValueError(f"`{name}` must be a number from 0 to below 1. Received: {name}={value!r}")
    return float(value)


def check_seed(seed):
    """Returns `seed` as an int or None; ValueError unless it is None or an integer from 0 to 2^31 - 1."""
    return None if seed is None else check_count("seed", seed, minimum=0, maximum=2**31 - 1)


def check_choice(name, value, choices):
    """Raises ValueError unless `value` is one of `choices`."""
    if value not in choices:
        known = ", ".join(str(choice) for choice in choices)
        raise ValueError(f"`{name}` must be one of {known}. Received: {name}={value!r}")
