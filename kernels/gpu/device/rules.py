"""The rules on a block of elements, in registers: gradient, update, momentum, and the state that is to be stored.

The same rules as `kernels/reference/rules.py`. Kernels are compiled without contracting products and sums to fused
multiply-adds; those that are wanted are written out. So a score is the same bits in every kernel that forms it.
Division and root are the GPU's fast ones, off by two units in the last place at most;
docs/internals/gpu-kernels.md has the cost of the correctly rounded ones.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .config import B2, DECAY, EPS, LOOKAHEAD, MOMENTUM, RATE, UNBIAS, UNDAMPED, W1, W2
from .rounding import IN_PTX


@triton.jit
def lerp(start, end, weight):
    """start + weight (end - start), exactly `end` at a weight of 1: torch.lerp."""
    apart = end - start
    return tl.where(weight < 0.5, tl.fma(weight, apart, start), end - apart * (1.0 - weight))


@triton.jit
def averaged(average, g, weight, CFG: tl.constexpr):
    """`lerp` from a running average to the gradient, which takes half as many instructions if `CFG.usual`."""
    if CFG.usual:
        moved_on = tl.fma(weight, g - average, average)
    else:
        moved_on = lerp(average, g, weight)
    return moved_on


@triton.jit
def gradient(g, p, row, CFG: tl.constexpr):
    """The gradient as the base sees it. `p` is read where decay is coupled."""
    if CFG.maximize:
        g = -g
    if CFG.coupled:
        g = tl.fma(tl.load(row + DECAY), p, g)
    return g


@triton.jit
def quotient(x, y, CFG: tl.constexpr):
    """x / y, the same bits as the GPU's fast division, for the denominator of Adam's update.

    The fast division scales both if y is above 2^126 or below 2^-126, and six of its eight instructions are for that.
    Denominators are not above: the root of a float32 is below 2^64. Nor is one below and not 0, as the root of the
    least float32 is above 2^-75, unless eps is (`CFG.extreme_eps`).
    """
    if IN_PTX and not CFG.extreme_eps:
        inverse = tl.inline_asm_elementwise("rcp.approx.ftz.f32 $0, $1;", "=f,f", [y], dtype=tl.float32, is_pure=True,
                                            pack=1)  # fmt: skip
        q = x * inverse
    else:
        q = x / y
    return q


@triton.jit
def _adam(g, a, b, c, row, CFG: tl.constexpr):
    if CFG.recomputed:
        m, v, largest = a, b, c
    else:
        m = averaged(a, g, tl.load(row + W1), CFG)
        v = tl.fma(tl.load(row + B2), b, (tl.load(row + W2) * g) * g)  # in torch's order: overflows where it does
        largest = c
        if CFG.amsgrad:
            # as torch.maximum: NaN wins
            largest = tl.where((v > c) | (v != v), v, c)
    under = v
    if CFG.amsgrad:
        under = largest
    size = tl.fma(tl.load(row + UNBIAS), tl.sqrt(under), tl.load(row + EPS))
    return quotient(m, size, CFG) * tl.load(row + RATE), m, v, largest


@triton.jit
def _sgd(g, a, row, CFG: tl.constexpr):
    if not CFG.moves:
        u, m = g * tl.load(row + RATE), g
    else:
        momentum = tl.load(row + MOMENTUM)
        if CFG.begins:
            m = g
        else:
            m = tl.fma(momentum, a, tl.load(row + UNDAMPED) * g)
        direction = m
        if CFG.nesterov:
            direction = tl.fma(momentum, m, g)
        u = direction * tl.load(row + RATE)
    return u, m


@triton.jit
def _lion(g, a, row, CFG: tl.constexpr):
    c = averaged(a, g, tl.load(row + W1), CFG)
    sign = tl.where(c > 0, 1.0, tl.where(c < 0, -1.0, 0.0))  # 0 for NaN, as torch
    return sign * tl.load(row + RATE), averaged(a, g, tl.load(row + W2), CFG)


@triton.jit
def moved(g, a, b, c, d, row, CFG: tl.constexpr):
    """(update, momentum, previous momentum, and the first, second and third state column as they are to be stored).

    `g` is the result of `gradient`. The state columns a, b, c and d are float32; those that the rule does not have are
    ignored.
    """
    if CFG.rule == "adam":
        u, m, v, largest = _adam(g, a, b, c, row, CFG)
        previous, x, y, z = a, m, v, largest
    elif CFG.rule == "sgd":
        u, m = _sgd(g, a, row, CFG)
        previous, x, y, z = a, m, b, c
    elif CFG.rule == "lion":
        u, m = _lion(g, a, row, CFG)
        previous, x, y, z = a, m, b, c
    else:
        u = a
        if CFG.negated:
            u = -a
        m, previous, x, y, z = c, d, a, b, c
    return u, m, previous, x, y, z


@triton.jit
def score_of(g, u, m, row, CFG: tl.constexpr):
    """The signed score that top-K ranks."""
    if CFG.rule == "score":
        x = u
    elif CFG.score == "update":
        x = u * g
    elif CFG.score == "momentum":
        x = m * g
    elif CFG.rule == "sgd":
        x = tl.fma(tl.load(row + MOMENTUM), m, g) * g
    else:
        x = lerp(g, m, tl.load(row + LOOKAHEAD)) * g
    return x
