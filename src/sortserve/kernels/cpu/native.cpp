// What Python calls: kernels/native.py and native_layers.py check the arguments.

#include "layers.h"
#include "product.h"

extern "C" {

// 1: int8 weights, 2: bfloat16 weights too.
int features() {
#ifdef __AVX512BF16__
  return 3;
#else
  return 1;
#endif
}

// out [rows, outputs] = [residual +] x [rows, inputs] W^T + b. `wide`: x, residual and out are float32, else bfloat16.
void linear(const Matrix* matrix, int64_t rows, void* x, void* residual, void* out, int wide, int threads) {
  const Rows from{static_cast<char*>(x), matrix->inputs, wide != 0};
  const Rows beside{static_cast<char*>(residual), matrix->outputs, wide != 0};
  const Rows to{static_cast<char*>(out), matrix->outputs, wide != 0};
  const Lines lines(rows, matrix->inputs, planes_of(*matrix, wide));
  const Tiling tiling(rows, lines.planes);
#pragma omp parallel num_threads(threads)
  {
#pragma omp for schedule(static)
    for (int64_t row = 0; row < rows; ++row) take(lines, from, row, matrix->inputs);
    project(*matrix, lines, tiling, nullptr, residual == nullptr ? nullptr : &beside, to);
  }
}

// out = residual + the gated FFN of x, all [rows, hidden]; `widths` [rows], 0: the row keeps its residual.
void ffn(const Matrix* gate_up, const Matrix* down, int64_t rows, const int32_t* widths, void* x, void* residual,
         void* out, int wide, int threads) {
  const Rows from{static_cast<char*>(x), gate_up->inputs, wide != 0};
  const Rows beside{static_cast<char*>(residual), down->outputs, wide != 0};
  const Rows to{static_cast<char*>(out), down->outputs, wide != 0};
  const Ffn space(*gate_up, rows, wide != 0);
#pragma omp parallel num_threads(threads)
  {
#pragma omp for schedule(static)
    for (int64_t row = 0; row < rows; ++row) take(space.outer, from, row, gate_up->inputs);
    space.run(*gate_up, *down, widths, beside, to);
  }
}

// A step's rows through consecutive layers, in place.
void layers(const Model* model, const Layer* first, const Step* step, int threads) {
  run_layers(*model, first, *step, threads);
}
}
