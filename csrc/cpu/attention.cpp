// path_attention and its gradient on a CPU: the queries of a prompt tree's pieces against the keys on their path, in
// bfloat16 on AMX tiles where there are some (attention_tiles.h), else by vectors of float32 (attention_vectors.h).
//
// Here: checks, the trees' layout in columns, memory, threads. The schema, its torch form and the autograd formula are
// collm_fast/ops/attention.py; when it serves, and what does elsewhere, collm_fast/models/attention.py.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/BFloat16.h>

#include <algorithm>
#include <array>
#include <cmath>
#include <cstdint>
#include <limits>
#include <optional>
#include <tuple>
#include <vector>

#include "../checks.h"
#include "attention_paths.h"
#include "attention_tiles.h"
#include "isa.h"
#include "lora_scratch.h"

namespace collm::attention {
namespace {

using torch::headeronly::BFloat16;
using torch::headeronly::Half;

#define COLLM_LOOPS "attention_vectors.h"
#include "each_isa.h"

constexpr const char* kName = "path_attention";

void check_heads(const char* what, const Tensor& tensor, int64_t heads, int64_t tokens, const Tensor& query) {
  const int64_t width = query.size(2);
  const bool good = tensor.dim() == 3 && tensor.size(0) == heads && tensor.size(1) == tokens && tensor.size(2) == width;
  COLLM_CHECK(good, kName, what, " of shape [", heads, ", ", tokens, ", ", width, "], got ", shape(tensor));
  COLLM_CHECK(tensor.scalar_type() == query.scalar_type(), kName, what, " of the dtype of query, got ", dtype(tensor));
}

struct Inputs {
  const Tensor &query, &key, &value;
  const std::optional<Tensor>&past_key, &past_value;
  const Tensor &pieces, &counts;
  int64_t window;
};

int64_t past_of(const Inputs& in) { return in.past_key ? in.past_key->size(1) : 0; }

void check_lengths(const Inputs& in) {
  const bool tables = in.pieces.dim() == 2 && in.pieces.size(1) == 3 && in.counts.dim() == 1 &&
                      in.pieces.scalar_type() == ScalarType::Long && in.counts.scalar_type() == ScalarType::Long &&
                      in.pieces.is_contiguous() && in.counts.is_contiguous();
  COLLM_CHECK(tables, kName, "dense int64 pieces [N, 3] and counts [trees], got ", shape(in.pieces), " and ",
              shape(in.counts));
  const int64_t* piece = in.pieces.const_data_ptr<int64_t>();
  int64_t sums[3] = {}, pieces = 0;
  for (int64_t i = 0; i < in.pieces.size(0); ++i, piece += 3) {
    COLLM_CHECK(piece[0] >= 0 && piece[1] >= piece[2] && piece[2] >= 0, kName,
                "0 <= past and 0 <= asked <= own of every piece, got ", piece[0], ", ", piece[2], ", ", piece[1]);
    for (int64_t j = 0; j < 3; ++j) {
      sums[j] += piece[j];
    }
  }
  const int64_t* count = in.counts.const_data_ptr<int64_t>();
  for (int64_t i = 0; i < in.counts.size(0); ++i) {
    COLLM_CHECK(count[i] >= 1, kName, "at least a prefix in every tree, got ", count[i], " pieces");
    pieces += count[i];
  }
  COLLM_CHECK(pieces == in.pieces.size(0), kName, "counts of ", in.pieces.size(0), " pieces, got ", pieces);
  const int64_t want[3] = {past_of(in), in.key.size(1), in.query.size(1)};
  for (int64_t j = 0; j < 3; ++j) {
    COLLM_CHECK(sums[j] == want[j], kName, "pieces of ", want[j],
                j == 0   ? " past"
                : j == 1 ? " own"
                         : " asked",
                " tokens, got ", sums[j]);
  }
}

void check(const Inputs& in) {
  COLLM_CHECK(in.query.dim() == 3 && in.query.size(2) >= 2, kName, "query of shape [h, Q, d] with d >= 2, got ",
              shape(in.query));
  const ScalarType type = in.query.scalar_type();
  COLLM_CHECK(type == ScalarType::Float || type == ScalarType::BFloat16, kName, "query in float32 or bfloat16, got ",
              dtype(in.query));
  COLLM_CHECK(in.key.dim() == 3 && in.key.size(0) > 0 && in.query.size(0) % in.key.size(0) == 0, kName,
              "key of shape [heads that divide ", in.query.size(0), ", T, d], got ", shape(in.key));
  const int64_t heads = in.key.size(0);
  check_heads("key", in.key, heads, in.key.size(1), in.query);
  check_heads("value", in.value, heads, in.key.size(1), in.query);
  COLLM_CHECK(in.past_key.has_value() == in.past_value.has_value(), kName, "past keys and past values, got one");
  if (in.past_key) {
    COLLM_CHECK(in.past_key->dim() == 3, kName, "past_key of shape [h, P, d], got ", shape(*in.past_key));
    check_heads("past_key", *in.past_key, heads, in.past_key->size(1), in.query);
    check_heads("past_value", *in.past_value, heads, in.past_key->size(1), in.query);
  }
  COLLM_CHECK(in.window >= 0, kName, "a window of at least 0, got ", in.window);
  check_lengths(in);
}

// The trees' columns: each run of keys begins at a multiple of `step` of them.
std::vector<Tree> trees_of(const Inputs& in, int64_t step) {
  const int64_t *piece = in.pieces.const_data_ptr<int64_t>(), *count = in.counts.const_data_ptr<int64_t>();
  std::vector<Tree> trees(static_cast<size_t>(in.counts.size(0)));
  int64_t places[2] = {0, 0}, query = 0;  // of own and past keys, and of queries
  for (size_t t = 0; t < trees.size(); ++t) {
    Tree& tree = trees[t];
    std::vector<Run> prefix;
    int64_t shared = 0;
    for (int64_t j = 0; j < count[t]; ++j, piece += 3) {
      std::vector<Run> runs = prefix;
      int64_t position = shared;
      for (const bool past : {true, false}) {
        const int64_t size = past ? piece[0] : piece[1];
        if (size > 0) {
          runs.push_back({places[past], size, past, tree.columns, position});
          tree.runs.push_back(runs.back());
          places[past] += size;
          position += size;
          tree.columns += round_up(size, step);
        }
      }
      int64_t width = 0;
      for (const Run& run : runs) {
        width += round_up(run.size, step);
      }
      tree.longest = std::max(tree.longest, width);
      if (j == 0) {
        prefix = runs;
        shared = position;
      }
      if (piece[2] > 0) {
        tree.paths.push_back({query, piece[2], position, std::move(runs)});
      }
      query += piece[2];
    }
  }
  return trees;
}

// Tensors whose rows are dense; they must outlive the kernel.
template <typename T>
struct Dense {
  Tensor tensor;
  explicit Dense(const Tensor& from) : tensor(from.stride(2) == 1 ? from : torch::stable::contiguous(from)) {}
  Rows<T> rows() const { return {static_cast<const T*>(tensor.const_data_ptr()), tensor.stride(0), tensor.stride(1)}; }
};

// What the kernels read, with their gradient where there is one.
template <typename T>
struct Operands {
  Dense<T> query, key, value, past_key, past_value, grad;

  explicit Operands(const Inputs& in, const Tensor* grad_ = nullptr)
      : query(in.query),
        key(in.key),
        value(in.value),
        past_key(in.past_key.value_or(in.key)),
        past_value(in.past_value.value_or(in.value)),
        grad(grad_ == nullptr ? in.query : *grad_) {}

  Problem<T> problem(const Inputs& in, double scale) const {
    Problem<T> p{};
    p.heads = in.query.size(0), p.key_heads = in.key.size(0), p.width = in.query.size(2);
    p.queries = in.query.size(1), p.tokens = in.key.size(1);
    p.scale = static_cast<float>(scale), p.window = in.window;
    p.query = query.rows(), p.key = key.rows(), p.value = value.rows();
    p.past_key = past_key.rows(), p.past_value = past_value.rows();
    p.grad = {grad.rows().data, grad.rows().token, grad.rows().head};  // [Q, h, d]
    return p;
  }
};

// The memory of one task at a time, cut in multiples of a cache line as the kernel's Scratch says.
template <typename Scratch>
class Memory {
 public:
  Memory(int64_t width, const std::vector<Tree>& trees, bool gradient) {
    int64_t columns = 0, longest = 0;
    for (const Tree& tree : trees) {
      columns = std::max(columns, tree.columns);
      longest = std::max(longest, tree.longest);
    }
    // Once to measure, once to cut.
    for (const bool cut : {false, true}) {
      at_ = cut ? reinterpret_cast<uintptr_t>(buffer_->data()) : 0;
      z.cut(width, columns, longest, gradient, [this](auto*& to, int64_t count) { take(to, count); });
      if (!cut) {
        buffer_.emplace(static_cast<int64_t>(at_));
      }
    }
  }
  Scratch z{};

 private:
  static constexpr uintptr_t kLine = 64;
  template <typename T>
  void take(T*& to, int64_t count) {
    to = reinterpret_cast<T*>(at_);
    const uintptr_t end = at_ + static_cast<uintptr_t>(count) * sizeof(T);
    at_ = (end + kLine - 1) / kLine * kLine;
#if defined(__SANITIZE_ADDRESS__)
    // To the sanitizer all of them are one block: what lies between two of them is out of bounds.
    at_ += kLine;
    if (buffer_) {
      __asan_poison_memory_region(reinterpret_cast<void*>(end), at_ - end);
    }
#endif
  }
  std::optional<lora::Buffer<char>> buffer_;  // not set to zero: nothing is read before it is written
  uintptr_t at_ = 0;
};

// One kernel: its forward and backward of a tree and a key head, and at which columns a run may begin.
template <typename T, typename Scratch>
struct Kernel {
  using Task = void (*)(const Problem<T>&, const Tree&, int64_t, Scratch&);
  Task forward, backward;
  int64_t step;

  // All tasks: each writes rows of its own.
  void run(const Problem<T>& p, const Inputs& in, bool gradient) const {
    const std::vector<Tree> trees = trees_of(in, step);
    const int64_t tasks = static_cast<int64_t>(trees.size()) * p.key_heads;
    torch::stable::parallel_for(0, tasks, 1, [&](int64_t first_task, int64_t last) {
      Memory<Scratch> memory(p.width, trees, gradient);
      for (int64_t task = first_task; task < last; ++task) {
        (gradient ? backward : forward)(p, trees[static_cast<size_t>(task / p.key_heads)], task % p.key_heads,
                                        memory.z);
      }
    });
  }
};

// f(kernel, element) with the kernel for tensors of this type on this CPU.
template <typename F>
void with_kernel(ScalarType type, const F& f) {
#if defined(COLLM_X86)
  if (type == ScalarType::BFloat16 && has_tiles()) {
    return f(Kernel<uint16_t, tiles::Scratch>{tiles::forward, tiles::backward, tiles::kStep}, uint16_t{});
  }
#endif
  const auto choose = [&](auto element) {
    using T = decltype(element);
#if defined(COLLM_X86)
    if (isa() == Isa::avx512) {
      return f(Kernel<T, avx512::Scratch>{avx512::forward<T>, avx512::backward<T>, avx512::kPanel}, element);
    }
    if (isa() == Isa::avx2) {
      return f(Kernel<T, avx2::Scratch>{avx2::forward<T>, avx2::backward<T>, avx2::kPanel}, element);
    }
#endif
    f(Kernel<T, baseline::Scratch>{baseline::forward<T>, baseline::backward<T>, baseline::kPanel}, element);
  };
  return type == ScalarType::Float ? choose(float{}) : choose(BFloat16{});
}

template <typename T>
T* data_of(Tensor& tensor) {
  return static_cast<T*>(tensor.mutable_data_ptr());
}

std::tuple<Tensor, Tensor> path_attention(const Tensor& query, const Tensor& key, const Tensor& value,
                                          std::optional<Tensor> past_key, std::optional<Tensor> past_value,
                                          const Tensor& pieces, const Tensor& counts, double scale, int64_t window) {
  const Inputs in{query, key, value, past_key, past_value, pieces, counts, window};
  check(in);
  const int64_t h = query.size(0), Q = query.size(1), d = query.size(2);
  Tensor out = torch::stable::new_empty(query, {Q, h, d});
  Tensor sums = torch::stable::new_empty(query, {h, Q}, ScalarType::Float);
  with_kernel(query.scalar_type(), [&](const auto& kernel, auto element) {
    using T = decltype(element);
    const Operands<T> operands(in);
    Problem<T> p = operands.problem(in, scale);
    p.sums = sums.mutable_data_ptr<float>(), p.out = data_of<T>(out);
    kernel.run(p, in, false);
  });
  return {out, sums};
}

std::tuple<Tensor, Tensor, Tensor> path_attention_backward(const Tensor& grad, const Tensor& query, const Tensor& key,
                                                           const Tensor& value, std::optional<Tensor> past_key,
                                                           std::optional<Tensor> past_value, const Tensor& sums,
                                                           const Tensor& pieces, const Tensor& counts, double scale,
                                                           int64_t window) {
  const Inputs in{query, key, value, past_key, past_value, pieces, counts, window};
  check(in);
  const int64_t h = query.size(0), Q = query.size(1), d = query.size(2), hk = key.size(0), T = key.size(1);
  check_heads("grad", grad, Q, h, query);
  COLLM_CHECK(sums.dim() == 2 && sums.size(0) == h && sums.size(1) == Q && sums.scalar_type() == ScalarType::Float &&
                  sums.is_contiguous(),
              kName, "the sums that it gave, got ", dtype(sums), " of shape ", shape(sums));
  Tensor d_query = torch::stable::new_empty(query, {h, Q, d});
  Tensor d_key = torch::stable::new_empty(query, {hk, T, d});
  Tensor d_value = torch::stable::new_empty(query, {T, hk, d});
  with_kernel(query.scalar_type(), [&](const auto& kernel, auto element) {
    using E = decltype(element);
    const Operands<E> operands(in, &grad);
    Problem<E> p = operands.problem(in, scale);
    p.sums = const_cast<float*>(sums.const_data_ptr<float>());
    p.d_query = data_of<E>(d_query), p.d_key = data_of<E>(d_key), p.d_value = data_of<E>(d_value);
    kernel.run(p, in, true);
  });
  return {d_query, d_key, d_value};
}

}  // namespace
}  // namespace collm::attention

STABLE_TORCH_LIBRARY_IMPL(collm_fast, CPU, m) {
  m.impl("path_attention", TORCH_BOX(&collm::attention::path_attention));
  m.impl("path_attention_backward", TORCH_BOX(&collm::attention::path_attention_backward));
}
