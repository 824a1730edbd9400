// Linear maps of one x with low-rank changes, forward and backward; ``injection/fused.py`` says which formulas.
//
//     y = x (W + (A B)^T)^T + b                          folded, else y = x W^T + b, y += (x A) B
//     h = x A,  u = g B^T,  dL/dB = h^T g,  dL/dA = (u^T x)^T,  dL/dx += g W,  dL/dx += u A^T
//
// x (tokens, in), g (tokens, out), W (out, in), A (in, r), B (r, out), h and u (tokens, r), r one of 4, 8 and 16. The large products are
// torch's. The others wait for memory, so blocks of tokens pass through all of them at once, and what is small stays in registers.

#include <ATen/Parallel.h>
#include <ATen/ops/addmm.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/empty_like.h>
#include <ATen/ops/linear.h>
#include <ATen/ops/zeros_like.h>
#include <torch/library.h>

#include <memory>
#include <vector>

namespace {

constexpr int64_t BLOCK = 8;  // tokens
#ifdef __AVX512F__
constexpr int64_t LANES = 16;  // of a register; BLOCK of them and a sum have to fit into all registers
#else
constexpr int64_t LANES = 8;
#endif

template <int64_t R>
struct Vector {
  typedef float type __attribute__((vector_size(4 * R), aligned(4)));
};
using Wide = Vector<LANES>::type;

// h (N, R) = x (N, width) A (width, R)
template <int64_t R, int64_t N>
inline void shrink(const float* x, const float* A, float* h, int64_t width) {
  using V = typename Vector<R>::type;
  V sums[N];
  for (int64_t t = 0; t < N; ++t) sums[t] = V{};
  for (int64_t k = 0; k < width; ++k) {
    const V a = *reinterpret_cast<const V*>(A + k * R);
#pragma GCC unroll 8
    for (int64_t t = 0; t < N; ++t) sums[t] += x[t * width + k] * a;
  }
  for (int64_t t = 0; t < N; ++t) *reinterpret_cast<V*>(h + t * R) = sums[t];
}

// G (R, width) += h (N, R)^T g (N, width), a cache line of a few rows of G at once
template <int64_t R, int64_t N>
inline void gather(const float* h, const float* g, float* G, int64_t width) {
  constexpr int64_t FEW = 4;
  int64_t o = 0;
  for (; o + 2 * LANES <= width; o += 2 * LANES)
    for (int64_t r = 0; r < R; r += FEW) {
      Wide sums[FEW][2];
#pragma GCC unroll 4
      for (int64_t k = 0; k < FEW; ++k)
        for (int64_t j = 0; j < 2; ++j) sums[k][j] = *reinterpret_cast<const Wide*>(G + (r + k) * width + o + j * LANES);
#pragma GCC unroll 4
      for (int64_t t = 0; t < N; ++t) {
        const Wide left = *reinterpret_cast<const Wide*>(g + t * width + o);
        const Wide right = *reinterpret_cast<const Wide*>(g + t * width + o + LANES);
#pragma GCC unroll 4
        for (int64_t k = 0; k < FEW; ++k) {
          sums[k][0] += h[t * R + r + k] * left;
          sums[k][1] += h[t * R + r + k] * right;
        }
      }
#pragma GCC unroll 4
      for (int64_t k = 0; k < FEW; ++k)
        for (int64_t j = 0; j < 2; ++j) *reinterpret_cast<Wide*>(G + (r + k) * width + o + j * LANES) = sums[k][j];
    }
  for (; o < width; ++o)
    for (int64_t r = 0; r < R; ++r)
      for (int64_t t = 0; t < N; ++t) G[r * width + o] += h[t * R + r] * g[t * width + o];
}

// z (N, width) += u (N, R) M (R, width)
template <int64_t R, int64_t N>
inline void expand(const float* u, const float* M, float* z, int64_t width) {
  int64_t o = 0;
  for (; o + LANES <= width; o += LANES) {
    Wide rows[R];
#pragma GCC unroll 16
    for (int64_t r = 0; r < R; ++r) rows[r] = *reinterpret_cast<const Wide*>(M + r * width + o);
#pragma GCC unroll 8
    for (int64_t t = 0; t < N; ++t) {
      Wide* into = reinterpret_cast<Wide*>(z + t * width + o);
      Wide sum = *into;
#pragma GCC unroll 16
      for (int64_t r = 0; r < R; ++r) sum += u[t * R + r] * rows[r];
      *into = sum;
    }
  }
  for (; o < width; ++o)
    for (int64_t t = 0; t < N; ++t)
      for (int64_t r = 0; r < R; ++r) z[t * width + o] += u[t * R + r] * M[r * width + o];
}

// The ranks that are compiled.
template <typename Run>
void with_rank(int64_t R, const Run& run) {
  if (R == 4) return run.template operator()<4>();
  if (R == 8) return run.template operator()<8>();
  if (R == 16) return run.template operator()<16>();
  TORCH_CHECK(false, "rank ", R, " is not compiled");
}

// Blocks of tokens, each thread some of them one behind the other; ``of<N>(t, thread)`` does the N tokens from t on.
template <typename Of>
void blocks(int64_t tokens, const Of& of) {
  const int64_t threads = at::get_num_threads();
  at::parallel_for(0, tokens, (tokens + threads - 1) / threads, [&](int64_t begin, int64_t end) {
    int64_t t = begin;
    for (; t + BLOCK <= end; t += BLOCK) of.template operator()<BLOCK>(t, at::get_thread_num());
    for (; t < end; ++t) of.template operator()<1>(t, at::get_thread_num());
  });
}

at::Tensor rows(const at::Tensor& x) { return x.reshape({-1, x.size(-1)}).contiguous(); }

at::Tensor merged(const at::Tensor& W, const at::Tensor& A, const at::Tensor& B) { return at::addmm(W, B.t(), A.t()); }

// The numbers of a small matrix row by row, copied where they lie otherwise in memory.
class Rows {
 public:
  explicit Rows(const at::Tensor& M) {
    const int64_t rows = M.size(0), columns = M.size(1), down = M.stride(0), right = M.stride(1);
    const float* from = M.const_data_ptr<float>();
    data = from;
    if (down == columns && right == 1) return;
    copy.reset(new float[rows * columns]);
    for (int64_t i = 0; i < rows; ++i)
      for (int64_t k = 0; k < columns; ++k) copy[i * columns + k] = from[i * down + k * right];
    data = copy.get();
  }
  const float* data;

 private:
  std::unique_ptr<float[]> copy;
};

// Sums of each thread, (threads, R, width).
class Sums {
 public:
  Sums(int64_t threads, int64_t rank, int64_t width) : threads(threads), rank(rank), width(width), values(threads * rank * width) {}
  float* of(int64_t thread) { return values.data() + thread * rank * width; }

  // Of all threads, (R, width), in M's order of memory, so that nobody has to copy a gradient into that of its parameter.
  at::Tensor like(const at::Tensor& M) const {
    at::Tensor found = at::empty_like(M);
    const int64_t down = found.stride(0), right = found.stride(1);
    float* to = found.mutable_data_ptr<float>();
    for (int64_t r = 0; r < rank; ++r)
      for (int64_t k = 0; k < width; ++k) {
        float sum = 0;
        for (int64_t t = 0; t < threads; ++t) sum += values[(t * rank + r) * width + k];
        to[r * down + k * right] = sum;
      }
    return found;
  }

 private:
  int64_t threads, rank, width;
  std::vector<float> values;
};

// y += (x A) B
void add_change(at::Tensor& y, const at::Tensor& x, const at::Tensor& A, const at::Tensor& B) {
  const int64_t in = x.size(1), out = y.size(1);
  const Rows down(A), up(B);
  const float* from = x.const_data_ptr<float>();
  float* to = y.mutable_data_ptr<float>();
  with_rank(A.size(1), [&]<int64_t R>() {
    blocks(x.size(0), [&]<int64_t N>(int64_t t, int64_t) {
      float h[N * R];
      shrink<R, N>(from + t * in, down.data, h, in);
      expand<R, N>(h, up.data, to + t * out, out);
    });
  });
}

// dL/dA (in, r) and dL/dB (r, out); to z, if there is one, u A^T is added.
std::tuple<at::Tensor, at::Tensor> gradients(const at::Tensor& x, const at::Tensor& g, const at::Tensor& A, const at::Tensor& B, at::Tensor* z) {
  const int64_t rank = A.size(1), in = x.size(1), out = g.size(1), threads = at::get_num_threads();
  const Rows down(A), down_turned(A.t()), up_turned(B.t());
  Sums g_A(threads, rank, in), g_B(threads, rank, out);
  const float *px = x.const_data_ptr<float>(), *pg = g.const_data_ptr<float>();
  float* pz = z ? z->mutable_data_ptr<float>() : nullptr;
  with_rank(rank, [&]<int64_t R>() {
    blocks(x.size(0), [&]<int64_t N>(int64_t t, int64_t thread) {
      float h[N * R], u[N * R];
      shrink<R, N>(px + t * in, down.data, h, in);
      shrink<R, N>(pg + t * out, up_turned.data, u, out);
      gather<R, N>(h, pg + t * out, g_B.of(thread), out);
      gather<R, N>(u, px + t * in, g_A.of(thread), in);
      if (pz) expand<R, N>(u, down_turned.data, pz + t * in, in);
    });
  });
  return {g_A.like(A.t()).t(), g_B.like(B)};
}

using Tensors = std::vector<at::Tensor>;
using Some = c10::List<std::optional<at::Tensor>>;

Tensors low_rank_forward(const at::Tensor& x, at::TensorList W, const Some& b, at::TensorList A, at::TensorList B, bool folded) {
  const at::Tensor flat = rows(x);
  Tensors found;
  for (size_t k = 0; k < W.size(); ++k) {
    found.push_back(at::linear(x, folded ? merged(W[k], A[k], B[k]) : W[k], b.get(k)));
    if (folded) continue;
    at::Tensor y = found.back().view({-1, W[k].size(0)});
    add_change(y, flat, A[k], B[k]);
  }
  return found;
}

// dL/dx, and of each map dL/dA and dL/dB; a map without a gradient has empty ones.
std::tuple<at::Tensor, Tensors, Tensors> low_rank_backward(
    const at::Tensor& x, at::TensorList W, at::TensorList A, at::TensorList B, const Some& gradient, bool folded, bool needs_x) {
  const at::Tensor flat = rows(x);
  at::Tensor g_x = needs_x ? at::empty(flat.sizes(), flat.options()) : at::Tensor();
  Tensors g_A, g_B;
  bool begun = false;
  for (size_t k = 0; k < W.size(); ++k) {
    if (!gradient.get(k).has_value()) {
      g_A.push_back(at::zeros_like(A[k]));
      g_B.push_back(at::zeros_like(B[k]));
      continue;
    }
    const at::Tensor g = rows(*gradient.get(k));
    if (needs_x) at::addmm_out(g_x, g_x, g, folded ? merged(W[k], A[k], B[k]) : W[k], begun ? 1 : 0);
    begun = true;
    const auto found = gradients(flat, g, A[k], B[k], needs_x && !folded ? &g_x : nullptr);
    g_A.push_back(std::get<0>(found));
    g_B.push_back(std::get<1>(found));
  }
  if (needs_x && !begun) g_x.zero_();
  return {needs_x ? g_x.view(x.sizes()) : at::empty({0}, x.options()), g_A, g_B};
}

}  // namespace

TORCH_LIBRARY_FRAGMENT(deltatune, library) {
  library.def("low_rank_forward(Tensor x, Tensor[] W, Tensor?[] b, Tensor[] A, Tensor[] B, bool folded) -> Tensor[]");
  library.def(
      "low_rank_backward(Tensor x, Tensor[] W, Tensor[] A, Tensor[] B, Tensor?[] gradient, bool folded, bool needs_x) -> (Tensor, Tensor[], Tensor[])");
}

TORCH_LIBRARY_IMPL(deltatune, CPU, library) {
  library.impl("low_rank_forward", &low_rank_forward);
  library.impl("low_rank_backward", &low_rank_backward);
}
