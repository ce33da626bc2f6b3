"""NVFP4 arithmetic in Triton: device functions that follow the contract of `nibble.kernels.torch.nvfp4` bit for bit.

Step 4 of the contract divides every value by the divisor `d` of its block. IEEE division would be most of the work
of a quantizer. For bf16 ``x * r`` gets the same e2m1 code with `r` the fp32 number nearest to 1/d or one of its two
neighbours; `reciprocal_corrections` finds out which, for all the divisors that an input scale leads to.

Kernels that use these functions are to be launched with ``enable_fp_fusion=False``: fusing ``x * r`` with an addition
would skip its rounding.
"""

# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators

import triton
import triton.language as tl

E2M1_MAX = tl.constexpr(6.0)
E4M3_MAX = tl.constexpr(448.0)
E4M3_NAN = tl.constexpr(0x7F)
_E4M3_MIN_NORMAL = tl.constexpr(2.0**-6)

# Added to a number from 0 to 2^22 it rounds that to an integer (nearest even), which is then the low end of the bits.
_ROUNDER = tl.constexpr(2.0**23)
ROUNDER_BITS = tl.constexpr(0x4B000000)

_MAGNITUDE = tl.constexpr(0x7FFFFFFF)
_EXPONENT = tl.constexpr(0x7F800000)


@triton.jit
def float_bits(x):
    """The bits of fp32 `x`, int32."""
    return x.to(tl.int32, bitcast=True)


@triton.jit
def magnitude(bits):
    """|x| for the bits (int32) of an fp32 `x`."""
    return (bits & _MAGNITUDE).to(tl.float32, bitcast=True)


@triton.jit
def block_scale(amax, input_scale):
    """Step 2: a block's scale as e4m3 byte (int32) and as fp32, from its largest |x|.

    Where `amax` is NaN the byte is `E4M3_NAN` and the fp32 value has no meaning.
    """
    return round_scale(tl.div_rn(amax, input_scale * E2M1_MAX))


@triton.jit
def round_scale(ratio):
    """`ratio`, which is not negative, rounded to e4m3, as `block_scale` returns it."""
    wanted = tl.minimum(ratio, E4M3_MAX)
    # With e the exponent of `wanted`, at least -6, e4m3 is spaced by 2^(e-3) around it. So is fp32 around 2^(e+20).
    rounder = tl.maximum((float_bits(wanted) & _EXPONENT).to(tl.float32, bitcast=True), _E4M3_MIN_NORMAL) * 2.0**20
    rounded = wanted + rounder
    # The bits of `rounded` are 2^23 (e + 147) + k with k = wanted / 2^(e-3), and the byte is 8 (e + 6) + k.
    bits = float_bits(rounded)
    byte = (bits + (bits >> 20) - 8 * 141) & 0x7F
    return tl.where(ratio == ratio, byte, E4M3_NAN), rounded - rounder


@triton.jit
def e2m1_code(y):
    """Step 5: the code of `y`, which is not negative, as an int32 from 0 to 7 plus `ROUNDER_BITS`.

    It is the least of RN(2y), RN(y) + 2, RN(y/2) + 4 and 7: the first three are right where e2m1 is spaced by 1/2,
    1 and 2, and never smaller elsewhere.
    """
    by_half = float_bits(tl.fma(y, 2.0, _ROUNDER))
    by_one = float_bits(y + (_ROUNDER + 2.0))
    by_two = float_bits(tl.fma(y, 0.5, _ROUNDER + 4.0))
    return tl.minimum(tl.minimum(tl.minimum(by_half, by_one), by_two), ROUNDER_BITS + 7)


@triton.jit
def reciprocal_corrections(input_scale):
    """How `corrected_reciprocal` gets the codes of division; and whether it can, for every bf16 value.

    Powers of two change nothing while all numbers are normal, so the eight divisors with a block scale from 1 to 15/8
    stand for all, and the ties 1/4, 3/4, 5/4 and 7/4 of e2m1 for 5/2, 7/2 and 5. At each of these 32 pairs only the
    bf16 number nearest to ``tie * divisor`` can be in doubt, so that one is tried with each of the three reciprocals.

    Returns an int32 that holds, 4 bits a divisor, 0 for the number below, 1 for the nearest, 2 for the one above or 3
    for none; and an int1 scalar, true when no divisor has a 3.
    """
    index = tl.arange(0, 8)
    tie = (tl.arange(0, 4).to(tl.float32) * 0.5 + 0.25)[None, :]
    divisor = ((index.to(tl.float32) * 0.125 + 1.0) * input_scale)[:, None]
    x = ((float_bits(tie * divisor) + 0x8000) & -0x10000).to(tl.float32, bitcast=True)
    code = e2m1_code(tl.div_rn(x, divisor))
    nearest = float_bits(tl.div_rn(1.0, divisor))
    right = tl.zeros([8, 4], tl.int32)
    for choice in tl.static_range(3):
        product = x * (nearest + (choice - 1)).to(tl.float32, bitcast=True)
        right += (e2m1_code(product) == code).to(tl.int32) << (4 * choice)
    right = tl.sum(right, axis=1)  # at how many of 4 ties, in 4 bits a choice
    below, same, above = (right & 0x004) != 0, (right & 0x040) != 0, (right & 0x400) != 0
    choice = tl.where(same, 1, tl.where(above, 2, tl.where(below, 0, 3)))
    choices = tl.sum(choice << (4 * index), axis=0)
    in_range = (input_scale > 2.0**-100) & (input_scale < 2.0**100)
    return choices, in_range & ((choices & (choices >> 1) & 0x11111111) == 0)


@triton.jit
def corrected_reciprocal(scale, divisor, corrections):
    """The factor by which to multiply instead of dividing by `divisor`, the product of `scale` and the input scale."""
    index = (float_bits(scale) >> 20) & 7  # the mantissa of an e4m3 number
    choice = (corrections >> (4 * index)) & 3
    return (float_bits(tl.div_rn(1.0, divisor)) + choice - 1).to(tl.float32, bitcast=True)
