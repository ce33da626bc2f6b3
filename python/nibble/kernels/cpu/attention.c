/* What a decoder layer does around its matrix products: normalization, rotary embedding, attention over the paged KV
 * cache, and the router's choice of experts. All tensors fp32 and contiguous unless a stride is given. T rows, N
 * heads of D values, D a multiple of 16.
 */
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
void rms_norm(const float *x, int64_t rows, int64_t stride, int64_t columns, const float *weight, float eps,
              float *out) {
    for (int64_t row = 0; row < rows; row++, x += stride, out += columns) {
        float factor = inverse_rms(x, columns, eps);
        for (int64_t k = 0; k < columns; k++) out[k] = x[k] * factor * weight[k];
    }
}

/* x [T, N, D], rows `stride` apart: each head is normalized, then rotated by the angles of its position. cos and
 * signed_sin [positions, D] as in layers/rotary.py; out [T, N, D]. */
void norm_rope(const float *x, int64_t rows, int64_t stride, int64_t heads, int64_t size, const float *weight,
               float eps, const int64_t *positions, const float *cos, const float *signed_sin, float *out) {
    for (int64_t row = 0; row < rows; row++) {
        const float *c = cos + positions[row] * size, *s = signed_sin + positions[row] * size;
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

/* k and v, rows of `size` values that lie `stride` apart, into rows `slots` of the caches. */
void store_kv(const float *k, int64_t k_stride, const float *v, int64_t v_stride, int64_t rows, int64_t size,
              const int64_t *slots, float *keys, float *values) {
    for (int64_t row = 0; row < rows; row++) {
        memcpy(keys + slots[row] * size, k + row * k_stride, size * sizeof *k);
        memcpy(values + slots[row] * size, v + row * v_stride, size * sizeof *v);
    }
}

typedef struct {
    int64_t heads, kv_heads, size, page_size;
} Shape;

/* scores[head][t] = q . key of token t * scale, `room` scores a head. All heads go through the cache together. */
static void scores_of(const float *q, const float *keys, const int64_t *pages, int64_t length, Shape shape,
                      float *scores, int64_t room) {
    const int64_t group = shape.heads / shape.kv_heads;
    const float scale = 1 / sqrtf((float)shape.size);
    for (int64_t t = 0; t < length; t++) {
        int64_t slot = pages[t / shape.page_size] * shape.page_size + t % shape.page_size;
        const float *key = keys + slot * shape.kv_heads * shape.size;
        for (int64_t head = 0; head < shape.heads; head++) {
            const float *query = q + head * shape.size, *own_key = key + head / group * shape.size;
            floats total = {0};
            for (int64_t d = 0; d < shape.size; d += LANES) total += load(query + d) * load(own_key + d);
            scores[head * room + t] = sum(total) * scale;
        }
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

static void weighted_values(const float *weights, int64_t room, const float *values, const int64_t *pages,
                            int64_t length, Shape shape, float *out) {
    const int64_t group = shape.heads / shape.kv_heads;
    memset(out, 0, shape.heads * shape.size * sizeof *out);
    for (int64_t t = 0; t < length; t++) {
        int64_t slot = pages[t / shape.page_size] * shape.page_size + t % shape.page_size;
        const float *value = values + slot * shape.kv_heads * shape.size;
        for (int64_t head = 0; head < shape.heads; head++) {
            float weight = weights[head * room + t], *sum_of = out + head * shape.size;
            const float *own_value = value + head / group * shape.size;
            for (int64_t d = 0; d < shape.size; d += LANES)
                store(sum_of + d, load(sum_of + d) + weight * load(own_value + d));
        }
    }
}

/* One query a sequence: q and out [B, N, D], caches [pages, page_size, kv_heads, D], page_tables [B, P] int64,
 * seq_lens [B] int64. Scratch: N `room` floats with `room` a multiple of LANES, at least P * page_size. */
void decode_attention(const float *q, const float *keys, const float *values, const int64_t *page_tables,
                      int64_t pages, const int64_t *seq_lens, int64_t batch, int64_t heads, int64_t kv_heads,
                      int64_t size, int64_t page_size, float *scratch, int64_t room, float *out) {
    const Shape shape = {heads, kv_heads, size, page_size};
    for (int64_t b = 0; b < batch; b++, page_tables += pages) {
        scores_of(q + b * heads * size, keys, page_tables, seq_lens[b], shape, scratch, room);
        for (int64_t head = 0; head < heads; head++) softmax(scratch + head * room, seq_lens[b]);
        weighted_values(scratch, room, values, page_tables, seq_lens[b], shape, out + b * heads * size);
    }
}

/* The k largest of softmax(logits [T, E]), the lower expert first where they are equal, NaN before all numbers.
 * Scratch: E + LANES floats. */
void topk_softmax(const float *logits, int64_t rows, int64_t experts, int64_t top_k, int renormalize, float *scratch,
                  int32_t *ids, float *weights) {
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
}
