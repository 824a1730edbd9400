// z_i += x_i W[lane_i] for every token i, each matrix read once, as a stream.
//
// On a CPU a product of one row waits for memory. What follows is fetched ahead: more of the matrix, then the next one that
// will be read. Rows of lane 0 of a pair are left as they are.

#include <ATen/Parallel.h>
#include <torch/library.h>

namespace {

constexpr int64_t LINE = 16;           // floats of a cache line
constexpr int64_t AHEAD = 128 * LINE;  // how far ahead is fetched, into the second cache

inline void fetch(const float* from, int64_t count) {
  for (int64_t k = 0; k < count; k += LINE) __builtin_prefetch(from + k, 0, 2);
}

// z (R) += x (in) W (in, R), R few; `next` is read behind W.
template <int64_t R>
void narrow(const float* x, const float* W, float* z, int64_t in, const float* next) {
  float sums[4][R] = {};
  int64_t k = 0;
  for (; k + 4 <= in; k += 4) {
    const int64_t left = (in - k) * R - AHEAD;
    if (left > 0) fetch(W + k * R + AHEAD, 4 * R);
    else if (next) fetch(next - left, 4 * R);
    for (int64_t u = 0; u < 4; ++u)
      for (int64_t r = 0; r < R; ++r) sums[u][r] += x[k + u] * W[(k + u) * R + r];
  }
  for (; k < in; ++k)
    for (int64_t r = 0; r < R; ++r) sums[0][r] += x[k] * W[k * R + r];
  for (int64_t r = 0; r < R; ++r) z[r] += sums[0][r] + sums[1][r] + sums[2][r] + sums[3][r];
}

// z (out) += x (in) W (in, out), input by input.
void wide(const float* x, const float* W, float* z, int64_t in, int64_t out, const float* next) {
  for (int64_t k = 0; k < in; ++k) {
    const float* row = W + k * out;
    const int64_t left = (in - k) * out - AHEAD;
    for (int64_t begin = 0; begin < out; begin += 4 * LINE) {
      const int64_t end = std::min(begin + 4 * LINE, out);
      if (begin < left) fetch(row + begin + AHEAD, 4 * LINE);
      else if (next) fetch(next + begin - left, 4 * LINE);
      for (int64_t o = begin; o < end; ++o) z[o] += x[k] * row[o];
    }
  }
}

void multiply(const float* x, const float* W, float* z, int64_t in, int64_t out, const float* next) {
  switch (out) {
    case 4: return narrow<4>(x, W, z, in, next);
    case 8: return narrow<8>(x, W, z, in, next);
    case 16: return narrow<16>(x, W, z, in, next);
    case 32: return narrow<32>(x, W, z, in, next);
    case 64: return narrow<64>(x, W, z, in, next);
    default: return wide(x, W, z, in, out, next);
  }
}

// One stack of matrices (lanes, in, out), and which of them each token reads.
struct Stack {
  const float* data;
  int64_t in, out;
  explicit Stack(const at::Tensor& W) : data(W.const_data_ptr<float>()), in(W.size(1)), out(W.size(2)) {}
  const float* at(int64_t lane) const { return data + lane * in * out; }
};

// x (rows, tokens, in), W (lanes, in, out), lanes (rows) -> z (rows, tokens, out), to which the products are added.
void add_rows(at::Tensor& z, const at::Tensor& x, const at::Tensor& W, const at::Tensor& lanes) {
  const Stack stack(W);
  const int64_t tokens = x.size(1);
  const float* from = x.const_data_ptr<float>();
  float* to = z.mutable_data_ptr<float>();
  const int64_t* lane = lanes.const_data_ptr<int64_t>();
  at::parallel_for(0, x.size(0) * tokens, 1, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      const float* next = i + 1 < end ? stack.at(lane[(i + 1) / tokens]) : nullptr;
      multiply(from + i * stack.in, stack.at(lane[i / tokens]), to + i * stack.out, stack.in, stack.out, next);
    }
  });
}

// The same with (x A) B. A (lanes, in, r), B (lanes, r, out).
void add_pairs(at::Tensor& z, const at::Tensor& x, const at::Tensor& A, const at::Tensor& B, const at::Tensor& lanes) {
  const Stack down(A), up(B);
  const int64_t tokens = x.size(1);
  const float* from = x.const_data_ptr<float>();
  float* to = z.mutable_data_ptr<float>();
  const int64_t* lane = lanes.const_data_ptr<int64_t>();
  at::parallel_for(0, x.size(0) * tokens, 1, [&](int64_t begin, int64_t end) {
    std::vector<float> h(down.out);
    for (int64_t i = begin; i < end; ++i) {
      const int64_t own = lane[i / tokens];
      if (own == 0) continue;
      const float* next = i + 1 < end ? down.at(lane[(i + 1) / tokens]) : nullptr;
      std::fill(h.begin(), h.end(), 0.0f);
      multiply(from + i * down.in, down.at(own), h.data(), down.in, down.out, up.at(own));
      multiply(h.data(), up.at(own), to + i * up.out, up.in, up.out, next);
    }
  });
}

}  // namespace

TORCH_LIBRARY_FRAGMENT(deltatune, library) {
  library.def("add_rows_(Tensor(a!) z, Tensor x, Tensor W, Tensor lanes) -> ()");
  library.def("add_pairs_(Tensor(a!) z, Tensor x, Tensor A, Tensor B, Tensor lanes) -> ()");
}

TORCH_LIBRARY_IMPL(deltatune, CPU, library) {
  library.impl("add_rows_", &add_rows);
  library.impl("add_pairs_", &add_pairs);
}
