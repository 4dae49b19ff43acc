// Vectors of 16 float32 numbers, and rows in memory that are read and written as such.

#pragma once

#include <immintrin.h>

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <memory>

namespace {

using std::int64_t;

constexpr int kLanes = 16;

__mmask16 first(int64_t count) { return count >= kLanes ? 0xffff : count <= 0 ? 0 : (1u << count) - 1; }

__m512 widen(__m256i bf16) { return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(bf16), 16)); }

// float32 -> bfloat16, to nearest, ties to even; a NaN stays one
__m256i narrow(__m512 x) {
  const __m512i bits = _mm512_castps_si512(x);
  const __m512i odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
  __m512i up = _mm512_add_epi32(bits, _mm512_add_epi32(odd, _mm512_set1_epi32(0x7fff)));
  up = _mm512_mask_mov_epi32(up, _mm512_cmp_ps_mask(x, x, _CMP_UNORD_Q), _mm512_set1_epi32(0x7fc00000));
  return _mm512_cvtepi32_epi16(_mm512_srli_epi32(up, 16));
}

// Rows in memory, bfloat16 or float32, [rows, size].
struct Rows {
  char* data;
  int64_t size;
  bool wide;  // float32

  char* at(int64_t row, int64_t column) const { return data + (row * size + column) * (wide ? 4 : 2); }
  __m512 load(int64_t row, int64_t column, __mmask16 mask) const {
    if (wide) return _mm512_maskz_loadu_ps(mask, at(row, column));
    return widen(_mm256_maskz_loadu_epi16(mask, at(row, column)));
  }
  // 16 words as they lie there, zero from `count` values on
  __m512i words(int64_t row, int64_t column, int64_t count) const {
    if (wide) return _mm512_maskz_loadu_epi32(first(count), at(row, column));
    return _mm512_maskz_loadu_epi16(count >= 2 * kLanes ? ~0u : (1u << count) - 1, at(row, column));
  }
  void store(int64_t row, int64_t column, __mmask16 mask, __m512 x) const {
    if (wide) return _mm512_mask_storeu_ps(at(row, column), mask, x);
    _mm256_mask_storeu_epi16(at(row, column), mask, narrow(x));
  }
};

// 16 vectors of 16 words, columns for rows.
void transpose(__m512i* x) {
  __m512i fours[kLanes];  // fours[4 i + c]: in quarter q column 4 q + c of rows 4 i to 4 i + 3
  for (int i = 0; i < kLanes; i += 4) {
    const __m512i a = _mm512_unpacklo_epi32(x[i], x[i + 1]), b = _mm512_unpackhi_epi32(x[i], x[i + 1]);
    const __m512i c = _mm512_unpacklo_epi32(x[i + 2], x[i + 3]), d = _mm512_unpackhi_epi32(x[i + 2], x[i + 3]);
    fours[i] = _mm512_unpacklo_epi64(a, c), fours[i + 1] = _mm512_unpackhi_epi64(a, c);
    fours[i + 2] = _mm512_unpacklo_epi64(b, d), fours[i + 3] = _mm512_unpackhi_epi64(b, d);
  }
  for (int c = 0; c < 4; ++c) {
    const auto quarters = [](__m512i a, __m512i b, bool odd) {
      return odd ? _mm512_shuffle_i32x4(a, b, 0xdd) : _mm512_shuffle_i32x4(a, b, 0x88);
    };
    for (const bool odd : {false, true}) {
      const __m512i above = quarters(fours[c], fours[4 + c], odd), below = quarters(fours[8 + c], fours[12 + c], odd);
      x[4 * odd + c] = quarters(above, below, false), x[8 + 4 * odd + c] = quarters(above, below, true);
    }
  }
}

// e^x to 2 units in the last place: 2^n e^f with |f| <= ln(2) / 2, e^f by its series.
__m512 exponential(__m512 x) {
  x = _mm512_max_ps(_mm512_set1_ps(-87.0f), _mm512_min_ps(_mm512_set1_ps(88.0f), x));
  const __m512 n = _mm512_roundscale_ps(_mm512_mul_ps(x, _mm512_set1_ps(1.44269504f)), 0);
  __m512 f = _mm512_fnmadd_ps(n, _mm512_set1_ps(0.693359375f), x);
  f = _mm512_fnmadd_ps(n, _mm512_set1_ps(-2.12194440e-4f), f);
  __m512 sum = _mm512_set1_ps(1.0f / 5040);
  for (float term : {1.0f / 720, 1.0f / 120, 1.0f / 24, 1.0f / 6, 0.5f, 1.0f, 1.0f})
    sum = _mm512_fmadd_ps(sum, f, _mm512_set1_ps(term));
  return _mm512_scalef_ps(sum, n);
}

__m512 silu(__m512 x) {
  const __m512 one = _mm512_set1_ps(1.0f);
  return _mm512_div_ps(x, _mm512_add_ps(one, exponential(_mm512_sub_ps(_mm512_setzero_ps(), x))));
}

}  // namespace
