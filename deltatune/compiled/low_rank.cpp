// Linear maps of one x with low-rank changes, forward and backward; ``injection/fused.py`` says which formulas.
//
//     y = x (W + s B A)^T + b                            folded, else y = x W^T + b, y += h B^T
//     h = s x A^T,  u = s g B,  dL/dB = (h^T g)^T,  dL/dA = u^T x,  dL/dx += g W,  dL/dx += u A
//
// x (tokens, in), g (tokens, out), W (out, in), A (r, in), B (out, r), h and u (tokens, r), r one of 4, 8 and 16. The large products are
// torch's. The others wait for memory, so blocks of tokens pass through all of them at once, and what is small stays in registers.
// ``low_rank`` is what autograd sees of this: one function for all maps of one x.

#include <ATen/Parallel.h>
#include <ATen/TensorOperators.h>
#include <ATen/core/dispatch/Dispatcher.h>
#include <ATen/ops/addmm.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/empty_like.h>
#include <ATen/ops/linear.h>
#include <ATen/ops/zeros_like.h>
#include <torch/csrc/autograd/custom_function.h>
#include <torch/library.h>

#include <algorithm>
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

// h (N, R) = s x (N, width) M (width, R)
template <int64_t R, int64_t N>
inline void shrink(const float* x, const float* M, float s, float* h, int64_t width) {
  using V = typename Vector<R>::type;
  V sums[N];
  for (int64_t t = 0; t < N; ++t) sums[t] = V{};
  for (int64_t k = 0; k < width; ++k) {
    const V m = *reinterpret_cast<const V*>(M + k * R);
#pragma GCC unroll 8
    for (int64_t t = 0; t < N; ++t) sums[t] += x[t * width + k] * m;
  }
  for (int64_t t = 0; t < N; ++t) *reinterpret_cast<V*>(h + t * R) = s * sums[t];
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

at::Tensor merged(const at::Tensor& W, const at::Tensor& A, const at::Tensor& B, double s) { return at::addmm(W, B, A, 1, s); }

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

  // Of all threads, into M (R, width), whatever its order of memory.
  void into(const at::Tensor& M) {
    const int64_t size = rank * width, down = M.stride(0), right = M.stride(1);
    float *sum = values.data(), *to = M.mutable_data_ptr<float>();
    for (int64_t t = 1; t < threads; ++t)
      for (int64_t i = 0; i < size; ++i) sum[i] += sum[t * size + i];
    if (right == 1) {
      for (int64_t r = 0; r < rank; ++r) std::copy_n(sum + r * width, width, to + r * down);
    } else {
      for (int64_t k = 0; k < width; ++k)
        for (int64_t r = 0; r < rank; ++r) to[r * down + k * right] = sum[r * width + k];
    }
  }

 private:
  int64_t threads, rank, width;
  std::vector<float> values;
};

// y += s (x A^T) B^T
void add_change(at::Tensor& y, const at::Tensor& x, const at::Tensor& A, const at::Tensor& B, float s) {
  const int64_t in = x.size(1), out = y.size(1);
  const Rows down(A.t()), up(B.t());
  const float* from = x.const_data_ptr<float>();
  float* to = y.mutable_data_ptr<float>();
  with_rank(A.size(0), [&]<int64_t R>() {
    blocks(x.size(0), [&]<int64_t N>(int64_t t, int64_t) {
      float h[N * R];
      shrink<R, N>(from + t * in, down.data, s, h, in);
      expand<R, N>(h, up.data, to + t * out, out);
    });
  });
}

// dL/dA (r, in) and dL/dB (out, r), in the order of memory of A and B; to z, if there is one, u A is added.
std::tuple<at::Tensor, at::Tensor> gradients(
    const at::Tensor& x, const at::Tensor& g, const at::Tensor& A, const at::Tensor& B, float s, at::Tensor* z) {
  const int64_t rank = A.size(0), in = x.size(1), out = g.size(1), threads = at::get_num_threads();
  const Rows turned(A.t()), down(A), up(B);
  Sums g_A(threads, rank, in), g_B(threads, rank, out);
  const float *px = x.const_data_ptr<float>(), *pg = g.const_data_ptr<float>();
  float* pz = z ? z->mutable_data_ptr<float>() : nullptr;
  with_rank(rank, [&]<int64_t R>() {
    blocks(x.size(0), [&]<int64_t N>(int64_t t, int64_t thread) {
      float h[N * R], u[N * R];
      shrink<R, N>(px + t * in, turned.data, s, h, in);
      shrink<R, N>(pg + t * out, up.data, s, u, out);
      gather<R, N>(h, pg + t * out, g_B.of(thread), out);
      gather<R, N>(u, px + t * in, g_A.of(thread), in);
      if (pz) expand<R, N>(u, down.data, pz + t * in, in);
    });
  });
  std::tuple<at::Tensor, at::Tensor> found{at::empty_like(A), at::empty_like(B)};
  g_A.into(std::get<0>(found));
  g_B.into(std::get<1>(found).t());
  return found;
}

using Tensors = std::vector<at::Tensor>;
using Some = c10::List<std::optional<at::Tensor>>;

Tensors low_rank_forward(
    const at::Tensor& x, at::TensorList W, const Some& b, at::TensorList A, at::TensorList B, at::ArrayRef<double> s, bool folded) {
  const at::Tensor flat = rows(x);
  Tensors found;
  for (size_t k = 0; k < W.size(); ++k) {
    found.push_back(at::linear(x, folded ? merged(W[k], A[k], B[k], s[k]) : W[k], b.get(k)));
    if (folded) continue;
    at::Tensor y = found.back().view({-1, W[k].size(0)});
    add_change(y, flat, A[k], B[k], s[k]);
  }
  return found;
}

// dL/dx, and of each map dL/dA and dL/dB; a map without a gradient has zeros.
std::tuple<at::Tensor, Tensors, Tensors> low_rank_backward(
    const at::Tensor& x, at::TensorList W, at::TensorList A, at::TensorList B, at::ArrayRef<double> s, const Some& gradient, bool folded,
    bool needs_x) {
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
    if (needs_x) at::addmm_out(g_x, g_x, g, folded ? merged(W[k], A[k], B[k], s[k]) : W[k], begun ? 1 : 0);
    begun = true;
    const auto found = gradients(flat, g, A[k], B[k], s[k], needs_x && !folded ? &g_x : nullptr);
    g_A.push_back(std::get<0>(found));
    g_B.push_back(std::get<1>(found));
  }
  if (needs_x && !begun) g_x.zero_();
  return {needs_x ? g_x.view(x.sizes()) : at::empty({0}, x.options()), g_A, g_B};
}

// The same by operations that autograd can follow, for a gradient of the gradient; what has none is undefined.
std::tuple<at::Tensor, Tensors, Tensors> written_out(
    const at::Tensor& x, at::TensorList W, at::TensorList A, at::TensorList B, at::ArrayRef<double> s, const Tensors& gradient) {
  const at::Tensor flat = x.reshape({-1, x.size(-1)});
  at::Tensor g_x;
  Tensors g_A(W.size()), g_B(W.size());
  for (size_t k = 0; k < W.size(); ++k) {
    if (!gradient[k].defined()) continue;
    const at::Tensor g = gradient[k].reshape({-1, W[k].size(0)}), u = g.matmul(B[k]) * s[k];
    const at::Tensor part = g.matmul(W[k]) + u.matmul(A[k]);
    g_x = g_x.defined() ? g_x + part : part;
    g_A[k] = u.t().matmul(flat);
    g_B[k] = g.t().matmul(flat.matmul(A[k].t())) * s[k];
  }
  return {g_x.defined() ? g_x.view_as(x) : g_x, g_A, g_B};
}

// An operation of this library as the dispatcher has it, so that tensors without numbers and whoever watches operations find their way.
template <typename Signature>
auto operation(const char* name) {
  return c10::Dispatcher::singleton().findSchemaOrThrow(name, "").typed<Signature>();
}

// x; W, b, A and B of each map -> y of each. Gradients go to x, b, A and B; W is frozen.
class LowRank : public torch::autograd::Function<LowRank> {
 public:
  static Tensors forward(
      torch::autograd::AutogradContext* ctx, const at::Tensor& x, at::TensorList W, at::TensorList biases, at::TensorList A, at::TensorList B,
      const Some& b, std::vector<double> s, bool folded) {
    static const auto run = operation<decltype(low_rank_forward)>("deltatune::low_rank_forward");
    at::AutoDispatchBelowADInplaceOrView below;
    Tensors kept{x};
    for (const at::TensorList& each : {W, A, B}) kept.insert(kept.end(), each.begin(), each.end());
    ctx->save_for_backward(std::move(kept));
    ctx->saved_data["s"] = s;
    ctx->saved_data["folded"] = folded;
    ctx->saved_data["biased"] = places(b);
    ctx->set_materialize_grads(false);
    return run.call(x, W, b, A, B, s, folded);
  }

  static Tensors backward(torch::autograd::AutogradContext* ctx, const Tensors& gradient) {
    static const auto run = operation<decltype(low_rank_backward)>("deltatune::low_rank_backward");
    const Tensors kept = ctx->get_saved_variables();
    const size_t n = gradient.size();
    const at::TensorList all(kept), W = all.slice(1, n), A = all.slice(1 + n, n), B = all.slice(1 + 2 * n, n);
    const std::vector<double> s = ctx->saved_data["s"].toDoubleVector();
    const bool needs_x = ctx->needs_input_grad(0);
    std::tuple<at::Tensor, Tensors, Tensors> found;
    if (at::GradMode::is_enabled()) {
      found = written_out(kept[0], W, A, B, s, gradient);
    } else {
      at::AutoDispatchBelowADInplaceOrView below;
      found = run.call(kept[0], W, A, B, s, some(gradient), ctx->saved_data["folded"].toBool(), needs_x);
    }
    const std::vector<int64_t> biased = ctx->saved_data["biased"].toIntVector();
    const size_t m = biased.size();
    Tensors given(1 + n + m + 2 * n + 3);  // of x; of all W, biases, A and B; b, s and folded have none
    if (needs_x) given[0] = std::get<0>(found);
    for (size_t j = 0; j < m; ++j) {
      const at::Tensor& g = gradient[biased[j]];
      if (g.defined() && ctx->needs_input_grad(1 + n + j)) given[1 + n + j] = g.reshape({-1, g.size(-1)}).sum(0);
    }
    for (size_t k = 0; k < n; ++k) {
      if (!gradient[k].defined()) continue;
      given[1 + n + m + k] = std::get<1>(found)[k];
      given[1 + 2 * n + m + k] = std::get<2>(found)[k];
    }
    return given;
  }

 private:
  static Some some(at::TensorList tensors) {
    Some found;
    for (const at::Tensor& one : tensors) found.push_back(one.defined() ? std::optional<at::Tensor>(one) : std::nullopt);
    return found;
  }

  // Which maps have a bias.
  static std::vector<int64_t> places(const Some& b) {
    std::vector<int64_t> found;
    for (size_t k = 0; k < b.size(); ++k)
      if (b.get(k).has_value()) found.push_back(k);
    return found;
  }
};

Tensors low_rank(
    const at::Tensor& x, at::TensorList W, const Some& b, at::TensorList A, at::TensorList B, at::ArrayRef<double> s, bool folded) {
  Tensors biases;
  for (size_t k = 0; k < b.size(); ++k)
    if (const std::optional<at::Tensor> one = b.get(k)) biases.push_back(*one);
  return LowRank::apply(x, W, at::TensorList(biases), A, B, b, s.vec(), folded);  // autograd follows what is a tensor or a TensorList
}

}  // namespace

TORCH_LIBRARY_FRAGMENT(deltatune, library) {
  library.def("low_rank(Tensor x, Tensor[] W, Tensor?[] b, Tensor[] A, Tensor[] B, float[] s, bool folded) -> Tensor[]");
  library.def("low_rank_forward(Tensor x, Tensor[] W, Tensor?[] b, Tensor[] A, Tensor[] B, float[] s, bool folded) -> Tensor[]");
  library.def(
      "low_rank_backward(Tensor x, Tensor[] W, Tensor[] A, Tensor[] B, float[] s, Tensor?[] gradient, bool folded, bool needs_x) -> (Tensor, Tensor[], Tensor[])");
}

TORCH_LIBRARY_IMPL(deltatune, CPU, library) {
  library.impl("low_rank_forward", &low_rank_forward);
  library.impl("low_rank_backward", &low_rank_backward);
}

TORCH_LIBRARY_IMPL(deltatune, Autograd, library) { library.impl("low_rank", &low_rank); }
