/* The quantizer of NVFP4 activations, as kernels/torch/nvfp4.py defines it bit for bit. */
#ifndef NIBBLE_NVFP4_H
#define NIBBLE_NVFP4_H

#include "vector.h"

#define BLOCK LANES
#define WEIGHT_ZERO 12 /* added to twice a weight in the products, so that it is not negative */

extern float e4m3_values[256];

/* Round to nearest even; `value` is NaN or between 0 and 448. */
INLINE uint8_t e4m3_code(float value) {
    uint32_t bits;
    if (isnan(value)) return 0x7F;
    if (value < 0x1p-6f) return (uint8_t)rintf(value * 0x1p9f); /* subnormal: multiples of 2^-9 */
    memcpy(&bits, &value, sizeof bits);
    bits += 0x7FFFF + ((bits >> 20) & 1);
    return (uint8_t)((bits >> 20) - ((127 - 7) << 3));
}

typedef struct {
    uint8_t scale;   /* e4m3 */
    floats rounded;  /* |x| / scale rounded to a multiple of 1/2, 1 or 2, counted in these */
    floats step;     /* twice that multiple: `rounded * step` is twice the e2m1 magnitude */
} Block;

/* Ties to even. A block with a NaN has the scale NaN and zeros. */
INLINE Block quantize_block(floats x, float input_scale) {
    floats size = magnitude(x);
    int finite = !any(size != size);
    float wanted = largest_of(size) / (6 * input_scale);
    uint8_t scale = finite ? e4m3_code(wanted > 448 ? 448 : wanted) : 0x7F;
    float divisor = e4m3_values[scale] * input_scale;
    floats y = finite && divisor != 0 ? size / divisor : (floats){0};
    y = choose(y > 6, all(6), y);
    floats step = choose(y < 2, all(1), choose(y < 4, all(2), all(4)));
    floats per_step = choose(y < 2, all(2), choose(y < 4, all(1), all(.5f)));
    return (Block){scale, round_to_integer(y * per_step), step};
}

/* What the products need of a block besides its codes, which are twice its e2m1 values. */
typedef struct {
    float scale;
    int32_t start; /* of the sum of products: what the codes times WEIGHT_ZERO would add, negative */
} Factor;

INLINE Factor factor_of(uint8_t scale, int32_t sum_of_codes) {
    return (Factor){e4m3_values[scale], -WEIGHT_ZERO * sum_of_codes};
}

INLINE void quantize_to_codes(floats x, float input_scale, int8_t *codes, Factor *factor) {
    Block block = quantize_block(x, input_scale);
    floats doubled = block.rounded * block.step;
    doubled = choose(x < 0, -doubled, doubled);
    lane_bytes narrow = __builtin_convertvector(__builtin_convertvector(doubled, ints), lane_bytes);
    memcpy(codes, &narrow, sizeof narrow);
    *factor = factor_of(block.scale, (int32_t)sum(doubled));
}

#endif
