"""Elementwise functions that the compiled loops know: values, exact forms, Taylor series and their bounds.

A unit behind f moves by t(d) = f(y + d) - f(y). Three kinds of functions, all without cancellation:

*ReLU*, or no function at all:

    t = max(d, -y) + min(y, 0)                  y = -infinity .. infinity without a function: t = d

*Bent* ones are linear or quadratic between two kinks. With e the part of d between them and r that beyond the upper,

    t = slope d + e (b_1 + b_2 e) + s r         exact; 0 where y and y + d lie on a flat end

*Smooth* ones go by their series for small d; beyond it t is the difference of two values, right to 2e-16 of f(y):

    t = sum_k a_k d^k + rest,   a_k = f^(k)(y) / k!,   |rest| <= |d|^(K+1) / (K+1)! sup |f^(K+1)|

With s the sigmoid, phi the normal density and He_n Hermite's polynomials:

    s^(n)(y)      for y <= 0: v sum_k A(n,k) (-v)^k / (1 + v)^(n+1), v = e^y, A: Euler's numbers; s^(n) even or odd
    |s^(n)| / n!  <= sum over s's poles p = i pi (2k+1) of |y - p|^-(n+1) <= (2 + D/pi^2) D^(-(n+1)/2), D = y^2 + pi^2
    tanh          2 s(2y) - 1                      softplus    1/b int s(by)             SiLU  y s: y s^(n) + n s^(n-1)
    GELU          y Phi(y): f' = Phi + y phi, f^(n) = (-1)^n (He_(n-2) - He_n) phi; by Cramer's inequality
                  (DLMF 18.14.9) |He_n phi| <= 1.0865 / sqrt(2 pi) sqrt(n!) e^(-y^2/4)

Here: one number at a time. Not here: the loops over weights and examples (`rows.py`, `averaged.py`).
"""

# Compiled by Numba, which finds the types.
import math
from typing import Any, NamedTuple

import numpy as np

from ablation.engine.compiled import in_order, kernel

IDENTITY, RELU, LEAKY, HARDTANH, HARDSIGMOID, HARDSWISH, SIGMOID, TANH, SOFTPLUS, SILU, GELU = range(11)
FIRST_BENT, FIRST_SMOOTH = LEAKY, SIGMOID
SHORT_INCREMENT, LONG_INCREMENT = 4, 8  # orders of the two series
INCREMENT_ORDERS = LONG_INCREMENT
N_BENT = 9  # numbers of the exact form

# Up to which |d| the short and the long series are used, by smooth function: the bound on the rest is then at most 5e-7
# of |d f'(y)|, or of a tenth of that at the largest f' (test_activations.py).
REACHES = np.array([(0.07, 0.48), (0.035, 0.24), (0.08, 0.55), (0.045, 0.37), (0.032, 0.3)])

_FACTORIALS = np.array([math.factorial(k) for k in range(INCREMENT_ORDERS + 2)], dtype=np.float64)
_ROOT_2, _ROOT_2_PI = math.sqrt(0.5), math.sqrt(2 * math.pi)
_CRAMER = 1.0865 / _ROOT_2_PI
_HALF_STEP = 2.0**-54  # of a float64: no more than half of the distance to the next one


class Function(NamedTuple):
    """An elementwise function: its code and up to two parameters (slope; limits; beta and threshold)."""

    code: int
    first: float = 0.0
    second: float = 0.0


def _make_euler() -> np.ndarray:
    """Euler's numbers A(n, k) for n up to INCREMENT_ORDERS."""
    numbers = np.zeros((INCREMENT_ORDERS + 1, INCREMENT_ORDERS + 1))
    numbers[0, 0] = numbers[1, 0] = 1
    for n in range(2, INCREMENT_ORDERS + 1):
        for k in range(n):
            numbers[n, k] = (k + 1) * numbers[n - 1, k] + (n - k) * numbers[n - 1, k - 1] * (k > 0)
    return numbers


_EULER = _make_euler()


# --- which function a call is -----------------------------------------------------------------------------------------

# By name: the code, and what is taken besides the tensor, in order, with its default.
_KNOWN: dict[str, tuple[int, dict[str, Any]]] = {
    "relu": (RELU, {}),
    "leaky_relu": (LEAKY, {"negative_slope": 0.01}),
    "hardtanh": (HARDTANH, {"min_val": -1.0, "max_val": 1.0}),
    "relu6": (HARDTANH, {}),
    "hardsigmoid": (HARDSIGMOID, {}),
    "hardswish": (HARDSWISH, {}),
    "sigmoid": (SIGMOID, {}),
    "tanh": (TANH, {}),
    "softplus": (SOFTPLUS, {"beta": 1.0, "threshold": 20.0}),
    "silu": (SILU, {}),
    "gelu": (GELU, {"approximate": "none"}),
}


def find_function(name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Function | None:
    """The function that a call of torch's `name` is, by its other arguments; None where the loops don't know it."""
    name = name.removesuffix("_")
    if name not in _KNOWN:
        return None
    code, defaults = _KNOWN[name]
    given = defaults | dict(zip(defaults, args[1:], strict=False))
    given |= {key: value for key, value in kwargs.items() if key in defaults}
    if code == GELU:
        return Function(GELU) if given["approximate"] == "none" else None
    if name == "relu6":
        return Function(HARDTANH, 0.0, 6.0)
    if not all(isinstance(value, int | float) for value in given.values()):
        return None
    function = Function(code, *(float(value) for value in given.values()))
    return None if code == SOFTPLUS and not function.first > 0 else function


# --- values -----------------------------------------------------------------------------------------------------------


@in_order
def relu_change(d, low, high):
    """t = max(d, low) + high: behind a ReLU low = -y and high = min(y, 0), without a function -infinity and 0."""
    return (d if d > low else low) + high


@kernel
def relu_limits(function, y):
    """The low and high of `relu_change`, in float32."""
    if function.code == RELU:
        return np.float32(-y), np.float32(min(y, 0.0))
    return np.float32(-np.inf), np.float32(0)


@in_order
def value_of(function, y):
    """f(y) of a function besides ReLU, by the operations that torch uses."""
    code, first, second = function
    if code == LEAKY:
        return y if y > 0 else y * first
    if code == HARDTANH:
        return min(max(y, first), second)
    if code == HARDSIGMOID:
        return min(max(y + 3.0, 0.0), 6.0) / 6.0
    if code == HARDSWISH:
        return y * min(max(y + 3.0, 0.0), 6.0) / 6.0
    if code == SIGMOID:
        return 1.0 / (1.0 + math.exp(-y))
    if code == TANH:
        return math.tanh(y)
    if code == SOFTPLUS:
        return y if y * first > second else math.log1p(math.exp(y * first)) / first
    if code == SILU:
        return y / (1.0 + math.exp(-y))
    return y * 0.5 * (1.0 + math.erf(y * _ROOT_2))


@in_order
def change_of(function, y, d):
    """t = f(y + d) - f(y); exact for ReLU and without a function."""
    if function.code == IDENTITY:
        return d
    if function.code == RELU:
        return max(d, -y) + min(y, 0.0)
    return value_of(function, y + d) - value_of(function, y)


@kernel
def unseen_change(function, y, slope):
    """The size of t, about, below which rounding to float64 loses it, so that it does not count as touched."""
    size = max(abs(value_of(function, y)), abs(slope * y))
    if function.code == GELU and y < 0 and value_of(function, y) == 0:  # 1 + erf is 0 there, and beside it
        return np.inf
    return _HALF_STEP * size


# --- bent functions ---------------------------------------------------------------------------------------------------


@kernel
def count_numbers(function):
    """How many numbers one t of this function is computed from at most: few take less of the cache."""
    return 2 if function.code < FIRST_BENT else N_BENT


@kernel
def bend(function, y, b):
    """Write the nine numbers of a bent function's exact form at y.

    They are the slope, b_1, b_2, s, the two limits and the shift of e, and the limit and the shift of r.

    Cuts are float32 and shifts their negatives, so that what is flat is 0 to the last digit.
    """
    code, first, second = function
    low, high = -3.0, 3.0
    b[:] = 0
    if code == LEAKY:
        low, high = 0.0, np.inf
        b[0], b[1] = first, 1 - first
    elif code == HARDTANH:
        low, high = first, second
        b[1] = 1
    elif code == HARDSIGMOID:
        b[1] = 1 / 6
    else:
        b[1], b[2], b[3] = (2 * min(max(y, low), high) + 3) / 6, 1 / 6, 1
        b[7] = high - y
        b[8] = -b[7] if y < high else np.float32(0)
    b[4], b[5] = low - y, high - y
    if y < low:
        b[6] = -b[4]
    elif y > high:
        b[6] = -b[5]


@in_order
def bent_change(d, b):
    """t by the exact form of a bent function, whose nine numbers are `b`."""
    e = d if d > b[4] else b[4]
    e = (e if e < b[5] else b[5]) + b[6]
    r = (d if d > b[7] else b[7]) + b[8]
    return b[0] * d + e * (b[1] + b[2] * e) + b[3] * r


@kernel
def largest_bent_change(function, y, far):
    """An upper bound of |t| for |d| <= far; 0 where f is constant on that interval."""
    code, first, second = function
    if code == LEAKY:
        return max(1.0, abs(first)) * far
    low, high, slope = -3.0, 3.0, 1 / 6
    if code == HARDTANH:
        low, high, slope = first, second, 1.0
    elif code == HARDSWISH:
        high, slope = np.inf, 1.5
    return slope * max(0.0, far - max(0.0, max(low - y, y - high)))


# --- smooth functions -------------------------------------------------------------------------------------------------


@kernel
def derivatives_of_sigmoid(y, scale, s):
    """s[n] = scale^n times the n-th derivative of the sigmoid at scale y."""
    v = math.exp(-abs(scale * y))
    s[0] = (v if scale * y < 0 else 1.0) / (1.0 + v)
    power = v / (1.0 + v)
    for n in range(1, INCREMENT_ORDERS + 1):
        power *= scale / (1.0 + v)
        total = 0.0
        for k in range(n - 1, -1, -1):
            total = _EULER[n, k] - v * total
        s[n] = power * total * (-1.0 if scale * y > 0 and n % 2 == 0 else 1.0)


@kernel
def derivatives_of_gelu(y, a):
    """a[n - 1] = the n-th derivative."""
    density = math.exp(-0.5 * y * y) / _ROOT_2_PI
    a[0] = 0.5 * math.erfc(-y * _ROOT_2) + y * density
    before, here, sign = 1.0, y, 1.0  # He_(n-2), He_(n-1)
    for n in range(2, INCREMENT_ORDERS + 1):
        after = y * here - (n - 1) * before
        a[n - 1] = sign * (before - after) * density
        before, here, sign = here, after, -sign


@kernel
def series_of_function(function, y, s, a):
    """a[k - 1] = f^(k)(y) / k! for k up to INCREMENT_ORDERS. `s` (INCREMENT_ORDERS + 1): scratch."""
    code, first, second = function
    a[:] = 0
    if code == GELU:
        derivatives_of_gelu(y, a)
        for k in range(1, INCREMENT_ORDERS):
            a[k] /= _FACTORIALS[k + 1]
    elif code == SOFTPLUS and y * first > second:
        a[0] = 1.0
    else:
        scale = 2.0 if code == TANH else first if code == SOFTPLUS else 1.0
        derivatives_of_sigmoid(y, scale, s)
        for k in range(1, INCREMENT_ORDERS + 1):
            each = s[k]
            if code == TANH:
                each *= 2
            elif code == SOFTPLUS:
                each = s[k - 1]
            elif code == SILU:
                each = y * s[k] + k * s[k - 1]
            a[k - 1] = each / _FACTORIALS[k]


@kernel
def sigmoid_bound(nearest, n):
    """A bound on |s^(n)| / n! where |y| is at least `nearest`."""
    square = nearest * nearest + math.pi * math.pi
    return (2 + square / (math.pi * math.pi)) * square ** (-0.5 * (n + 1))


@kernel
def rest_of_function(function, y, reach, order):
    """A bound on what the series up to `order` leaves out for |d| <= reach."""
    code, first, second = function
    if code == SOFTPLUS and y * first > second:
        return 0.0
    n, farthest, nearest = order + 1, abs(y) + reach, max(0.0, abs(y) - reach)
    power = reach**n
    if code == GELU:
        roots = math.sqrt(_FACTORIALS[n - 2]) + math.sqrt(_FACTORIALS[n])
        return power / _FACTORIALS[n] * _CRAMER * roots * math.exp(-0.25 * nearest * nearest)
    if code == TANH:
        return 2.0 ** (n + 1) * power * sigmoid_bound(2 * nearest, n)
    if code == SOFTPLUS:
        return first ** (n - 1) * power / n * sigmoid_bound(first * nearest, n - 1)
    if code == SILU:
        return power * (farthest * sigmoid_bound(nearest, n) + sigmoid_bound(nearest, n - 1))
    return power * sigmoid_bound(nearest, n)


@kernel
def reaches_of(function, y):
    """The largest |d| for which the short and the long series are used."""
    code, first, second = function
    short, long = REACHES[code - FIRST_SMOOTH, 0], REACHES[code - FIRST_SMOOTH, 1]
    if code != SOFTPLUS:
        return short, long
    jump = (1 - 1e-6) * abs(y - second / first)  # to a line, at torch's threshold: not reached in float32 either
    return min(jump, short / first), min(jump, long / first)
