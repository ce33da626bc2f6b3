/* What a decoder layer does around its matrix products: normalization, rotary embedding, attention over the paged KV
 * cache, and the router's choice of experts. All tensors fp32 and contiguous unless a stride is given. T rows, N
 * heads of D values, D a multiple of 16.
 */
#include <stdlib.h>

#include "vector.h"

/* 1 / the root of the mean square. */
static float inverse_rms(const float *x, int64_t columns, float eps) {
    floats squares = {0};
    int64_t k = 0;
    for (; k + LANES <= columns; k += LANES) squares += load(x + k) * load(x + k);
    floats rest = load_some(x + k, columns - k);
    return 1 / sqrtf(sum(squares + rest * rest) / columns + eps);
}

/* x [T, K] in rows that lie `stride` apart, weight [K], out [T, K]. */
void rms_norm(const float *x, int64_t rows, int64_t stride, int64_t columns, const float *restrict weight, float eps,
              float *restrict out) {
    for (int64_t row = 0; row < rows; row++, x += stride, out += columns) {
        float factor = inverse_rms(x, columns, eps);
        for (int64_t k = 0; k < columns; k++) out[k] = x[k] * factor * weight[k];
    }
}

/* total = x + residual [T, K], out = rms_norm(total). */
void add_rms_norm(const float *x, const float *residual, int64_t rows, int64_t columns, const float *weight, float eps,
                  float *out, float *total) {
    for (int64_t i = 0; i < rows * columns; i++) total[i] = x[i] + residual[i];
    rms_norm(total, rows, columns, columns, weight, eps, out);
}

/* x [T, N, D], rows `stride` apart: each head is normalized, then rotated by the angles of its position. cos and
 * signed_sin [positions, D] as in kernels/torch/norm.py; out [T, N, D]. */
static void norm_rope(const float *x, int64_t rows, int64_t stride, int64_t heads, int64_t size,
                      const float *restrict weight, float eps, const int64_t *positions, const float *cos,
                      const float *signed_sin, float *restrict out) {
    for (int64_t row = 0; row < rows; row++) {
        const float *restrict c = cos + positions[row] * size, *restrict s = signed_sin + positions[row] * size;
        for (int64_t head = 0; head < heads; head++, out += size) {
            const float *in = x + row * stride + head * size;
            float factor = inverse_rms(in, size, eps);
            int64_t half = size / 2;
            for (int64_t d = 0; d < half; d++) {
                float first = in[d] * factor * weight[d], second = in[half + d] * factor * weight[half + d];
                out[d] = first * c[d] + second * s[d];
                out[half + d] = second * c[half + d] + first * s[half + d];
            }
        }
    }
}

/* Queries and keys of the same rows, with a weight each. */
void qk_norm_rope(const float *q, const float *k, int64_t rows, int64_t stride, int64_t heads, int64_t kv_heads,
                  int64_t size, const float *q_weight, const float *k_weight, float eps, const int64_t *positions,
                  const float *cos, const float *signed_sin, float *q_out, float *k_out) {
    norm_rope(q, rows, stride, heads, size, q_weight, eps, positions, cos, signed_sin, q_out);
    norm_rope(k, rows, stride, kv_heads, size, k_weight, eps, positions, cos, signed_sin, k_out);
}

/* k and v, rows of `size` values that lie `stride` apart, into rows `slots` of the caches; `size` is a multiple of
 * LANES. */
void store_kv(const float *k, int64_t k_stride, const float *v, int64_t v_stride, int64_t rows, int64_t size,
              const int64_t *slots, char *keys, char *values, int64_t itemsize) {
    for (int64_t row = 0; row < rows; row++, k += k_stride, v += v_stride) {
        char *key = keys + slots[row] * size * itemsize, *value = values + slots[row] * size * itemsize;
        for (int64_t i = 0; i < size; i += LANES) {
            store_cached(key + i * itemsize, load(k + i), itemsize);
            store_cached(value + i * itemsize, load(v + i), itemsize);
        }
    }
}

static int64_t round_up(int64_t count) { return (count + LANES - 1) / LANES * LANES; }

/* One head of a cache: token t's row begins at first + offsets[t]. */
typedef struct {
    const char *first;
    const int64_t *offsets;
} Head;

/* The rows of a sequence's tokens, counted in bytes from the start of the cache. */
static void find_rows(const int64_t *pages, int64_t length, int64_t page_size, int64_t row_size, int64_t *offsets) {
    for (int64_t start = 0; start < length; start += page_size, pages++)
        for (int64_t i = 0; i < page_size && start + i < length; i++)
            offsets[start + i] = (*pages * page_size + i) * row_size;
}

/* scores[h][t] = q[h] . key of token t * scale, for `count` (1 or 2, a constant) heads that share their keys; `room`,
 * a multiple of LANES, is what each head has. All LANES sums are reduced together: LANES / count tokens of each head. */
INLINE void scores_of(const float *q, Head keys, int64_t length, int64_t size, float scale, const int itemsize,
                      const int count, float *scores, int64_t room) {
    const int tokens = LANES / count;
    for (int64_t t = 0; t < length; t += tokens) {
        const char *rows[LANES];
        floats totals[LANES] = {{0}};
        for (int i = 0; i < tokens; i++) rows[i] = keys.first + keys.offsets[t + i < length ? t + i : length - 1];
        for (int64_t d = 0; d < size; d += LANES) {
            floats parts[2] = {load(q + d), load(q + (count - 1) * size + d)};
            for (int i = 0; i < tokens; i++) {
                floats key = load_cached(rows[i] + d * itemsize, itemsize);
                for (int h = 0; h < count; h++) totals[h * tokens + i] += parts[h] * key;
            }
        }
        float sums[LANES];
        store(sums, sums_of(totals) * scale);
        for (int h = 0; h < count; h++) memcpy(scores + h * room + t, sums + h * tokens, tokens * sizeof *sums);
    }
}

/* In place, with zeros up to the next multiple of LANES; NaN if any score is. */
static void softmax(float *scores, int64_t length) {
    floats largest = all(-INFINITY), total = {0};
    for (int64_t t = length; t % LANES; t++) scores[t] = -INFINITY;
    for (int64_t t = 0; t < length; t += LANES) largest = larger(largest, load(scores + t));
    float shift = largest_of(largest);
    for (int64_t t = 0; t < length; t += LANES) {
        floats weight = exp_of(load(scores + t) - shift);
        store(scores + t, weight);
        total += weight;
    }
    float factor = 1 / sum(total);
    for (int64_t t = 0; t < length; t += LANES) store(scores + t, load(scores + t) * factor);
}

/* out[h][d] = the sum of weights[h][t] * value of token t, for `width` (a constant) vectors of d from `first` on. */
INLINE void weighted_part(const float *weights, int64_t room, Head values, int64_t length, int64_t first, int64_t size,
                          const int width, const int itemsize, const int count, float *out) {
    floats totals[2][4] = {{{0}}};
    for (int64_t t = 0; t < length; t++) {
        const char *row = values.first + values.offsets[t] + first * itemsize;
        for (int i = 0; i < width; i++) {
            floats value = load_cached(row + i * LANES * itemsize, itemsize);
            for (int h = 0; h < count; h++) totals[h][i] += weights[h * room + t] * value;
        }
    }
    for (int h = 0; h < count; h++)
        for (int i = 0; i < width; i++) store(out + h * size + first + i * LANES, totals[h][i]);
}

/* One query of `count` heads that share keys and values. Scratch: `count` times `room` scores. */
INLINE void attend(const float *q, Head keys, Head values, int64_t length, int64_t size, int64_t value_size,
                   float scale, const int itemsize, const int count, float *scores, int64_t room, float *out) {
    scores_of(q, keys, length, size, scale, itemsize, count, scores, room);
    for (int h = 0; h < count; h++) softmax(scores + h * room, length);
    int64_t d = 0;
    for (; d + 4 * LANES <= value_size; d += 4 * LANES)
        weighted_part(scores, room, values, length, d, value_size, 4, itemsize, count, out);
    for (; d < value_size; d += LANES)
        weighted_part(scores, room, values, length, d, value_size, 1, itemsize, count, out);
}

/* One query a sequence: q [B, N, D], out [B, N, V], keys [pages, page_size, kv_heads, D] of `itemsize` bytes an
 * element, page_tables [B, P] int64, seq_lens [B] int64. Rows of values lie as far apart as those of keys, and have
 * V <= D elements, both multiples of LANES; with one head they may lie in the keys. */
void decode_attention(const float *q, const char *keys, const char *values, const int64_t *page_tables,
                      int64_t pages, const int64_t *seq_lens, int64_t batch, int64_t heads, int64_t kv_heads,
                      int64_t size, int64_t value_size, float scale, int64_t page_size, int64_t itemsize, float *out) {
    const int64_t group = heads / kv_heads, room = round_up(pages * page_size);
    int64_t *offsets = malloc(room * sizeof *offsets);
    const int count = group % 2 == 0 ? 2 : 1;
    float *scores = malloc(count * room * sizeof *scores);
    for (int64_t b = 0; b < batch; b++, page_tables += pages) {
        const int64_t length = seq_lens[b];
        find_rows(page_tables, length, page_size, kv_heads * size * itemsize, offsets);
        for (int64_t head = 0; head < heads; head += count, q += count * size, out += count * value_size) {
            const int64_t first = head / group * size * itemsize;
            const Head k = {keys + first, offsets}, v = {values + first, offsets};
            if (itemsize == 2 && count == 2)
                attend(q, k, v, length, size, value_size, scale, 2, 2, scores, room, out);
            else if (itemsize == 2)
                attend(q, k, v, length, size, value_size, scale, 2, 1, scores, room, out);
            else if (count == 2)
                attend(q, k, v, length, size, value_size, scale, 4, 2, scores, room, out);
            else
                attend(q, k, v, length, size, value_size, scale, 4, 1, scores, room, out);
        }
    }
    free(offsets), free(scores);
}

/* The k largest of softmax(logits [T, E]), the lower expert first where they are equal, NaN before all numbers. */
void topk_softmax(const float *logits, int64_t rows, int64_t experts, int64_t top_k, int renormalize, int32_t *ids,
                  float *weights) {
    float *scratch = malloc(round_up(experts) * sizeof *scratch);
    for (int64_t row = 0; row < rows; row++, logits += experts, ids += top_k, weights += top_k) {
        memcpy(scratch, logits, experts * sizeof *logits);
        softmax(scratch, experts);
        float total = 0;
        for (int64_t k = 0; k < top_k; k++) {
            int64_t best = -1;
            for (int64_t e = 0; e < experts; e++)
                if (scratch[e] != -1 && (best < 0 || scratch[e] > scratch[best])) best = e;
            ids[k] = (int32_t)best;
            weights[k] = scratch[best];
            total += scratch[best];
            scratch[best] = -1; /* taken */
        }
        for (int64_t k = 0; renormalize && k < top_k; k++) weights[k] /= total;
    }
    free(scratch);
}

/* out [T, N] = x [T, K] . w [N, K]^T, for the few outputs of a router; each summed in the same order for any T. */
void linear(const float *x, int64_t rows, int64_t columns, const float *weight, int64_t outputs, float *out) {
    for (int64_t row = 0; row < rows; row++, x += columns, out += outputs)
        for (int64_t first = 0; first < outputs; first += LANES) {
            int64_t width = outputs - first < LANES ? outputs - first : LANES;
            floats totals[LANES] = {{0}};
            for (int64_t k = 0; k < columns; k += LANES) {
                int64_t count = columns - k < LANES ? columns - k : LANES;
                floats part = count == LANES ? load(x + k) : load_some(x + k, count);
                for (int64_t i = 0; i < width; i++) {
                    const float *w = weight + (first + i) * columns + k;
                    totals[i] += part * (count == LANES ? load(w) : load_some(w, count));
                }
            }
            store_some(out + first, sums_of(totals), width);
        }
}

/* The first of the largest of each row, -1 for a row with a number that is not finite. */
void argmax(const float *x, int64_t rows, int64_t columns, int64_t *out) {
    for (int64_t row = 0; row < rows; row++, x += columns) {
        floats largest = all(-INFINITY), doubtful = {0};
        int64_t k = 0;
        for (; k + LANES <= columns; k += LANES) {
            largest = larger(load(x + k), largest);
            doubtful += load(x + k) - load(x + k); /* NaN for infinities, too */
        }
        float best = largest_of(largest), doubt = sum(doubtful);
        for (; k < columns; k++) best = x[k] > best ? x[k] : best, doubt += x[k] - x[k];
        for (k = 0; doubt == 0 && x[k] != best;) k++;
        out[row] = doubt == 0 ? k : -1;
    }
}
