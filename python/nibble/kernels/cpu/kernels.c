/* CPU kernels for small batches, where calling one library operation after the other costs more than the arithmetic.
 *
 * Each function computes what the function of the same name in kernels/torch does; that file is the contract. One
 * thread a call. T rows, K columns of a row, all tensors fp32 and contiguous unless a stride is given. NVFP4 blocks
 * are 16 values along a row. Weights come as `codes` (int8, twice the e2m1 value) and `scales` (fp32, half the e4m3
 * scale), so that code * scale is the exact product e2m1 * e4m3.
 */
#include <math.h>
#include <stdint.h>
#include <string.h>

#define BLOCK 16
#define LANES 8
#define OUTPUTS 4 /* rows of weights that are multiplied at once */

typedef float vector __attribute__((vector_size(LANES * sizeof(float)), aligned(4)));
typedef int32_t integers __attribute__((vector_size(LANES * sizeof(int32_t))));

static float e4m3_values[256];
static const uint8_t code_of_doubled[13] = {0, 1, 2, 3, 4, 0, 5, 0, 6, 0, 0, 0, 7};
static const float e2m1_values[16] = {0, .5f, 1, 1.5f, 2, 3, 4, 6, -0.f, -.5f, -1, -1.5f, -2, -3, -4, -6};

/* To be called once, before any other function. */
void initialize(void) {
    for (int code = 0; code < 256; code++) {
        int exponent = (code >> 3) & 15, mantissa = code & 7;
        float magnitude = exponent ? ldexpf(1 + mantissa / 8.f, exponent - 7) : ldexpf(mantissa / 8.f, -6);
        if ((code & 127) == 127) magnitude = NAN;
        e4m3_values[code] = code & 128 ? -magnitude : magnitude;
    }
}

/* Round to nearest even; `value` is NaN or between 0 and 448. */
static uint8_t e4m3_code(float value) {
    uint32_t bits;
    if (isnan(value)) return 0x7F;
    if (value < 0x1p-6f) return (uint8_t)rintf(value * 0x1p9f); /* subnormal: multiples of 2^-9 */
    memcpy(&bits, &value, sizeof bits);
    bits += 0x7FFFF + ((bits >> 20) & 1);
    return (uint8_t)((bits >> 20) - ((127 - 7) << 3));
}

/* Twice the nearest e2m1 magnitude, ties to even; `y` is between 0 and 6. */
static float doubled_e2m1(float y) {
    return y < 2 ? rintf(y * 2) : y < 4 ? rintf(y) * 2 : rintf(y / 2) * 4;
}

/* One block: its e4m3 scale, and twice its e2m1 magnitudes. */
static uint8_t quantize_block(const float *x, float input_scale, float *doubled) {
    float amax = 0;
    int finite = 1;
    for (int i = 0; i < BLOCK; i++) {
        float magnitude = fabsf(x[i]);
        finite &= magnitude == magnitude;
        amax = magnitude > amax ? magnitude : amax;
    }
    uint8_t code = finite ? e4m3_code(fminf(amax / (6 * input_scale), 448)) : 0x7F;
    float divisor = e4m3_values[code] * input_scale;
    if (divisor == 0) divisor = INFINITY;
    for (int i = 0; i < BLOCK; i++) {
        float y = fminf(fabsf(x[i]) / divisor, 6);
        doubled[i] = doubled_e2m1(finite ? y : 0);
    }
    return code;
}

/* e2m1 * e4m3 of a row, `out` may be `x`. */
static void fake_quantize_row(const float *x, int64_t columns, float input_scale, float *out) {
    float doubled[BLOCK];
    for (int64_t k = 0; k < columns; k += BLOCK) {
        float half = .5f * e4m3_values[quantize_block(x + k, input_scale, doubled)];
        for (int i = 0; i < BLOCK; i++) out[k + i] = copysignf(doubled[i], x[k + i]) * half;
    }
}

void fake_quantize_nvfp4(const float *x, int64_t rows, int64_t columns, float input_scale, float *out) {
    for (int64_t row = 0; row < rows; row++)
        fake_quantize_row(x + row * columns, columns, input_scale, out + row * columns);
}

/* Wire rows: packed e2m1, linear e4m3 scales, expert ids, expert weights, at their offsets in `row_bytes`. */
void quantize_pack(const float *x, const int32_t *topk_ids, const float *topk_weights, int64_t rows, int64_t columns,
                   int64_t top_k, float input_scale, int64_t scale_offset, int64_t ids_offset, int64_t weights_offset,
                   int64_t row_bytes, uint8_t *out) {
    memset(out, 0, rows * row_bytes);
    for (int64_t row = 0; row < rows; row++, x += columns, out += row_bytes) {
        for (int64_t block = 0; block < columns / BLOCK; block++) {
            const float *values = x + block * BLOCK;
            float doubled[BLOCK];
            uint8_t codes[BLOCK];
            uint8_t scale = quantize_block(values, input_scale, doubled);
            out[scale_offset + block] = scale;
            for (int i = 0; i < BLOCK; i++)
                codes[i] = scale == 0x7F ? 0 : code_of_doubled[(int)doubled[i]] | (signbit(values[i]) ? 8 : 0);
            for (int i = 0; i < BLOCK / 2; i++)
                out[block * BLOCK / 2 + i] = (uint8_t)(codes[2 * i] | codes[2 * i + 1] << 4);
        }
        memcpy(out + ids_offset, topk_ids + row * top_k, top_k * sizeof *topk_ids);
        memcpy(out + weights_offset, topk_weights + row * top_k, top_k * sizeof *topk_weights);
    }
}

/* e2m1 * e4m3 of rows that lie `x_stride` and `scale_stride` bytes apart. */
void dequantize_nvfp4(const uint8_t *x, int64_t x_stride, const uint8_t *scales, int64_t scale_stride, int64_t rows,
                      int64_t columns, float *out) {
    for (int64_t row = 0; row < rows; row++)
        for (int64_t block = 0; block < columns / BLOCK; block++) {
            float scale = e4m3_values[scales[row * scale_stride + block]];
            for (int i = 0; i < BLOCK / 2; i++, out += 2) {
                uint8_t pair = x[row * x_stride + block * BLOCK / 2 + i];
                out[0] = e2m1_values[pair & 15] * scale;
                out[1] = e2m1_values[pair >> 4] * scale;
            }
        }
}

static float sum(vector v) {
    return ((v[0] + v[4]) + (v[1] + v[5])) + ((v[2] + v[6]) + (v[3] + v[7]));
}

static vector choose(integers condition, vector yes, vector no) {
    return (vector)(((integers)yes & condition) | ((integers)no & ~condition));
}

/* e^x to about two units in the last place (Cephes' polynomial); 0 far below, and NaN stays. */
static vector exp_vector(vector x) {
    const float shift = 0x1.8p23f; /* adding and subtracting it rounds to an integer */
    vector low = (vector){0} - 87.3f, high = (vector){0} + 88.3f;
    vector clamped = choose(x < low, low, x);
    clamped = choose(clamped > high, high, clamped);
    vector n = (clamped * 1.44269504f + shift) - shift;
    vector r = clamped - n * 0.693359375f + n * 2.12194440e-4f;
    vector p = r * 1.9875691500e-4f + 1.3981999507e-3f;
    p = p * r + 8.3334519073e-3f;
    p = p * r + 4.1665795894e-2f;
    p = p * r + 1.6666665459e-1f;
    p = p * r + 5.0000001201e-1f;
    p = p * r * r + r + 1;
    integers power = (__builtin_convertvector(n, integers) + 127) << 23;
    vector result = p * (vector)power;
    return choose(x < low, (vector){0}, result);
}

/* LANES codes as fp32. */
static inline vector to_floats(const int8_t *codes) {
    integers wide;
    for (int i = 0; i < LANES; i++) wide[i] = codes[i];
    return __builtin_convertvector(wide, vector);
}

/* out [rows, OUTPUTS] = x . w^T for at most 3 `rows` (a constant): weights are read once, as codes. */
static inline __attribute__((always_inline)) void dot_codes(const int8_t *codes, const float *scales,
                                                            const float *const *x, const int rows, int64_t columns,
                                                            float *out) {
    vector total[3][OUTPUTS] = {{{0}}};
    for (int64_t k = 0; k < columns; k += BLOCK)
        for (int n = 0; n < OUTPUTS; n++) {
            float scale = scales[(n * columns + k) / BLOCK];
            for (int half = 0; half < BLOCK; half += LANES) {
                vector w = to_floats(codes + n * columns + k + half) * scale;
                for (int row = 0; row < rows; row++) total[row][n] += w * *(const vector *)(x[row] + k + half);
            }
        }
    for (int row = 0; row < rows; row++)
        for (int n = 0; n < OUTPUTS; n++) out[row * OUTPUTS + n] = sum(total[row][n]);
}

/* The same for any number of rows; each is summed in the same order, whatever their number. */
static void dot_rows(const int8_t *codes, const float *scales, const float *const *x, int64_t rows, int64_t columns,
                     float *out) {
    int64_t row = 0;
    for (; row + 3 <= rows; row += 3) dot_codes(codes, scales, x + row, 3, columns, out + row * OUTPUTS);
    if (rows - row == 2) dot_codes(codes, scales, x + row, 2, columns, out + row * OUTPUTS);
    if (rows - row == 1) dot_codes(codes, scales, x + row, 1, columns, out + row * OUTPUTS);
}

/* out [T, N] = x [T, K] . w [N, K]^T * alpha [N]; x holds e2m1 * e4m3 values, N is a multiple of OUTPUTS. Scratch:
 * `products` OUTPUTS * T floats, T pointers. */
void matmul_nvfp4(const float *x, int64_t rows, int64_t columns, const int8_t *codes, const float *scales,
                  const float *alpha, int64_t outputs, const float **pointers, float *products, float *out) {
    for (int64_t row = 0; row < rows; row++) pointers[row] = x + row * columns;
    for (int64_t first = 0; first < outputs; first += OUTPUTS) {
        dot_rows(codes + first * columns, scales + first * columns / BLOCK, pointers, rows, columns, products);
        for (int64_t row = 0; row < rows; row++)
            for (int n = 0; n < OUTPUTS; n++)
                out[row * outputs + first + n] = products[row * OUTPUTS + n] * alpha[first + n];
    }
}

/* gate = silu(gate) * up, n a multiple of LANES. */
static void silu_and_mul(float *gate, const float *up, int64_t n) {
    for (int64_t i = 0; i < n; i += LANES) {
        vector g = *(vector *)(gate + i);
        *(vector *)(gate + i) = g / (1 + exp_vector(-g)) * *(const vector *)(up + i);
    }
}

/* One expert on the rows that chose it; H and I are multiples of BLOCK. Scratch: `gate_up` [rows, 2I] and
 * `products` [rows, OUTPUTS]. */
static void expert(const float **x, float **out, const float *weights, int64_t rows, int64_t hidden, int64_t width,
                   const int8_t *w13, const float *w13_scales, const int8_t *w2, const float *w2_scales,
                   const float *g1_gate_up, float w2_input_scale, float g2, float *gate_up,
                   float *products) {
    for (int64_t first = 0; first < 2 * width; first += OUTPUTS) {
        float alpha = g1_gate_up[first >= width];
        dot_rows(w13 + first * hidden, w13_scales + first * hidden / BLOCK, x, rows, hidden, products);
        for (int64_t row = 0; row < rows; row++)
            for (int n = 0; n < OUTPUTS; n++)
                gate_up[row * 2 * width + first + n] = products[row * OUTPUTS + n] * alpha;
    }
    for (int64_t row = 0; row < rows; row++) {
        float *gate = gate_up + row * 2 * width;
        silu_and_mul(gate, gate + width, width);
        fake_quantize_row(gate, width, w2_input_scale, gate);
        x[row] = gate;
    }
    for (int64_t first = 0; first < hidden; first += OUTPUTS) {
        dot_rows(w2 + first * width, w2_scales + first * width / BLOCK, x, rows, width, products);
        for (int64_t row = 0; row < rows; row++)
            for (int n = 0; n < OUTPUTS; n++)
                out[row][first + n] += products[row * OUTPUTS + n] * (g2 * weights[row]);
    }
}

/* Routed experts first_expert … first_expert + E - 1 on x [T, H], out [T, H] zeroed by the caller; rows of
 * ids and of weights lie `ids_stride` and `weights_stride` elements apart. Scratch: T (2I + OUTPUTS + 1) floats, 2 T pointers. */
void fused_moe_nvfp4(const float *x, const int32_t *topk_ids, int64_t ids_stride, const float *topk_weights,
                     int64_t weights_stride, int64_t rows, int64_t hidden, int64_t width, int64_t top_k, int64_t first_expert,
                     int64_t num_experts, const int8_t *w13, const float *w13_scales, const int8_t *w2,
                     const float *w2_scales, const float *g1_gate_up, const float *w2_input_scale, const float *g2,
                     const float **pointers, float *scratch, float *out) {
    const float **inputs = pointers;
    float **outputs = (float **)(pointers + rows);
    /* What is read in whole vectors comes first, where it is aligned. */
    float *gate_up = scratch;
    float *products = gate_up + rows * 2 * width, *weights = products + OUTPUTS * rows;
    for (int64_t e = 0; e < num_experts; e++) {
        int64_t count = 0;
        for (int64_t row = 0; row < rows; row++)
            for (int64_t k = 0; k < top_k; k++)
                if (topk_ids[row * ids_stride + k] == first_expert + e) {
                    inputs[count] = x + row * hidden;
                    outputs[count] = out + row * hidden;
                    weights[count++] = topk_weights[row * weights_stride + k];
                }
        if (count)
            expert(inputs, outputs, weights, count, hidden, width, w13 + e * 2 * width * hidden,
                   w13_scales + e * 2 * width * hidden / BLOCK, w2 + e * hidden * width,
                   w2_scales + e * hidden * width / BLOCK, g1_gate_up + 2 * e, w2_input_scale[e], g2[e], gate_up,
                   products);
    }
}

/* x and out: T rows of N heads of K values, heads `head_stride` and rows `row_stride` elements apart in x. */
void rms_norm(const float *x, int64_t rows, int64_t row_stride, int64_t heads, int64_t head_stride, int64_t columns,
              const float *weight, float eps, float *out) {
    for (int64_t row = 0; row < rows; row++)
        for (int64_t head = 0; head < heads; head++, out += columns) {
            const float *values = x + row * row_stride + head * head_stride;
            double squares = 0;
            for (int64_t k = 0; k < columns; k++) squares += (double)values[k] * values[k];
            float factor = 1 / sqrtf((float)(squares / columns) + eps);
            for (int64_t k = 0; k < columns; k++) out[k] = values[k] * factor * weight[k];
        }
}

/* scores[t] = q . key of token t * scale, over the pages of one sequence; returns the largest, NaN if any is. */
static float scores_of(const float *q, const float *keys, const int64_t *pages, int64_t length, int64_t page_size,
                       int64_t stride, int64_t size, float scale, float *scores) {
    float largest = -INFINITY;
    for (int64_t t = 0; t < length; pages++)
        for (int64_t slot = 0; slot < page_size && t < length; slot++, t++) {
            const float *key = keys + (*pages * page_size + slot) * stride;
            vector even = {0}, odd = {0};
            for (int64_t d = 0; d < size; d += 2 * LANES) {
                even += *(const vector *)(q + d) * *(const vector *)(key + d);
                odd += *(const vector *)(q + d + LANES) * *(const vector *)(key + d + LANES);
            }
            scores[t] = sum(even + odd) * scale;
            largest = scores[t] > largest || isnan(scores[t]) ? scores[t] : largest;
        }
    return largest;
}

/* scores become e^(score - largest); returns their sum. Up to LANES - 1 scores past `length` are overwritten. */
static float softmax_weights(float *scores, int64_t length, float largest) {
    float total = 0;
    for (int64_t t = 0; t < length; t += LANES) *(vector *)(scores + t) = exp_vector(*(vector *)(scores + t) - largest);
    for (int64_t t = 0; t < length; t++) total += scores[t];
    return total;
}

/* One query a sequence: q and out [B, N, D], caches [pages, page_size, kv_heads, D], page_tables [B, P] int64,
 * seq_lens [B] int64; D a multiple of 2 LANES. Scratch: P * page_size + LANES floats. */
void decode_attention(const float *q, const float *keys, const float *values, const int64_t *page_tables,
                      int64_t pages, const int64_t *seq_lens, int64_t batch, int64_t heads, int64_t kv_heads,
                      int64_t size, int64_t page_size, float *scratch, float *out) {
    for (int64_t b = 0; b < batch; b++)
        for (int64_t head = 0; head < heads; head++, q += size, out += size) {
            const int64_t *table = page_tables + b * pages;
            int64_t first = head / (heads / kv_heads) * size, stride = kv_heads * size, length = seq_lens[b];
            float largest =
                scores_of(q, keys + first, table, length, page_size, stride, size, 1 / sqrtf((float)size), scratch);
            float total = softmax_weights(scratch, length, largest);
            memset(out, 0, size * sizeof *out);
            for (int64_t t = 0; t < length; table++)
                for (int64_t slot = 0; slot < page_size && t < length; slot++, t++) {
                    const float *value = values + first + (*table * page_size + slot) * stride;
                    float weight = scratch[t] / total;
                    for (int64_t d = 0; d < size; d += LANES)
                        *(vector *)(out + d) += weight * *(const vector *)(value + d);
                }
        }
}
