/* Vectors of 16 lanes: one NVFP4 block, or 16 outputs of a layer. GCC lowers them to what the machine has; only the
 * two steps of the integer product that it does not find by itself are written out for x86.
 */
#ifndef NIBBLE_VECTOR_H
#define NIBBLE_VECTOR_H

#include <math.h>
#include <stdint.h>
#include <string.h>

#ifdef __x86_64__
#include <immintrin.h>
#endif

#define LANES 16
#define INLINE static inline __attribute__((always_inline))

typedef float floats __attribute__((vector_size(4 * LANES)));
typedef int32_t ints __attribute__((vector_size(4 * LANES)));
typedef uint32_t words __attribute__((vector_size(4 * LANES)));
typedef uint16_t halves __attribute__((vector_size(2 * LANES)));
typedef uint8_t bytes __attribute__((vector_size(4 * LANES)));      /* 64 of them */
typedef uint8_t lane_bytes __attribute__((vector_size(LANES)));     /* one a lane */
typedef float unaligned_floats __attribute__((vector_size(4 * LANES), aligned(4)));
typedef bytes unaligned_bytes __attribute__((aligned(1)));

INLINE floats load(const float *x) { return *(const unaligned_floats *)x; }
INLINE void store(float *x, floats value) { *(unaligned_floats *)x = value; }
INLINE floats all(float x) { return x - (floats){0}; }

/* The first `count` values, and zeros. */
INLINE floats load_some(const float *x, int64_t count) {
    float padded[LANES] = {0};
    memcpy(padded, x, count * sizeof *x);
    return load(padded);
}

INLINE void store_some(float *x, floats value, int64_t count) {
    float padded[LANES];
    store(padded, value);
    memcpy(x, padded, count * sizeof *x);
}

/* 16 bf16 numbers. GCC 12 would widen them in two halves. */
INLINE floats load_bf16(const void *x) {
    halves narrow;
    memcpy(&narrow, x, sizeof narrow);
#if defined(__AVX512F__)
    return (floats)_mm512_slli_epi32(_mm512_cvtepu16_epi32((__m256i)narrow), 16);
#else
    return (floats)(__builtin_convertvector(narrow, words) << 16);
#endif
}

/* 16 numbers of the KV cache, whose elements have `itemsize` bytes: fp32, or 2 for bf16. */
INLINE floats load_cached(const char *x, const int itemsize) {
    return itemsize == 2 ? load_bf16(x) : load((const float *)x);
}

/* Rounded to nearest even; NaN stays NaN. */
INLINE void store_cached(char *x, floats value, const int itemsize) {
    if (itemsize == 4) {
        store((float *)x, value);
        return;
    }
    words bits = (words)value, rounded = (bits + 0x7FFF + (bits >> 16 & 1)) >> 16;
    ints is_nan = value != value;
    halves narrow = __builtin_convertvector((rounded & (words)~is_nan) | (0x7FC0 & (words)is_nan), halves);
    memcpy(x, &narrow, sizeof narrow);
}

INLINE floats choose(ints condition, floats yes, floats no) {
    return (floats)(((ints)yes & condition) | ((ints)no & ~condition));
}

INLINE floats magnitude(floats x) { return (floats)((ints)x & 0x7FFFFFFF); }
INLINE floats larger(floats a, floats b) { return choose(a > b, a, b); }

#define HALVE(v, n) __builtin_shuffle(v, (ints){n, n + 1, n + 2, n + 3, n + 4, n + 5, n + 6, n + 7})

INLINE float sum(floats v) {
    v += HALVE(v, 8);
    v += HALVE(v, 4);
    v += HALVE(v, 2);
    return v[0] + v[1];
}

INLINE float largest_of(floats v) {
    v = larger(v, HALVE(v, 8));
    v = larger(v, HALVE(v, 4));
    v = larger(v, HALVE(v, 2));
    return v[0] > v[1] ? v[0] : v[1];
}

/* Lane i is the sum of v[i], all 16 reduced together. */
INLINE floats sums_of(floats *v) {
#define FOLD(count, first, second) \
    for (int i = 0; i < count; i++) \
        v[i] = __builtin_shuffle(v[2 * i], v[2 * i + 1], (ints)first) + \
               __builtin_shuffle(v[2 * i], v[2 * i + 1], (ints)second);
#define LIST(...) {__VA_ARGS__}
    FOLD(8, LIST(0, 1, 2, 3, 4, 5, 6, 7, 16, 17, 18, 19, 20, 21, 22, 23),
         LIST(8, 9, 10, 11, 12, 13, 14, 15, 24, 25, 26, 27, 28, 29, 30, 31))
    FOLD(4, LIST(0, 1, 2, 3, 8, 9, 10, 11, 16, 17, 18, 19, 24, 25, 26, 27),
         LIST(4, 5, 6, 7, 12, 13, 14, 15, 20, 21, 22, 23, 28, 29, 30, 31))
    FOLD(2, LIST(0, 1, 4, 5, 8, 9, 12, 13, 16, 17, 20, 21, 24, 25, 28, 29),
         LIST(2, 3, 6, 7, 10, 11, 14, 15, 18, 19, 22, 23, 26, 27, 30, 31))
    FOLD(1, LIST(0, 2, 4, 6, 8, 10, 12, 14, 16, 18, 20, 22, 24, 26, 28, 30),
         LIST(1, 3, 5, 7, 9, 11, 13, 15, 17, 19, 21, 23, 25, 27, 29, 31))
#undef FOLD
#undef LIST
    return v[0];
}

/* Whether any lane of a comparison's result is true. */
INLINE int any(ints condition) {
    uint64_t pieces[sizeof condition / sizeof(uint64_t)], found = 0;
    memcpy(pieces, &condition, sizeof condition);
    for (int i = 0; i < (int)(sizeof condition / sizeof(uint64_t)); i++) found |= pieces[i];
    return found != 0;
}

/* Nearest integer, ties to even, of values below 2^22 in magnitude. */
INLINE floats round_to_integer(floats x) {
    const float shift = 0x1.8p23f;
    return (x + shift) - shift;
}

/* e^x to about two units in the last place (Cephes' polynomial); 0 far below, and NaN stays. */
INLINE floats exp_of(floats x) {
    floats low = all(-87.3f), high = all(88.3f);
    floats clamped = choose(x < low, low, x);
    clamped = choose(clamped > high, high, clamped);
    floats n = round_to_integer(clamped * 1.44269504f);
    floats r = clamped - n * 0.693359375f + n * 2.12194440e-4f;
    floats p = r * 1.9875691500e-4f + 1.3981999507e-3f;
    p = p * r + 8.3334519073e-3f;
    p = p * r + 4.1665795894e-2f;
    p = p * r + 1.6666665459e-1f;
    p = p * r + 5.0000001201e-1f;
    p = p * r * r + r + 1;
    ints power = (__builtin_convertvector(n, ints) + 127) << 23;
    return choose(x < low, (floats){0}, p * (floats)power);
}

/* Lane l gains the sum of four products: signed byte i of `x` and byte 4 l + i of `w`. */
INLINE ints dot4(ints total, const int8_t *x, bytes w) {
    int32_t four;
    memcpy(&four, x, 4);
#if defined(__AVX512VNNI__)
    return (ints)_mm512_dpbusd_epi32((__m512i)total, (__m512i)w, _mm512_set1_epi32(four));
#elif defined(__AVX2__)
    __m256i parts[2], sums[2], fours = _mm256_set1_epi32(four);
    memcpy(parts, &w, sizeof w);
    memcpy(sums, &total, sizeof total);
    for (int half = 0; half < 2; half++) {
        __m256i pairs = _mm256_maddubs_epi16(parts[half], fours); /* at most 2 * 24 * 12 */
        sums[half] = _mm256_add_epi32(sums[half], _mm256_madd_epi16(pairs, _mm256_set1_epi16(1)));
    }
    memcpy(&total, sums, sizeof total);
    return total;
#else
    for (int lane = 0; lane < LANES; lane++)
        for (int i = 0; i < 4; i++) total[lane] += (int32_t)x[i] * w[4 * lane + i];
    return total;
#endif
}

/* table[index] for 64 indices below 16; the table four times over. */
INLINE bytes look_up(bytes table, bytes index) {
#if defined(__AVX512BW__)
    return (bytes)_mm512_shuffle_epi8((__m512i)table, (__m512i)index);
#elif defined(__AVX2__)
    __m256i tables[2], parts[2];
    memcpy(tables, &table, sizeof table);
    memcpy(parts, &index, sizeof index);
    for (int half = 0; half < 2; half++) parts[half] = _mm256_shuffle_epi8(tables[half], parts[half]);
    memcpy(&index, parts, sizeof index);
    return index;
#else
    for (int i = 0; i < (int)sizeof index; i++) index[i] = table[index[i]];
    return index;
#endif
}

#endif
