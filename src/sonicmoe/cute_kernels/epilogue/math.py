"""Activations and their derivatives on fp32 registers.

An activation is `f(x)`, or gated `f(gate) * (up + up_offset)`; the pieces are named as in sonicmoe.activations, whose
dataclass is what `act` is here (read, not imported). Sigmoid takes ex2 and rcp (2 ulp). `fast` takes the approximate
tanh instead: one instruction of the special-function unit, absolute error 5e-4, half of that in the sigmoid: below the
rounding of bf16, not that of fp16.
"""

import cutlass.cute as cute
from cutlass import Float32

from ..ptx import exp2, reciprocal, tanh

LOG2E = 1.4426950408889634
SQRT_HALF = 0.7071067811865476
INV_SQRT_2PI = 0.3989422804014327
SQRT_2_OVER_PI = 0.7978845608028654
GELU_CUBIC = 0.044715
# erf by Abramowitz and Stegun 7.1.26, absolute error 1.5e-7
ERF_P = 0.3275911
ERF_A = (0.254829592, -0.284496736, 1.421413741, -1.453152027, 1.061405429)

CURVE = {"swiglu": "silu", "geglu": "gelu", "geglu_tanh": "gelu_tanh", "reglu": "relu"}


def _compare(op: str, a: Float32, b) -> Float32:
    """1 where `a op b`, else 0"""
    return cute.arch.inline_ptx(
        "set.%s.f32.f32 {$w0}, {$r0}, {$r1};" % op, write_only_types=[Float32], read_only_args=[a, Float32(b)]
    )


def _minimum(a: Float32, b) -> Float32:
    return cute.arch.inline_ptx(
        "min.NaN.f32 {$w0}, {$r0}, {$r1};", write_only_types=[Float32], read_only_args=[a, Float32(b)]
    )


def _maximum(a: Float32, b) -> Float32:
    return cute.arch.inline_ptx(
        "max.NaN.f32 {$w0}, {$r0}, {$r1};", write_only_types=[Float32], read_only_args=[a, Float32(b)]
    )


def _sigmoid(x: Float32) -> Float32:
    return reciprocal(exp2(x * Float32(-LOG2E)) + Float32(1.0))


def _normal_cdf(x: Float32):
    """(cdf, density) of the standard normal distribution"""
    z = _maximum(x, -x) * Float32(SQRT_HALF)
    t = reciprocal(z * Float32(ERF_P) + Float32(1.0))
    poly = Float32(ERF_A[4])
    for a in ERF_A[3::-1]:
        poly = poly * t + Float32(a)
    gauss = exp2(x * x * Float32(-0.5 * LOG2E))
    tail = Float32(0.5) * poly * t * gauss  # cdf(-|x|)
    positive = _compare("ge", x, 0.0)
    return positive + tail - Float32(2.0) * positive * tail, gauss * Float32(INV_SQRT_2PI)


def _value(curve: str, x: Float32, alpha: float, fast: bool) -> Float32:
    if curve == "silu":
        if fast:
            h = x * Float32(0.5)
            return h * tanh(h * Float32(alpha)) + h
        return x * _sigmoid(x * Float32(alpha))
    if curve == "gelu":
        return x * _normal_cdf(x)[0]
    if curve == "gelu_tanh":
        return x * _sigmoid(x * (x * x * Float32(GELU_CUBIC) + Float32(1.0)) * Float32(2 * SQRT_2_OVER_PI))
    positive = _maximum(x, 0.0)
    return positive * positive if curve == "relu2" else positive


def _value_and_slope(curve: str, x: Float32, alpha: float, fast: bool):
    if curve == "silu":
        if fast:
            s = tanh(x * Float32(0.5 * alpha)) * Float32(0.5) + Float32(0.5)
        else:
            s = _sigmoid(x * Float32(alpha))
        value = x * s
        return value, s + (value - value * s) * Float32(alpha)
    if curve == "gelu":
        cdf, density = _normal_cdf(x)
        return x * cdf, cdf + x * density
    if curve == "gelu_tanh":
        square = x * x
        s = _sigmoid(x * (square * Float32(GELU_CUBIC) + Float32(1.0)) * Float32(2 * SQRT_2_OVER_PI))
        inner = (square * Float32(3 * GELU_CUBIC) + Float32(1.0)) * Float32(2 * SQRT_2_OVER_PI)
        value = x * s
        return value, s + (value - value * s) * inner
    positive = _maximum(x, 0.0)
    if curve == "relu2":
        return positive * positive, positive + positive
    return positive, _compare("gt", x, 0.0)


def forward(act, fast: bool, h):
    """h: (x,) or (gate, up) -> activation"""
    curve = CURVE.get(act.name, act.name)
    if not act.gated:
        return _value(curve, h[0], act.alpha, fast)
    gate, up = h
    if act.limit is not None:
        gate, up = _minimum(gate, act.limit), _maximum(_minimum(up, act.limit), -act.limit)
    if act.up_offset:
        up = up + Float32(act.up_offset)
    return _value(curve, gate, act.alpha, fast) * up


def backward(act, fast: bool, h):
    """h: (x,) or (gate, up) -> activation, and its derivatives in the same order as h"""
    curve = CURVE.get(act.name, act.name)
    if not act.gated:
        value, slope = _value_and_slope(curve, h[0], act.alpha, fast)
        return value, (slope,)
    gate, up = h
    if act.limit is None:
        value, slope = _value_and_slope(curve, gate, act.alpha, fast)
        up = up + Float32(act.up_offset) if act.up_offset else up
        return value * up, (slope * up, value)
    value, slope = _value_and_slope(curve, _minimum(gate, act.limit), act.alpha, fast)
    clamped = _maximum(_minimum(up, act.limit), -act.limit) + Float32(act.up_offset)
    slope = slope * _compare("le", gate, act.limit)
    inside = _compare("le", _maximum(up, -up), act.limit)
    return value * clamped, (slope * clamped, value * inside)
