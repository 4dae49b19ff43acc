// y = x W^T + b for few and many rows on x86 processors with AVX-512, over weights that are packed once.
//
// Weights lie in panels of 32 outputs, each a single stream: [panel][step][32 outputs][one 32-bit word], a word holding
// two bfloat16 or four bytes (int8 + 128) of consecutive inputs. One instruction multiplies the words of 16 outputs with
// a line's word and adds to 16 sums: VDPBF16PS in float32, VPDPBUSD exactly in int32. Up to 12 lines share one pass over
// a panel; with few, that pass over memory is what takes the time.
//
//   bfloat16   y[r, o] = sum_i x[r, i] w[o, i] + b[o]
//   int8       x[r, i] ~ step[r] (256 high + low), bytes in [-128, 127], a third plane for float32 rows (linear_int8.py)
//              y[r, o] = step[r] scale[o] (256 sum_i high v[o, i] + sum_i low v[o, i]) + b[o]
//   gated FFN  y[r] = residual[r] + down(silu(gate x[r]) * up x[r]), each row with its own first width[r] neurons
//
// A sum's order does not depend on the rows beside it, so a row gets the same bits in every batch. Threads are OpenMP's,
// from the library that PyTorch has loaded: one team runs both. Python's side is kernels/native.py.

#pragma once

#include "vectors.h"

namespace {

constexpr int kGroups = 4;  // of 16 outputs in a pair of panels, which is what a thread takes at a time
constexpr int kPair = kLanes * kGroups;
constexpr int kMostLines = 12;  // that are multiplied at a time: 24 sums of 16 outputs in 32 registers
constexpr int kTilesPerItem = 8;

// Filled by native.py: the same fields in the same order.
struct Matrix {
  const __m512i* words;  // [pairs][2 panels][steps][2 groups] x 16 words
  const float* scale;    // [pairs * 64]; null: the weights are bfloat16
  const float* bias;     // [pairs * 64] or null
  int64_t outputs, inputs, pairs, steps;
};

// Rows as the products read them. A line is what one instruction takes part of: a row, or one plane of a row's bytes.
struct Lines {
  std::unique_ptr<uint32_t[]> words;  // [rows * planes][stride]
  std::unique_ptr<int32_t[]> start;   // [rows * planes]: what a sum starts with, minus what 128 too much a weight adds
  std::unique_ptr<float[]> step;      // [rows]
  int64_t stride, planes;

  Lines(int64_t rows, int64_t inputs, int64_t planes)
      : stride(line_stride(inputs, planes)), planes(planes) {
    words.reset(new uint32_t[rows * planes * stride]);
    start.reset(new int32_t[rows * planes]);
    step.reset(new float[rows]);
  }
  bool bytes() const { return planes > 1; }
  uint32_t* line(int64_t row, int64_t plane) const { return words.get() + (row * planes + plane) * stride; }

  // whole vectors, and no multiple of a page: lines a page apart would all want the same places of the first cache
  static int64_t line_stride(int64_t inputs, int64_t planes) {
    const int64_t per_vector = planes > 1 ? 64 : 32;
    return ((inputs + per_vector - 1) / per_vector | 1) * kLanes;
  }
};

// ---- rows to lines

// The first `count` inputs of a row in bytes; zero from there to `end`.
void cut(const Lines& lines, const Rows& x, int64_t row, int64_t count, int64_t end) {
  const int64_t planes = lines.planes;
  __m512 most = _mm512_setzero_ps(), poison = _mm512_setzero_ps();  // not finite as soon as an input is not
  for (int64_t i = 0; i < count; i += kLanes) {
    const __m512 part = x.load(row, i, first(count - i));
    most = _mm512_max_ps(most, _mm512_abs_ps(part));
    poison = _mm512_fmadd_ps(part, _mm512_setzero_ps(), poison);
  }
  const int32_t ones = planes == 3 ? 0x010101 : 0x0101;
  // 2 less than fits: the quotient of the largest value may be rounded up
  const float step = std::max(_mm512_reduce_max_ps(most), 1e-30f) / (127 * ones - 2) + _mm512_reduce_add_ps(poison);
  lines.step[row] = step;
  __m512i sums[3] = {};
  for (int64_t i = 0; i < end; i += kLanes) {
    const __m512 part = i < count ? x.load(row, i, first(count - i)) : _mm512_setzero_ps();
    const __m512i steps = _mm512_add_epi32(_mm512_cvtps_epi32(_mm512_div_ps(part, _mm512_set1_ps(step))),
                                           _mm512_set1_epi32(128 * ones));
    for (int64_t plane = 0; plane < planes; ++plane) {  // the highest first
      const __m512i shifted = _mm512_srl_epi32(steps, _mm_cvtsi32_si128(8 * (planes - 1 - plane)));
      const __m512i byte = _mm512_sub_epi32(_mm512_and_si512(shifted, _mm512_set1_epi32(255)), _mm512_set1_epi32(128));
      sums[plane] = _mm512_add_epi32(sums[plane], byte);
      _mm_storeu_si128(reinterpret_cast<__m128i*>(reinterpret_cast<char*>(lines.line(row, plane)) + i),
                       _mm512_cvtepi32_epi8(byte));
    }
  }
  for (int64_t plane = 0; plane < planes; ++plane)
    lines.start[row * planes + plane] = -128 * _mm512_reduce_add_epi32(sums[plane]);
}

// A row of x as the products read it.
void take(const Lines& lines, const Rows& x, int64_t row, int64_t inputs) {
  const int64_t end = lines.stride * (lines.bytes() ? 4 : 2);
  if (lines.bytes()) return cut(lines, x, row, inputs, end);
  char* line = reinterpret_cast<char*>(lines.line(row, 0));
  std::memcpy(line, x.at(row, 0), inputs * 2);
  std::memset(line + inputs * 2, 0, (end - inputs) * 2);
}

// ---- products

struct Bytes {
  using Sums = __m512i;
  static Sums begin(const int32_t* start, int line) { return _mm512_set1_epi32(start[line]); }
  // GCC 12 keeps more than 16 sums of the intrinsic in memory, which makes 12 lines half as fast
  static Sums add(Sums sums, __m512i weights, __m512i x) {
    asm("vpdpbusd %2, %1, %0" : "+v"(sums) : "v"(weights), "v"(x));
    return sums;
  }
  static __m512 value(Sums sums) { return _mm512_cvtepi32_ps(sums); }
};

#ifdef __AVX512BF16__
struct Bfloat16 {
  using Sums = __m512;
  static Sums begin(const int32_t*, int) { return _mm512_setzero_ps(); }
  static Sums add(Sums sums, __m512i weights, __m512i x) {
    return _mm512_dpbf16_ps(sums, (__m512bh)weights, (__m512bh)x);
  }
  static __m512 value(Sums sums) { return sums; }
};
#endif

using Block = float[kMostLines][kPair];

// block[line][output] for kLines lines, over the first `steps` words of a pair of panels, `next` vectors apart; one by one
// where the registers ask for it.
template <class Kind, int kLines>
void tile(const uint32_t* x, int64_t stride, const int32_t* start, const __m512i* pair, int64_t next, int64_t steps,
          Block& block) {
  constexpr int kAtOnce = kLines > 6 ? 2 : 4;
  for (int from = 0; from < kGroups; from += kAtOnce) {
    typename Kind::Sums sums[kLines][kAtOnce];
    for (int line = 0; line < kLines; ++line)
      for (int group = 0; group < kAtOnce; ++group) sums[line][group] = Kind::begin(start, line);
    const __m512i* weights = pair + from / 2 * next;
    for (int64_t step = 0; step < steps; ++step, weights += 2) {
      __m512i part[kAtOnce];
#pragma GCC unroll 4
      for (int group = 0; group < kAtOnce; ++group) {
        part[group] = _mm512_load_si512(weights + group / 2 * next + group % 2);
      }
#pragma GCC unroll 12
      for (int line = 0; line < kLines; ++line) {
        const __m512i word = _mm512_set1_epi32(x[line * stride + step]);
        for (int group = 0; group < kAtOnce; ++group) sums[line][group] = Kind::add(sums[line][group], part[group], word);
      }
    }
    for (int line = 0; line < kLines; ++line)
      for (int group = 0; group < kAtOnce; ++group)
        _mm512_store_ps(&block[line][(from + group) * kLanes], Kind::value(sums[line][group]));
  }
}

using Tile = void (*)(const uint32_t*, int64_t, const int32_t*, const __m512i*, int64_t, int64_t, Block&);
#define TILES(kind)                                                                                              \
  {nullptr,       tile<kind, 1>, tile<kind, 2>, tile<kind, 3>, tile<kind, 4>,  tile<kind, 5>, tile<kind, 6>, \
   tile<kind, 7>, tile<kind, 8>, tile<kind, 9>, tile<kind, 10>, tile<kind, 11>, tile<kind, 12>}
constexpr Tile kByteTiles[] = TILES(Bytes);
#ifdef __AVX512BF16__
constexpr Tile kBfloat16Tiles[] = TILES(Bfloat16);
#else
constexpr const Tile* kBfloat16Tiles = kByteTiles;  // never called: features() tells
#endif

// How many rows go through a panel together.
struct Tiling {
  int64_t rows, per_tile, tiles;
  Tiling(int64_t rows, int64_t planes) : rows(rows) {
    const int64_t most = kMostLines / planes;
    tiles = (rows + most - 1) / most;
    per_tile = (rows + tiles - 1) / tiles;
    tiles = (rows + per_tile - 1) / per_tile;
  }
};

// The largest width of rows [from, to); `all` where rows have no widths.
int64_t widest(const int32_t* widths, int64_t from, int64_t to, int64_t all) {
  return widths == nullptr ? all : *std::max_element(widths + from, widths + to);
}

// 16 sums of a row as numbers: planes put together, scale and bias in.
__m512 finish(const Matrix& matrix, const Lines& lines, const Block& block, int64_t row, int64_t line, int64_t pair,
              int group) {
  const int64_t column = pair * kPair + group * kLanes;
  __m512 value = _mm512_load_ps(&block[line][group * kLanes]);
  if (lines.bytes()) {
    for (int64_t plane = 1; plane < lines.planes; ++plane)
      value = _mm512_fmadd_ps(value, _mm512_set1_ps(256.0f), _mm512_load_ps(&block[line + plane][group * kLanes]));
    const __m512 scale = _mm512_loadu_ps(matrix.scale + column);
    value = _mm512_mul_ps(value, _mm512_mul_ps(scale, _mm512_set1_ps(lines.step[row])));
  }
  return matrix.bias == nullptr ? value : _mm512_add_ps(value, _mm512_loadu_ps(matrix.bias + column));
}

// Calls done(block, first row, last row, pair) for each tile of rows and each of `pairs` of panels, shared out over the
// threads: only those that some row wants, or the threads that got the others would have nothing to do.
// `inputs`: how many a tile needs of each pair; `wanted`: whether a tile needs the pair at all.
template <class Inputs, class Wanted, class Done>
void multiply(const Matrix& matrix, const Lines& lines, const Tiling& tiling, int64_t pairs, Inputs inputs,
              Wanted wanted, Done done) {
  const Tile* tiles = lines.bytes() ? kByteTiles : kBfloat16Tiles;
  const int64_t per_word = lines.bytes() ? 4 : 2;
  const int64_t spans = (tiling.tiles + kTilesPerItem - 1) / kTilesPerItem;
#pragma omp for schedule(static)
  for (int64_t item = 0; item < pairs * spans; ++item) {
    const int64_t pair = item / spans, from = item % spans * kTilesPerItem;
    for (int64_t number = from; number < std::min(from + kTilesPerItem, tiling.tiles); ++number) {
      const int64_t begin = number * tiling.per_tile, end = std::min(begin + tiling.per_tile, tiling.rows);
      if (!wanted(begin, end, pair)) continue;
      alignas(64) Block block;
      tiles[(end - begin) * lines.planes](lines.line(begin, 0), lines.stride, lines.start.get() + begin * lines.planes,
                                          matrix.words + pair * matrix.steps * kGroups, matrix.steps * 2,
                                          (inputs(begin, end) + per_word - 1) / per_word, block);
      done(block, begin, end, pair);
    }
  }
}

// out = [residual +] x W^T + b. Rows of width 0 keep their residual; tiles of them cost nothing where it is `out` itself.
void project(const Matrix& matrix, const Lines& lines, const Tiling& tiling, const int32_t* widths,
             const Rows* residual, const Rows& out) {
  const auto inputs = [&](int64_t begin, int64_t end) { return widest(widths, begin, end, matrix.inputs); };
  const bool in_place = residual != nullptr && residual->data == out.data;
  const auto wanted = [&](int64_t begin, int64_t end, int64_t) {
    return !in_place || widest(widths, begin, end, matrix.inputs) > 0;
  };
  multiply(matrix, lines, tiling, matrix.pairs, inputs, wanted,
           [&](const Block& block, int64_t begin, int64_t end, int64_t pair) {
    for (int64_t row = begin; row < end; ++row)
      for (int group = 0; group < kGroups; ++group) {
        const int64_t column = pair * kPair + group * kLanes;
        const __mmask16 mask = first(matrix.outputs - column);
        if (mask == 0) break;
        const bool none = widths != nullptr && widths[row] == 0;
        __m512 value = none ? _mm512_setzero_ps()
                            : finish(matrix, lines, block, row, (row - begin) * lines.planes, pair, group);
        if (residual != nullptr) value = _mm512_add_ps(value, residual->load(row, column, mask));
        out.store(row, column, mask, value);
      }
  });
}

// inner = silu(gate x) * up x; zero from a row's width on. A panel holds 16 gates and their 16 ups.
void gate(const Matrix& matrix, const Lines& lines, const Tiling& tiling, const int32_t* widths, const Rows& inner) {
  constexpr int kNeurons = kPair / 2;
  const auto inputs = [&](int64_t, int64_t) { return matrix.inputs; };
  const auto wanted = [&](int64_t begin, int64_t end, int64_t pair) {
    return pair * kNeurons < widest(widths, begin, end, 0);
  };
  const int64_t pairs = (widest(widths, 0, tiling.rows, 0) + kNeurons - 1) / kNeurons;
  multiply(matrix, lines, tiling, pairs, inputs, wanted,
           [&](const Block& block, int64_t begin, int64_t end, int64_t pair) {
    for (int64_t row = begin; row < end; ++row)
      for (int half = 0; half < 2; ++half) {
        const int64_t line = (row - begin) * lines.planes, neuron = pair * kNeurons + half * kLanes;
        const __m512 gated = silu(finish(matrix, lines, block, row, line, pair, 2 * half));
        const __m512 value = _mm512_mul_ps(gated, finish(matrix, lines, block, row, line, pair, 2 * half + 1));
        inner.store(row, neuron, 0xffff, _mm512_maskz_mov_ps(first(widths[row] - neuron), value));
      }
  });
}

int64_t planes_of(const Matrix& matrix, bool wide) { return matrix.scale == nullptr ? 1 : wide ? 3 : 2; }

// A gated FFN of some rows: what it needs beside weights. Its input is taken into `outer` first.
struct Ffn {
  const Tiling tiling;
  const Lines outer, lines;
  const std::unique_ptr<float[]> wide_inner;
  const Rows inner;  // silu(gate x) * up x: cut into bytes from float32, or written as the bfloat16 that `down` reads

  Ffn(const Matrix& gate_up, int64_t rows, bool wide)
      : tiling(rows, planes_of(gate_up, wide)),
        outer(rows, gate_up.inputs, planes_of(gate_up, wide)),
        lines(rows, neurons(gate_up), outer.planes),
        wide_inner(outer.bytes() ? new float[rows * neurons(gate_up)] : nullptr),
        inner(outer.bytes() ? Rows{reinterpret_cast<char*>(wide_inner.get()), neurons(gate_up), true}
                            : Rows{reinterpret_cast<char*>(lines.words.get()), lines.stride * 2, false}) {}

  static int64_t neurons(const Matrix& gate_up) { return gate_up.pairs * kPair / 2; }

  // out = residual + FFN(x), by a whole team; out may be the residual itself
  void run(const Matrix& gate_up, const Matrix& down, const int32_t* widths, const Rows& residual,
           const Rows& out) const {
    gate(gate_up, outer, tiling, widths, inner);
    if (outer.bytes()) {
      const int64_t needed = (widest(widths, 0, tiling.rows, 0) + 63) / 64 * 64;
#pragma omp for schedule(static)
      for (int64_t row = 0; row < tiling.rows; ++row)
        if (widths[row] > 0) cut(lines, inner, row, widths[row], needed);
    }
    project(down, lines, tiling, widths, &residual, out);
  }
};

}  // namespace
