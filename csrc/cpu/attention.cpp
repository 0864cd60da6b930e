// path_attention and its gradient on a CPU: the queries of a prompt tree's pieces against the keys on their path, in
// bfloat16 on AMX tiles (attention_tiles.h).
//
// Here: checks, the trees' layout in columns, memory, threads. The schema, its torch form and the autograd formula are
// collm_fast/ops/attention.py; when it serves, and what does elsewhere, collm_fast/models/attention.py.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/BFloat16.h>

#include <algorithm>
#include <cstdint>
#include <optional>
#include <tuple>
#include <vector>

#include "../checks.h"
#include "attention_tiles.h"
#include "isa.h"
#include "lora_scratch.h"

namespace collm::attention {
namespace {

using torch::headeronly::BFloat16;

constexpr const char* kName = "path_attention";

void check_bf16(const char* what, const Tensor& tensor) {
  COLLM_CHECK(tensor.scalar_type() == ScalarType::BFloat16, kName, what, " in bfloat16, got ", dtype(tensor));
}

void check_heads(const char* what, const Tensor& tensor, int64_t heads, int64_t tokens, int64_t width) {
  const bool good = tensor.dim() == 3 && tensor.size(0) == heads && tensor.size(1) == tokens && tensor.size(2) == width;
  COLLM_CHECK(good, kName, what, " of shape [", heads, ", ", tokens, ", ", width, "], got ", shape(tensor));
  check_bf16(what, tensor);
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
  check_bf16("query", in.query);
  COLLM_CHECK(in.key.dim() == 3 && in.key.size(0) > 0 && in.query.size(0) % in.key.size(0) == 0, kName,
              "key of shape [heads that divide ", in.query.size(0), ", T, d], got ", shape(in.key));
  const int64_t heads = in.key.size(0), width = in.query.size(2);
  check_heads("key", in.key, heads, in.key.size(1), width);
  check_heads("value", in.value, heads, in.key.size(1), width);
  COLLM_CHECK(in.past_key.has_value() == in.past_value.has_value(), kName, "past keys and past values, got one");
  if (in.past_key) {
    COLLM_CHECK(in.past_key->dim() == 3, kName, "past_key of shape [h, P, d], got ", shape(*in.past_key));
    check_heads("past_key", *in.past_key, heads, in.past_key->size(1), width);
    check_heads("past_value", *in.past_value, heads, in.past_key->size(1), width);
  }
  COLLM_CHECK(in.window >= 0, kName, "a window of at least 0, got ", in.window);
  check_lengths(in);
}

#if defined(COLLM_X86)

std::vector<Tree> trees_of(const Inputs& in) {
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
          tree.columns += round_up(size, kStep);
        }
      }
      int64_t width = 0;
      for (const Run& run : runs) {
        width += round_up(run.size, kStep);
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
struct Dense {
  Tensor tensor;
  explicit Dense(const Tensor& from) : tensor(from.stride(2) == 1 ? from : torch::stable::contiguous(from)) {}
  Rows rows() const {
    return {reinterpret_cast<const uint16_t*>(tensor.const_data_ptr<BFloat16>()), tensor.stride(0), tensor.stride(1)};
  }
};

// The memory of one task at a time; `bytes` cuts it in multiples of a cache line.
class Memory {
 public:
  Memory(const Problem& p, const std::vector<Tree>& trees, bool gradient) {
    int64_t columns = 0, longest = 0;
    for (const Tree& tree : trees) {
      columns = std::max(columns, tree.columns);
      longest = std::max(longest, tree.longest);
    }
    const int64_t wide = p.padded(), keys = columns * wide, rows = kBlock * wide, block = kBlock * longest;
    // Once to measure, once to cut.
    for (const bool cut : {false, true}) {
      at_ = cut ? reinterpret_cast<uintptr_t>(buffer_->data()) : 0;
      take(z.key_terms, keys), take(z.query, rows), take(z.scores, block), take(z.sums, rows);
      take(gradient ? z.key_pairs : z.value_pairs, keys);
      if (gradient) {
        take(z.value_terms, keys), take(z.grad, rows), take(z.query_turned, rows), take(z.grad_turned, rows);
        take(z.d_scores, block), take(z.weight_pairs, block), take(z.score_pairs, block), take(z.d_weights, block);
        take(z.d_keys, keys), take(z.d_values, keys);
      } else {
        take(z.weights, block);
      }
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

// f(tree, key head, scratch) for all of them: each writes rows of its own.
template <typename F>
void for_tasks(const Problem& p, const std::vector<Tree>& trees, bool gradient, const F& f) {
  const int64_t tasks = static_cast<int64_t>(trees.size()) * p.key_heads;
  torch::stable::parallel_for(0, tasks, 1, [&](int64_t first_task, int64_t last) {
    Memory memory(p, trees, gradient);
    for (int64_t task = first_task; task < last; ++task) {
      f(trees[static_cast<size_t>(task / p.key_heads)], task % p.key_heads, memory.z);
    }
  });
}

Problem problem_of(const Inputs& in, double scale) {
  Problem p{};
  p.heads = in.query.size(0), p.key_heads = in.key.size(0), p.width = in.query.size(2);
  p.queries = in.query.size(1), p.tokens = in.key.size(1);
  p.scale = static_cast<float>(scale), p.window = in.window;
  return p;
}

#endif

void check_tiles() { COLLM_CHECK(has_tiles(), kName, "a CPU whose AMX tiles this process may use, got one without"); }

uint16_t* bits(Tensor& tensor) { return reinterpret_cast<uint16_t*>(tensor.mutable_data_ptr<BFloat16>()); }

std::tuple<Tensor, Tensor> path_attention(const Tensor& query, const Tensor& key, const Tensor& value,
                                          std::optional<Tensor> past_key, std::optional<Tensor> past_value,
                                          const Tensor& pieces, const Tensor& counts, double scale, int64_t window) {
  const Inputs in{query, key, value, past_key, past_value, pieces, counts, window};
  check(in);
  check_tiles();
  const int64_t h = query.size(0), Q = query.size(1), d = query.size(2);
  Tensor out = torch::stable::new_empty(query, {Q, h, d});
  Tensor sums = torch::stable::new_empty(query, {h, Q}, ScalarType::Float);
#if defined(COLLM_X86)
  const Dense q(query), k(key), v(value), pk(past_key.value_or(key)), pv(past_value.value_or(value));
  Problem p = problem_of(in, scale);
  p.query = q.rows(), p.key = k.rows(), p.value = v.rows(), p.past_key = pk.rows(), p.past_value = pv.rows();
  p.sums = sums.mutable_data_ptr<float>(), p.out = bits(out);
  for_tasks(p, trees_of(in), false, [&](const Tree& t, int64_t head, Scratch& z) { forward(p, t, head, z); });
#endif
  return {out, sums};
}

std::tuple<Tensor, Tensor, Tensor> path_attention_backward(const Tensor& grad, const Tensor& query, const Tensor& key,
                                                           const Tensor& value, std::optional<Tensor> past_key,
                                                           std::optional<Tensor> past_value, const Tensor& sums,
                                                           const Tensor& pieces, const Tensor& counts, double scale,
                                                           int64_t window) {
  const Inputs in{query, key, value, past_key, past_value, pieces, counts, window};
  check(in);
  check_tiles();
  const int64_t h = query.size(0), Q = query.size(1), d = query.size(2), hk = key.size(0), T = key.size(1);
  check_heads("grad", grad, Q, h, d);
  COLLM_CHECK(sums.dim() == 2 && sums.size(0) == h && sums.size(1) == Q && sums.scalar_type() == ScalarType::Float &&
                  sums.is_contiguous(),
              kName, "the sums that it gave, got ", dtype(sums), " of shape ", shape(sums));
  Tensor d_query = torch::stable::new_empty(query, {h, Q, d});
  Tensor d_key = torch::stable::new_empty(query, {hk, T, d});
  Tensor d_value = torch::stable::new_empty(query, {T, hk, d});
#if defined(COLLM_X86)
  const Dense q(query), k(key), v(value), pk(past_key.value_or(key)), pv(past_value.value_or(value)), g(grad);
  Problem p = problem_of(in, scale);
  p.query = q.rows(), p.key = k.rows(), p.value = v.rows(), p.past_key = pk.rows(), p.past_value = pv.rows();
  p.grad = {g.rows().data, g.rows().token, g.rows().head};  // [Q, h, d]
  p.sums = const_cast<float*>(sums.const_data_ptr<float>());
  p.d_query = bits(d_query), p.d_key = bits(d_key), p.d_value = bits(d_value);
  for_tasks(p, trees_of(in), true, [&](const Tree& t, int64_t head, Scratch& z) { backward(p, t, head, z); });
#endif
  return {d_query, d_key, d_value};
}

}  // namespace
}  // namespace collm::attention

STABLE_TORCH_LIBRARY_IMPL(collm_fast, CPU, m) {
  m.impl("path_attention", TORCH_BOX(&collm::attention::path_attention));
  m.impl("path_attention_backward", TORCH_BOX(&collm::attention::path_attention_backward));
}
