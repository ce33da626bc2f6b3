/* NVFP4 on a CPU: the quantizer, the wire row, linear layers and experts. The functions of the same names in
 * kernels/torch are the contract. One thread a call. T rows, K columns of a row, N outputs, blocks of 16 values along
 * a row.
 *
 * Products are of integers: twice an e2m1 value is one, and a block's sum of 16 products is exact. So is the product
 * of its two e4m3 scales; what rounds is the fp32 sum over blocks, whose order does not depend on the number of rows.
 *
 * Weights lie in tiles of 16 outputs. For each block of columns a tile holds 128 bytes of e2m1 codes, such that byte
 * 4 l + i of the first (second) 64 holds output l's columns i and 4 + i (8 + i and 12 + i) in its low and high half,
 * and 16 scales as bf16, a quarter of the e4m3 value because both factors of a product are doubled.
 */
#include <stdlib.h>

#include "nvfp4.h"

#define MAX_ROWS 16 /* that read a tile at once; their sums stay in registers */
#define TILE_BLOCK_BYTES 128

float e4m3_values[256];
static uint16_t doubled_codes[256]; /* the two e2m1 values of a byte, doubled, */
static int8_t sums_of_codes[256];   /* and their sum */

/* To be called once, before any other function. */
void initialize(void) {
    static const int8_t doubled[8] = {0, 1, 2, 3, 4, 6, 8, 12};
    for (int code = 0; code < 256; code++) {
        int exponent = (code >> 3) & 15, mantissa = code & 7;
        float value = exponent ? ldexpf(1 + mantissa / 8.f, exponent - 7) : ldexpf(mantissa / 8.f, -6);
        if ((code & 127) == 127) value = NAN;
        e4m3_values[code] = code & 128 ? -value : value;

        int8_t pair[2];
        for (int i = 0; i < 2; i++) {
            int nibble = code >> (4 * i) & 15;
            pair[i] = nibble & 8 ? -doubled[nibble & 7] : doubled[nibble];
        }
        memcpy(&doubled_codes[code], pair, sizeof pair);
        sums_of_codes[code] = pair[0] + pair[1];
    }
}

/* Rows of activations as the products read them; the pointers may be put in any order. */
typedef struct {
    const int8_t **codes;
    const Factor **factors; /* one a block */
} Rows;

/* Room for `rows` rows; whoever gets it frees `codes`, which holds it all. */
static Rows allocate_rows(int64_t rows, int64_t columns) {
    const int64_t blocks = columns / BLOCK;
    void **memory = malloc(rows * (2 * sizeof(void *) + blocks * sizeof(Factor) + columns));
    Rows result = {(const int8_t **)memory, (const Factor **)(memory + rows)};
    Factor *factors = (Factor *)(memory + 2 * rows);
    int8_t *codes = (int8_t *)(factors + rows * blocks);
    for (int64_t row = 0; row < rows; row++) {
        result.codes[row] = codes + row * columns;
        result.factors[row] = factors + row * blocks;
    }
    return result;
}

/* x [T, K] as codes int8 [T, K] and factors [T, K/16]. */
void quantize_rows(const float *x, int64_t rows, int64_t columns, float input_scale, int8_t *codes, Factor *factors) {
    for (int64_t i = 0; i < rows * columns / BLOCK; i++)
        quantize_to_codes(load(x + i * BLOCK), input_scale, codes + i * BLOCK, factors + i);
}

/* The same from e2m1 pairs and e4m3 scales in rows that lie `x_stride` and `scale_stride` bytes apart. */
static void decode_rows(const uint8_t *x, int64_t x_stride, const uint8_t *x_scales, int64_t scale_stride, int64_t rows,
                 int64_t columns, int8_t *codes, Factor *factors) {
    for (int64_t row = 0; row < rows; row++, codes += columns, factors += columns / BLOCK) {
        const uint8_t *pairs = x + row * x_stride, *row_scales = x_scales + row * scale_stride;
        for (int64_t block = 0; block < columns / BLOCK; block++, pairs += BLOCK / 2) {
            int32_t total = 0;
            for (int i = 0; i < BLOCK / 2; i++) {
                memcpy(codes + block * BLOCK + 2 * i, &doubled_codes[pairs[i]], 2);
                total += sums_of_codes[pairs[i]];
            }
            factors[block] = factor_of(row_scales[block], total);
        }
    }
}

/* Wire rows: packed e2m1, linear e4m3 scales, expert ids, expert weights, at their offsets in `row_bytes`. */
void quantize_pack(const float *x, const int32_t *topk_ids, const float *topk_weights, int64_t rows, int64_t columns,
                   int64_t top_k, float input_scale, int64_t scale_offset, int64_t ids_offset, int64_t weights_offset,
                   int64_t row_bytes, uint8_t *out) {
    memset(out, 0, rows * row_bytes);
    for (int64_t row = 0; row < rows; row++, x += columns, out += row_bytes) {
        for (int64_t i = 0; i < columns / BLOCK; i++) {
            floats values = load(x + i * BLOCK);
            Block block = quantize_block(values, input_scale);
            out[scale_offset + i] = block.scale;
            /* Codes count 0, .5, 1, 1.5 | 2, 3 | 4, 6: the number of steps, plus 2 for each longer step. */
            ints longer = (block.step > 1) + (block.step > 2);
            ints negative = (ints)values < 0;
            ints codes = __builtin_convertvector(block.rounded, ints) - 2 * longer;
            codes |= negative & (block.scale != 0x7F ? 8 : 0);
            lane_bytes narrow = __builtin_convertvector(codes, lane_bytes);
            uint16_t pairs[BLOCK / 2];
            memcpy(pairs, &narrow, sizeof pairs);
            for (int j = 0; j < BLOCK / 2; j++) out[i * BLOCK / 2 + j] = (uint8_t)(pairs[j] | pairs[j] >> 4);
        }
        memcpy(out + ids_offset, topk_ids + row * top_k, top_k * sizeof *topk_ids);
        memcpy(out + weights_offset, topk_weights + row * top_k, top_k * sizeof *topk_weights);
    }
}

/* One matrix as described above, or a part of it that begins with a tile. */
typedef struct {
    const uint8_t *codes;
    const uint16_t *scales;
    int64_t blocks; /* along a row of weights */
} Matrix;

static Matrix part(Matrix matrix, int64_t first_tile) {
    matrix.codes += first_tile * matrix.blocks * TILE_BLOCK_BYTES;
    matrix.scales += first_tile * matrix.blocks * LANES;
    return matrix;
}

/* sums[r] = row r times each of the tile's 16 outputs; `rows` is a constant. */
INLINE void multiply_tile(Matrix tile, Rows x, const int rows, floats *sums) {
#define CODES 12, 13, 14, 15, 16, 18, 20, 24, 12, 11, 10, 9, 8, 6, 4, 0 /* twice e2m1, plus WEIGHT_ZERO */
    const bytes table = {CODES, CODES, CODES, CODES};
#undef CODES
    floats totals[MAX_ROWS] = {{0}};
    for (int64_t block = 0; block < tile.blocks; block++) {
        const unaligned_bytes *packed = (const unaligned_bytes *)(tile.codes + block * TILE_BLOCK_BYTES);
        const bytes w[4] = {
            look_up(table, packed[0] & 15), look_up(table, packed[0] >> 4),
            look_up(table, packed[1] & 15), look_up(table, packed[1] >> 4),
        };
        const floats scales = load_bf16(tile.scales + block * LANES);
        for (int row = 0; row < rows; row++) {
            const int8_t *codes = x.codes[row] + block * BLOCK;
            const Factor factor = x.factors[row][block];
            ints dot = (ints){0} + factor.start;
            for (int i = 0; i < 4; i++) dot = dot4(dot, codes + 4 * i, w[i]);
            totals[row] += __builtin_convertvector(dot, floats) * (scales * factor.scale);
        }
    }
    for (int row = 0; row < rows; row++) sums[row] = totals[row];
}

static int multiply_some(Matrix tile, Rows x, int64_t rows, floats *sums) {
    switch (rows) {
    case 1: multiply_tile(tile, x, 1, sums); return 1;
    case 2: multiply_tile(tile, x, 2, sums); return 2;
    case 3: multiply_tile(tile, x, 3, sums); return 3;
    case 4: multiply_tile(tile, x, 4, sums); return 4;
    case 5: multiply_tile(tile, x, 5, sums); return 5;
    case 6: multiply_tile(tile, x, 6, sums); return 6;
    case 7: multiply_tile(tile, x, 7, sums); return 7;
    }
    if (rows < MAX_ROWS) {
        multiply_tile(tile, x, 8, sums);
        return 8;
    }
    multiply_tile(tile, x, MAX_ROWS, sums);
    return MAX_ROWS;
}

/* out [T, N] = quantize(x [T, K]) . w [N, K]^T * alpha [N]. */
void linear_nvfp4(const float *x, int64_t rows, int64_t columns, float input_scale, const uint8_t *weights,
                  const uint16_t *scales, const float *alpha, int64_t outputs, float *out) {
    if (rows == 0) return;
    const Matrix matrix = {weights, scales, columns / BLOCK};
    Rows quantized = allocate_rows(rows, columns);
    quantize_rows(x, rows, columns, input_scale, (int8_t *)quantized.codes[0], (Factor *)quantized.factors[0]);
    for (int64_t first = 0; first < outputs; first += LANES) {
        int64_t width = outputs - first < LANES ? outputs - first : LANES;
        floats factor = load_some(alpha + first, width), sums[MAX_ROWS];
        Matrix tile = part(matrix, first / LANES);
        for (int64_t row = 0, count; row < rows; row += count) {
            count = multiply_some(tile, (Rows){quantized.codes + row, quantized.factors + row}, rows - row, sums);
            for (int64_t i = 0; i < count; i++) {
                float *place = out + (row + i) * outputs + first;
                if (width == LANES)
                    store(place, sums[i] * factor);
                else
                    store_some(place, sums[i] * factor, width);
            }
        }
    }
    free(quantized.codes);
}

/* The stacked experts of one rank: E matrices w13 [2I, H], gate before up, and w2 [H, I]. */
typedef struct {
    Matrix w13, w2;
    const float *g1_gate_up, *w2_input_scale, *g2;
} Experts;

/* h = quantize(silu(gate) * up) for the rows of one expert. */
static void gate_and_up(const Experts *experts, int64_t expert, Rows x, int64_t rows, int8_t *h, Factor *h_factors) {
    const int64_t tiles = experts->w2.blocks;
    const float *alpha = experts->g1_gate_up + 2 * expert;
    for (int64_t tile = 0; tile < tiles; tile++) {
        Matrix gate_tile = part(experts->w13, 2 * expert * tiles + tile), up_tile = part(gate_tile, tiles);
        for (int64_t row = 0, count; row < rows; row += count) {
            floats gate[MAX_ROWS], up[MAX_ROWS];
            Rows some = {x.codes + row, x.factors + row};
            multiply_some(gate_tile, some, rows - row, gate);
            count = multiply_some(up_tile, some, rows - row, up);
            for (int64_t i = 0; i < count; i++) {
                floats g = gate[i] * alpha[0], product = g / (1 + exp_of(-g)) * (up[i] * alpha[1]);
                int64_t block = (row + i) * tiles + tile;
                quantize_to_codes(product, experts->w2_input_scale[expert], h + block * BLOCK, h_factors + block);
            }
        }
    }
}

/* out[row] += down(h) * weight, for the rows of one expert. */
static void down(const Experts *experts, int64_t expert, Rows h, const float *weights, int64_t rows, float **out) {
    const int64_t tiles = experts->w13.blocks;
    for (int64_t tile = 0; tile < tiles; tile++) {
        Matrix w2_tile = part(experts->w2, expert * tiles + tile);
        for (int64_t row = 0, count; row < rows; row += count) {
            floats sums[MAX_ROWS];
            count = multiply_some(w2_tile, (Rows){h.codes + row, h.factors + row}, rows - row, sums);
            for (int64_t i = 0; i < count; i++) {
                float *place = out[row + i] + tile * LANES;
                store(place, load(place) + sums[i] * (experts->g2[expert] * weights[row + i]));
            }
        }
    }
}

/* Routed experts first_expert … first_expert + E - 1 on T rows, as `decode_rows` takes them; out [T, H]. Rows of ids
 * and of weights lie `ids_stride` and `weights_stride` elements apart; H and I are multiples of BLOCK. */
void fused_moe_nvfp4(const uint8_t *x, int64_t x_stride, const uint8_t *x_scales, int64_t scale_stride,
                     const int32_t *topk_ids, int64_t ids_stride, const float *topk_weights, int64_t weights_stride,
                     int64_t rows, int64_t hidden, int64_t width, int64_t top_k, int64_t first_expert,
                     int64_t num_experts, const uint8_t *w13, const uint16_t *w13_scales, const uint8_t *w2,
                     const uint16_t *w2_scales, const float *g1_gate_up, const float *w2_input_scale, const float *g2,
                     float *out) {
    const int64_t x_blocks = hidden / BLOCK, h_blocks = width / BLOCK;
    const Experts experts = {{w13, w13_scales, x_blocks}, {w2, w2_scales, h_blocks}, g1_gate_up, w2_input_scale, g2};
    if (rows == 0) return;
    const int64_t most = rows * top_k; /* of one expert, should a row name it more than once */
    Rows all_rows = allocate_rows(rows, hidden), chosen = allocate_rows(most, 0), h = allocate_rows(most, width);
    float **places = malloc(most * sizeof *places), *weights = malloc(most * sizeof *weights);
    decode_rows(x, x_stride, x_scales, scale_stride, rows, hidden, (int8_t *)all_rows.codes[0],
                (Factor *)all_rows.factors[0]);
    memset(out, 0, rows * hidden * sizeof *out);
    for (int64_t expert = 0; expert < num_experts; expert++) {
        int64_t count = 0;
        for (int64_t row = 0; row < rows; row++)
            for (int64_t k = 0; k < top_k; k++)
                if (topk_ids[row * ids_stride + k] == first_expert + expert) {
                    chosen.codes[count] = all_rows.codes[row];
                    chosen.factors[count] = all_rows.factors[row];
                    places[count] = out + row * hidden;
                    weights[count++] = topk_weights[row * weights_stride + k];
                }
        gate_and_up(&experts, expert, chosen, count, (int8_t *)h.codes[0], (Factor *)h.factors[0]);
        down(&experts, expert, h, weights, count, places);
    }
    free(all_rows.codes), free(chosen.codes), free(h.codes), free(places), free(weights);
}
