// Attention over the pages of a sequence, and what comes before it: norm and rotation of heads, K/V written.
//
//   scores[t] = q k[t] / sqrt(size),   out = sum_t softmax(scores)[t] v[t],   t over the positions that the row sees
//
// Sums, softmax and its weights are float32. What shares a K/V head goes together: the query heads on it, of a few rows of
// the sequence. Its keys and values are made float32 once for them all, 16 tokens at a time, which is half of the work for
// a few heads and a tenth for thirty. The softmax is kept up by blocks of tokens (Milakov & Gimelshein, arXiv 1805.02867),
// so scores stay in the first caches however long the context.
//
// Blocks and tiles begin at multiples of their size, whatever a row sees of them, and what it does not see adds nothing to
// its sums: a row's bits depend neither on the rows beside it nor on the chunk that it came in.

#pragma once

#include <cmath>
#include <limits>
#include <vector>

#include "vectors.h"

namespace {

constexpr int64_t kBlock = 128;      // tokens that are scored before their values are added up
constexpr int64_t kMostHeads = 32;   // query heads, of one row or several, that go together if one row has no more
constexpr int kTogether = 8;         // of them that are multiplied at a time

// Where K and V of one layer lie: rows of `tokens`, one a token.
struct Pages {
  Rows tokens;            // [all token slots of the pool, K/V heads * size]
  const int64_t* blocks;  // [sequences][most_blocks]: the pool's row, in blocks, of the K of the page's first layer
  int64_t most_blocks, block_tokens, layer, value_after;

  int64_t slot(int64_t sequence, int64_t block, int64_t place) const {
    return (blocks[sequence * most_blocks + block] + layer) * block_tokens + place;
  }
  int64_t key(int64_t sequence, int64_t position) const {
    return slot(sequence, position / block_tokens, position % block_tokens);
  }
  // slots[i]: the key of token from + i, up to `end`
  void keys(int64_t sequence, int64_t from, int64_t end, int64_t* slots) const {
    int64_t block = from / block_tokens, place = from % block_tokens;
    for (; from < end; ++from, ++slots) {
      *slots = slot(sequence, block, place);
      if (++place == block_tokens) place = 0, ++block;
    }
  }
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

// to[line][16] = [to +] sum_i a[line][i] b[i][16]
template <int kLines, bool kAdds>
void combine(const float* a, int64_t a_stride, const float* b, int64_t b_stride, int64_t count, float* to,
             int64_t to_stride) {
  __m512 sums[kLines];
  for (int line = 0; line < kLines; ++line)
    sums[line] = kAdds ? _mm512_loadu_ps(to + line * to_stride) : _mm512_setzero_ps();
  for (int64_t i = 0; i < count; ++i) {
    const __m512 part = _mm512_loadu_ps(b + i * b_stride);
#pragma GCC unroll 8
    for (int line = 0; line < kLines; ++line)
      sums[line] = _mm512_fmadd_ps(_mm512_set1_ps(a[line * a_stride + i]), part, sums[line]);
  }
  for (int line = 0; line < kLines; ++line) _mm512_storeu_ps(to + line * to_stride, sums[line]);
}

using Combine = void (*)(const float*, int64_t, const float*, int64_t, int64_t, float*, int64_t);
#define COMBINE(adds)                                                                                     \
  {nullptr, combine<1, adds>, combine<2, adds>, combine<3, adds>, combine<4, adds>, combine<5, adds>, \
   combine<6, adds>, combine<7, adds>, combine<8, adds>}
constexpr Combine kSet[kTogether + 1] = COMBINE(false), kAdd[kTogether + 1] = COMBINE(true);

// Some rows of one sequence, beside each other, whose query heads go together.
struct Piece {
  int64_t row, rows, sequence;
};

// One thread's attention of a piece's query heads over one K/V head.
class Attention {
 public:
  // `share`: query heads on a K/V head; `window`: positions that a row sees, 0: all up to its own
  Attention(int64_t share, int64_t size, int64_t window)
      : share_(share),
        size_(size),
        window_(window),
        stride_((size + 2 * kLanes - 1) / (2 * kLanes) * 2 * kLanes),
        query_(most_rows(share) * share * stride_),
        out_(query_.size()),
        keys_(stride_ * kLanes),
        values_(kLanes * stride_),
        scores_(most_rows(share) * share * kBlock),
        most_(most_rows(share) * share),
        sums_(most_.size()) {}

  static int64_t most_rows(int64_t share) { return std::max<int64_t>(1, kMostHeads / share); }

  // Of the rows with attended[row] > 0, query heads at `column` over the K/V head at `key_column`, to `out`.
  void run(const Piece& piece, const int32_t* attended, const int64_t* positions, const Rows& queries, int64_t column,
           const Pages& pages, int64_t key_column, const Rows& out) {
    seen_.clear();
    for (int64_t row = piece.row; row < piece.row + piece.rows; ++row)
      if (attended[row] > 0) take_query(queries, row, column, positions[row] + 1);
    if (seen_.empty()) return;
    std::fill(out_.begin(), out_.end(), 0.0f);
    std::fill(sums_.begin(), sums_.end(), 0.0f);
    std::fill(most_.begin(), most_.end(), -std::numeric_limits<float>::infinity());
    int64_t begin = seen_[0].begin, end = seen_[0].end;
    for (const Seen& seen : seen_) begin = std::min(begin, seen.begin), end = std::max(end, seen.end);
    for (int64_t from = begin / kBlock * kBlock; from < end; from += kBlock)
      add_block(pages, piece.sequence, key_column, std::max(from, begin / kLanes * kLanes), from,
                std::min(from + kBlock, end));
    for (int64_t head = 0; head < heads(); ++head)
      for (int64_t i = 0; i < size_; i += kLanes) {
        const __m512 part = _mm512_div_ps(_mm512_loadu_ps(&out_[head * stride_ + i]), _mm512_set1_ps(sums_[head]));
        out.store(seen_[head / share_].row, column + head % share_ * size_ + i, first(size_ - i), part);
      }
  }

 private:
  struct Seen {
    int64_t row, begin, end;  // sees positions [begin, end)
  };

  int64_t heads() const { return seen_.size() * share_; }

  void take_query(const Rows& queries, int64_t row, int64_t column, int64_t end) {
    const __m512 scale = _mm512_set1_ps(1.0f / std::sqrt(static_cast<float>(size_)));
    float* query = &query_[heads() * stride_];
    for (int64_t head = 0; head < share_; ++head, query += stride_)
      for (int64_t i = 0; i < size_; i += kLanes) {
        const __m512 part = queries.load(row, column + head * size_ + i, first(size_ - i));
        _mm512_storeu_ps(query + i, _mm512_mul_ps(part, scale));
      }
    seen_.push_back({row, window_ > 0 ? std::max<int64_t>(0, end - window_) : 0, end});
  }

  // Tokens [begin, end) of the block that starts at `from`; `begin` is the start of a tile.
  void add_block(const Pages& pages, int64_t sequence, int64_t column, int64_t begin, int64_t from, int64_t end) {
    int64_t slots[kBlock];
    pages.keys(sequence, begin, end, slots);
    for (int64_t at = begin; at < end; at += kLanes) {
      take_keys(pages.tokens, column, slots + (at - begin), end - at);
      each(kSet, query_.data(), stride_, keys_.data(), kLanes, size_, &scores_[at - from], kBlock);
    }
    for (int64_t head = 0; head < heads(); ++head) soften(head, begin, from, end);
    for (int64_t at = begin; at < end; at += kLanes) {
      take_values(pages, column, slots + (at - begin), end - at);
      for (int64_t i = 0; i < size_; i += kLanes)
        each(kAdd, &scores_[at - from], kBlock, &values_[i], stride_, kLanes, &out_[i], stride_);
    }
  }

  // All heads through `kind`.
  void each(const Combine* kind, const float* a, int64_t a_stride, const float* b, int64_t b_stride, int64_t count,
            float* to, int64_t to_stride) const {
    for (int64_t head = 0; head < heads(); head += kTogether)
      kind[std::min<int64_t>(kTogether, heads() - head)](a + head * a_stride, a_stride, b, b_stride, count,
                                                         to + head * to_stride, to_stride);
  }

  // keys_[i][token] of `count` tokens as float32, zero for the rest of 16.
  void take_keys(const Rows& tokens, int64_t column, const int64_t* slots, int64_t count) {
    const int64_t per_word = tokens.wide ? 1 : 2;
    for (int64_t i = 0; i < size_; i += kLanes * per_word) {
      __m512i words[kLanes];
      for (int64_t token = 0; token < kLanes; ++token)
        words[token] = token < count ? tokens.words(slots[token], column + i, size_ - i) : _mm512_setzero_si512();
      transpose(words);
      float* to = &keys_[i * kLanes];
      for (const __m512i word : words) {
        if (!tokens.wide) {
          _mm512_storeu_ps(to, _mm512_castsi512_ps(_mm512_slli_epi32(word, 16)));
          to += kLanes;
        }
        const __m512i high = tokens.wide ? word : _mm512_and_si512(word, _mm512_set1_epi32(0xffff0000));
        _mm512_storeu_ps(to, _mm512_castsi512_ps(high));
        to += kLanes;
      }
    }
  }

  // values_[token][i] of `count` tokens as float32, zero for the rest of 16.
  void take_values(const Pages& pages, int64_t column, const int64_t* slots, int64_t count) {
    for (int64_t token = 0; token < kLanes; ++token)
      for (int64_t i = 0; i < size_; i += kLanes) {
        const __m512 part = token < count
                                ? pages.tokens.load(slots[token] + pages.value_after, column + i, first(size_ - i))
                                : _mm512_setzero_ps();
        _mm512_storeu_ps(&values_[token * stride_ + i], part);
      }
  }

  // A head's scores of tokens [begin, end) to weights, zero where its row does not see; its sums so far are scaled to the
  // largest score that there is now.
  void soften(int64_t head, int64_t begin, int64_t from, int64_t end) {
    const Seen& seen = seen_[head / share_];
    float* scores = &scores_[head * kBlock] - from;
    const auto sees = [&](int64_t at) { return first(seen.end - at) & ~first(seen.begin - at); };
    __m512 most = _mm512_set1_ps(most_[head]), sum = _mm512_setzero_ps();
    for (int64_t at = begin; at < end; at += kLanes)
      most = _mm512_mask_max_ps(most, sees(at), most, _mm512_loadu_ps(scores + at));
    const float largest = _mm512_reduce_max_ps(most);
    for (int64_t at = begin; at < end; at += kLanes) {
      const __m512 part = exponential(_mm512_sub_ps(_mm512_loadu_ps(scores + at), _mm512_set1_ps(largest)));
      const __m512 weight = _mm512_maskz_mov_ps(sees(at), part);
      _mm512_storeu_ps(scores + at, weight);
      sum = _mm512_add_ps(sum, weight);
    }
    if (largest != most_[head]) {
      const __m512 scale = exponential(_mm512_set1_ps(most_[head] - largest));
      sums_[head] *= _mm512_cvtss_f32(scale);
      for (float* out = &out_[head * stride_]; out < &out_[head * stride_] + size_; out += kLanes)
        _mm512_storeu_ps(out, _mm512_mul_ps(_mm512_loadu_ps(out), scale));
      most_[head] = largest;
    }
    sums_[head] += _mm512_reduce_add_ps(sum);
  }

  const int64_t share_, size_, window_, stride_;
  std::vector<Seen> seen_;                     // of the piece's rows that attend
  std::vector<float> query_, out_;             // [heads][stride]
  std::vector<float> keys_, values_, scores_;  // [stride][16], [16][stride], [heads][kBlock]
  std::vector<float> most_, sums_;             // [heads]: the largest score and the sum of weights so far
};

}  // namespace
