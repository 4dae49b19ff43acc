// Decoder layers for the rows of a step: one parallel region from the first layer to the last.
//
//   q, k, v = W_qkv norm(x) + b;   q, k = rotate([norm] q), rotate([norm] k);   k and v go to the row's page
//   x += W_o attention(q, pages);  x += ffn(norm(x))
//
// A call from Python for each part costs more than most parts take: what it touches has left the caches since the last
// layer. Numbers are rounded to the rows' own type where the parts would hand them on, so that both ways agree.
// A row may skip its attention (its K/V are written all the same) or run any part of the FFN in each layer. A sequence may
// have several rows, beside each other: all K/V of a layer are written before any row attends, and each sees the positions
// up to its own. One whose K/V are there already leaves them as they are.

#pragma once

#include "attention.h"
#include "product.h"

namespace {

// All structs are filled by native_layers.py: the same fields in the same order.
struct Layer {
  const Matrix *qkv, *output, *gate_up, *down;
  const float *input_norm, *post_norm, *query_norm, *key_norm;  // the last two may be null
};

struct Model {
  int64_t heads, key_heads, size;  // of a head
  int64_t block_tokens, page_layers, window;
  const float* rotations;  // [positions][size]: cosine and sine of each pair
  float eps;
  int wide;  // rows and K/V are float32, else bfloat16
};

struct Step {
  int64_t rows, layers, most_blocks;
  const int64_t *positions, *sequences;  // [rows]
  const bool* writes;                    // [rows]; null: all write their K/V
  const int64_t* const* blocks;          // by page of the segment: [sequences][most_blocks]
  const int32_t* widths;                 // [layers][rows]
  const int32_t* attended;               // [layers][rows]: heads * size, or 0 for a row that does not attend
  void *hidden, *pool;           // in and out [rows][hidden]; K/V
};

// A step's rows on their way through the layers.
class Passage {
 public:
  Passage(const Model& model, const Layer& layer, const Step& step)
      : model_(model),
        step_(step),
        qkv_size_((model.heads + 2 * model.key_heads) * model.size),
        kv_size_(model.key_heads * model.size),
        ffn_(*layer.gate_up, step.rows, model.wide != 0),
        context_(step.rows, layer.output->inputs, ffn_.outer.planes),
        hidden_{static_cast<char*>(step.hidden), layer.qkv->inputs, model.wide != 0},
        normed_(make(layer.qkv->inputs)),
        heads_(make(qkv_size_)),
        attended_(make(layer.output->inputs)),
        pieces_(pieces_of(step, Attention::most_rows(model.heads / model.key_heads))) {}

  // By a whole team.
  void run(const Layer& layer, int64_t number, Attention& attention) const {
    const int32_t* attended = step_.attended + number * step_.rows;
    const Pages pages = pages_of(number);
    take_normed(layer.input_norm, hidden_.size);
    project(*layer.qkv, ffn_.outer, ffn_.tiling, nullptr, nullptr, heads_);
#pragma omp for schedule(static)
    for (int64_t row = 0; row < step_.rows; ++row) place(layer, pages, row);
    const int64_t share = model_.heads / model_.key_heads;
#pragma omp for schedule(dynamic)
    for (int64_t item = 0; item < static_cast<int64_t>(pieces_.size()) * model_.key_heads; ++item) {
      const int64_t head = item % model_.key_heads;
      attention.run(pieces_[item / model_.key_heads], attended, step_.positions, heads_, head * share * model_.size,
                    pages, head * model_.size, attended_);
    }
#pragma omp for schedule(static)
    for (int64_t row = 0; row < step_.rows; ++row)
      if (attended[row] > 0) take(context_, attended_, row, attended_.size);
    project(*layer.output, context_, ffn_.tiling, attended, &hidden_, hidden_);
    take_normed(layer.post_norm, hidden_.size);
    ffn_.run(*layer.gate_up, *layer.down, step_.widths + number * step_.rows, hidden_, hidden_);
  }

 private:
  Rows make(int64_t size) {
    owned_.emplace_back(new char[step_.rows * size * (model_.wide ? 4 : 2)]);
    return Rows{owned_.back().get(), size, model_.wide != 0};
  }

  // Rows in pieces of at most `most`, those that see the longest contexts first: the last ones to end are short then.
  static std::vector<Piece> pieces_of(const Step& step, int64_t most) {
    std::vector<Piece> pieces;
    for (int64_t row = 0; row < step.rows; ++row) {
      const bool goes_on = row > 0 && step.sequences[row] == step.sequences[row - 1] && pieces.back().rows < most;
      if (goes_on) ++pieces.back().rows;
      else pieces.push_back({row, 1, step.sequences[row]});
    }
    const auto last = [&](const Piece& piece) { return step.positions[piece.row + piece.rows - 1]; };
    std::stable_sort(pieces.begin(), pieces.end(), [&](const Piece& a, const Piece& b) { return last(a) > last(b); });
    return pieces;
  }

  Pages pages_of(int64_t number) const {
    const int64_t page = number / model_.page_layers;
    return Pages{Rows{static_cast<char*>(step_.pool), kv_size_, model_.wide != 0},
                 step_.blocks[page],
                 step_.most_blocks,
                 model_.block_tokens,
                 number % model_.page_layers,
                 model_.page_layers * model_.block_tokens};
  }

  void take_normed(const float* weight, int64_t size) const {
#pragma omp for schedule(static)
    for (int64_t row = 0; row < step_.rows; ++row) {
      normalise(hidden_, normed_, row, 0, size, weight, model_.eps);
      take(ffn_.outer, normed_, row, size);
    }
  }

  // Norm and rotation of a row's heads; its K and V go to their page.
  void place(const Layer& layer, const Pages& pages, int64_t row) const {
    const int64_t size = model_.size, position = step_.positions[row], values = qkv_size_ - kv_size_;
    const bool writes = step_.writes == nullptr || step_.writes[row];
    const int64_t key = pages.key(step_.sequences[row], position);
    const float* rotation = model_.rotations + position * size;
    for (int64_t head = 0; head < model_.heads + model_.key_heads; ++head) {
      const bool is_key = head >= model_.heads;
      if (is_key && !writes) return;
      const float* weight = is_key ? layer.key_norm : layer.query_norm;
      if (weight != nullptr) normalise(heads_, heads_, row, head * size, size, weight, model_.eps);
      rotate(heads_, row, head * size, is_key ? pages.tokens : heads_, is_key ? key : row,
             (is_key ? head - model_.heads : head) * size, size, rotation);
    }
    std::memcpy(pages.tokens.at(key + pages.value_after, 0), heads_.at(row, values), kv_size_ * (model_.wide ? 4 : 2));
  }

  const Model& model_;
  const Step& step_;
  const int64_t qkv_size_, kv_size_;
  const Ffn ffn_;
  const Lines context_;
  std::vector<std::unique_ptr<char[]>> owned_;
  const Rows hidden_, normed_, heads_, attended_;
  const std::vector<Piece> pieces_;
};

void run_layers(const Model& model, const Layer* first, const Step& step, int threads) {
  const Passage passage(model, *first, step);
#pragma omp parallel num_threads(threads)
  {
    Attention attention(model.heads / model.key_heads, model.size, model.window);
    for (int64_t number = 0; number < step.layers; ++number) passage.run(first[number], number, attention);
  }
}

}  // namespace
