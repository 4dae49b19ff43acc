// Attention of one row over the pages of its sequence, and what comes before it: norm and rotation of heads, K/V written.
//
//   scores[t] = q k[t] / sqrt(size),   out = sum_t softmax(scores)[t] v[t],   t over the positions that the row sees
//
// Sums, softmax and its weights are float32. The query heads that share a K/V head go together: its keys and values are
// made float32 once, 16 tokens at a time. A row is computed by itself, so its bits do not depend on the rows beside it.

#pragma once

#include <cmath>
#include <limits>
#include <vector>

#include "vectors.h"

namespace {

int64_t whole(int64_t count) { return (count + kLanes - 1) / kLanes * kLanes; }

// Where K and V of one layer lie: rows of `tokens`, one a token.
struct Pages {
  Rows tokens;            // [all token slots of the pool, K/V heads * size]
  const int64_t* blocks;  // [rows][most_blocks]: the pool's row, in blocks, of the K of the page's first layer
  int64_t most_blocks, block_tokens, layer, value_after;

  int64_t key(int64_t row, int64_t position) const {
    return (blocks[row * most_blocks + position / block_tokens] + layer) * block_tokens + position % block_tokens;
  }
  int64_t value(int64_t row, int64_t position) const { return key(row, position) + value_after; }
};

// to = x / sqrt(mean(x^2) + eps) * weight over `size` columns of a row; may be in place.
void normalise(const Rows& from, const Rows& to, int64_t row, int64_t column, int64_t size, const float* weight,
               float eps) {
  __m512 squares = _mm512_setzero_ps();
  for (int64_t i = 0; i < size; i += kLanes) {
    const __m512 part = from.load(row, column + i, first(size - i));
    squares = _mm512_fmadd_ps(part, part, squares);
  }
  const __m512 scale = _mm512_set1_ps(1.0f / std::sqrt(_mm512_reduce_add_ps(squares) / size + eps));
  for (int64_t i = 0; i < size; i += kLanes) {
    const __mmask16 mask = first(size - i);
    const __m512 part = _mm512_mul_ps(from.load(row, column + i, mask), scale);
    to.store(row, column + i, mask, _mm512_mul_ps(part, _mm512_maskz_loadu_ps(mask, weight + i)));
  }
}

// A head (x0, y0, x1, y1, ...) times (cos0, sin0, ...) as complex numbers.
void rotate(const Rows& from, int64_t row, int64_t column, const Rows& to, int64_t to_row, int64_t to_column,
            int64_t size, const float* rotation) {
  for (int64_t i = 0; i < size; i += kLanes) {
    const __mmask16 mask = first(size - i);
    const __m512 x = from.load(row, column + i, mask), turn = _mm512_maskz_loadu_ps(mask, rotation + i);
    const __m512 swapped = _mm512_mul_ps(_mm512_permute_ps(x, 0xb1), _mm512_movehdup_ps(turn));
    to.store(to_row, to_column + i, mask, _mm512_fmaddsub_ps(x, _mm512_moveldup_ps(turn), swapped));
  }
}

// The sums of 16 vectors, as a vector.
__m512 sum_each(const __m512* x) {
  __m512 quads[4];
  for (int i = 0; i < 4; ++i) {
    __m512d pairs[2];
    for (int j = 0; j < 2; ++j) {
      const __m512 a = x[4 * i + 2 * j], b = x[4 * i + 2 * j + 1];
      pairs[j] = _mm512_castps_pd(_mm512_add_ps(_mm512_unpacklo_ps(a, b), _mm512_unpackhi_ps(a, b)));
    }
    quads[i] = _mm512_add_ps(_mm512_castpd_ps(_mm512_unpacklo_pd(pairs[0], pairs[1])),
                             _mm512_castpd_ps(_mm512_unpackhi_pd(pairs[0], pairs[1])));
  }
  const auto folded = [](__m512 a, __m512 b) {
    return _mm512_add_ps(_mm512_shuffle_f32x4(a, b, 0x88), _mm512_shuffle_f32x4(a, b, 0xdd));
  };
  return folded(folded(quads[0], quads[1]), folded(quads[2], quads[3]));
}

// One thread's attention of `share` query heads over one K/V head.
class Attention {
 public:
  Attention(int64_t share, int64_t size, int64_t most_tokens)
      : share_(share),
        size_(size),
        stride_(whole(size)),
        most_(whole(most_tokens)),
        query_(share * stride_),
        out_(share * stride_),
        tile_(kLanes * stride_),
        scores_(share * most_),
        sums_(share) {}

  // Query heads at `column` of `queries` over positions [begin, end) of the K/V head at `key_column`, to `out`.
  void run(const Rows& queries, int64_t row, int64_t column, const Pages& pages, int64_t key_column, int64_t begin,
           int64_t end, const Rows& out) {
    const __m512 scale = _mm512_set1_ps(1.0f / std::sqrt(static_cast<float>(size_)));
    for (int64_t head = 0; head < share_; ++head)
      for (int64_t i = 0; i < size_; i += kLanes) {
        const __m512 part = queries.load(row, column + head * size_ + i, first(size_ - i));
        _mm512_storeu_ps(&query_[head * stride_ + i], _mm512_mul_ps(part, scale));
      }
    for (int64_t from = begin; from < end; from += kLanes) score(pages, row, key_column, begin, from, end);
    for (int64_t head = 0; head < share_; ++head) sums_[head] = soften(&scores_[head * most_], end - begin);
    std::fill(out_.begin(), out_.end(), 0.0f);
    for (int64_t from = begin; from < end; from += kLanes) gather(pages, row, key_column, begin, from, end);
    for (int64_t head = 0; head < share_; ++head)
      for (int64_t i = 0; i < size_; i += kLanes) {
        const __m512 part = _mm512_div_ps(_mm512_loadu_ps(&out_[head * stride_ + i]), _mm512_set1_ps(sums_[head]));
        out.store(row, column + head * size_ + i, first(size_ - i), part);
      }
  }

 private:
  // Keys or values of 16 tokens as float32, zero from `end` on.
  template <class Slot>
  void widen_tile(const Rows& tokens, int64_t column, int64_t from, int64_t end, Slot slot) {
    for (int64_t token = 0; token < kLanes; ++token) {
      const int64_t at = from + token < end ? slot(from + token) : 0;
      for (int64_t i = 0; i < size_; i += kLanes) {
        const __mmask16 mask = from + token < end ? first(size_ - i) : 0;
        _mm512_storeu_ps(&tile_[token * stride_ + i], tokens.load(at, column + i, mask));
      }
    }
  }

  void score(const Pages& pages, int64_t row, int64_t column, int64_t begin, int64_t from, int64_t end) {
    widen_tile(pages.tokens, column, from, end, [&](int64_t position) { return pages.key(row, position); });
    for (int64_t head = 0; head < share_; ++head) {
      __m512 sums[kLanes] = {};
      for (int64_t i = 0; i < size_; i += kLanes) {
        const __m512 query = _mm512_loadu_ps(&query_[head * stride_ + i]);
#pragma GCC unroll 16
        for (int token = 0; token < kLanes; ++token)
          sums[token] = _mm512_fmadd_ps(query, _mm512_loadu_ps(&tile_[token * stride_ + i]), sums[token]);
      }
      const __m512 none = _mm512_set1_ps(-std::numeric_limits<float>::infinity());
      _mm512_storeu_ps(&scores_[head * most_ + from - begin],
                       _mm512_mask_mov_ps(none, first(end - from), sum_each(sums)));
    }
  }

  // Scores to weights that have the returned sum.
  static float soften(float* scores, int64_t count) {
    __m512 most = _mm512_loadu_ps(scores), sum = _mm512_setzero_ps();
    for (int64_t i = kLanes; i < count; i += kLanes) most = _mm512_max_ps(most, _mm512_loadu_ps(scores + i));
    const __m512 largest = _mm512_set1_ps(_mm512_reduce_max_ps(most));
    for (int64_t i = 0; i < count; i += kLanes) {
      const __m512 part = exponential(_mm512_sub_ps(_mm512_loadu_ps(scores + i), largest));
      const __m512 weight = _mm512_maskz_mov_ps(first(count - i), part);
      _mm512_storeu_ps(scores + i, weight);
      sum = _mm512_add_ps(sum, weight);
    }
    return _mm512_reduce_add_ps(sum);
  }

  // out += weights * values of 16 tokens
  void gather(const Pages& pages, int64_t row, int64_t column, int64_t begin, int64_t from, int64_t end) {
    widen_tile(pages.tokens, column, from, end, [&](int64_t position) { return pages.value(row, position); });
    for (int64_t head = 0; head < share_; ++head) {
      const float* weights = &scores_[head * most_ + from - begin];
      for (int64_t i = 0; i < size_; i += kLanes) {
        __m512 sum = _mm512_loadu_ps(&out_[head * stride_ + i]);
#pragma GCC unroll 16
        for (int token = 0; token < kLanes; ++token)
          sum = _mm512_fmadd_ps(_mm512_set1_ps(weights[token]), _mm512_loadu_ps(&tile_[token * stride_ + i]), sum);
        _mm512_storeu_ps(&out_[head * stride_ + i], sum);
      }
    }
  }

  const int64_t share_, size_, stride_, most_;
  std::vector<float> query_, out_, tile_, scores_, sums_;
};

}  // namespace
