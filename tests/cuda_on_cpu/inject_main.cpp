// Runs csrc/cuda/inject.cuh on the host: what csrc/cuda/inject.cu launches, with strides and units from params.txt.
#include "emulator.h"

#include "cuda/inject.cuh"

namespace {

using namespace collm::inject_cuda;
using emulator::integer;
using emulator::launch;
using emulator::poisoned;
using emulator::read;

unsigned divided_up(int64_t value, int64_t by) { return static_cast<unsigned>((value + by - 1) / by); }

template <typename Body>
void with_unit(int64_t bytes, const Body& body) {
  switch (bytes) {
    case 16:
      return body(Bytes16{});
    case 8:
      return body(uint64_t{});
    case 4:
      return body(uint32_t{});
    default:
      return body(uint16_t{});
  }
}

template <typename Body>
void with_value(const Body& body) {
  switch (integer("value")) {
    case 1:
      return body(__nv_bfloat16{});
    case 2:
      return body(__half{});
    case 3:
      return body(double{});
    default:
      return body(float{});
  }
}

Table table_of(const std::vector<char>& bytes, const std::string& name) {
  return {bytes.data(), integer(name + "_row"), integer(name + "_step"), integer(name + "_count")};
}

void copy_rows(bool inject, std::vector<collm::ErrorRecord>& errors) {
  const auto table = read<char>("table"), rows = read<char>("rows");
  const auto token_ids = read<int64_t>("token_ids"), index64 = read<int64_t>("index64");
  const auto row_index = read<int32_t>("row_index"), index32 = read<int32_t>("index32");
  Copy copy{};
  copy.places = integer("places");
  copy.units = integer("units");
  const int64_t unit = integer("unit");
  auto out = poisoned<char>(static_cast<size_t>(copy.places * copy.units * unit));
  copy.token_ids = token_ids.data();
  copy.row_index = row_index.data();
  copy.index = index32.empty() ? static_cast<const void*>(index64.data()) : index32.data();
  copy.table = table_of(table, "table");
  copy.rows = table_of(rows, "rows");
  copy.out = out.data();
  copy.bad_token = &errors[0];
  copy.bad_row = &errors[1];
  const dim3 grid(divided_up(copy.places, kCopyWarps), divided_up(copy.units, kUnits * kWarp));
  with_unit(unit, [&](auto u) {
    using Unit = decltype(u);
    if (inject) {
      launch(grid, kCopyThreads, [&] { embed_inject_kernel<Unit>(copy); });
    } else if (index32.empty()) {
      launch(grid, kCopyThreads, [&] { gather_rows_kernel<Unit, int64_t>(copy); });
    } else {
      launch(grid, kCopyThreads, [&] { gather_rows_kernel<Unit, int32_t>(copy); });
    }
  });
  emulator::write("out", out);
}

void sum_rows(bool scan, std::vector<collm::ErrorRecord>& errors) {
  const auto grad = read<char>("grad");
  const auto index64 = read<int64_t>("index64"), order = read<int64_t>("order");
  const auto index32 = read<int32_t>("index32");
  Sum sum{};
  sum.grad = grad.data();
  sum.split = integer("split");
  sum.outer = integer("outer");
  sum.inner = integer("inner");
  sum.column = integer("column");
  sum.index = index32.empty() ? static_cast<const void*>(index64.data()) : index32.data();
  sum.order = order.data();
  sum.places = integer("places");
  sum.num_rows = integer("num_rows");
  sum.columns = integer("columns");
  sum.vector = integer("vector") != 0;
  sum.bad = &errors[1];
  with_value([&](auto v) {
    using Value = decltype(v);
    auto out = poisoned<Value>(static_cast<size_t>(sum.num_rows * sum.columns));
    sum.out = out.data();
    const dim3 grid(std::max<unsigned>(1, static_cast<unsigned>(sum.num_rows)),
                    divided_up(sum.columns, kSumThreads * Columns<Value>::kWidth));
    if (scan && index32.empty()) {
      launch(grid, kSumThreads, [&] { scatter_scan_kernel<Value, int64_t>(sum); });
    } else if (scan) {
      launch(grid, kSumThreads, [&] { scatter_scan_kernel<Value, int32_t>(sum); });
    } else if (index32.empty()) {
      launch(grid, kSumThreads, [&] { scatter_sorted_kernel<Value, int64_t>(sum); });
    } else {
      launch(grid, kSumThreads, [&] { scatter_sorted_kernel<Value, int32_t>(sum); });
    }
    emulator::write("out", out);
  });
}

}  // namespace

int main() {
  emulator::order = static_cast<int>(integer("thread_order"));
  std::vector<collm::ErrorRecord> errors(2);
  switch (integer("kernel")) {
    case 0:
      copy_rows(true, errors);
      break;
    case 1:
      copy_rows(false, errors);
      break;
    case 2:
      sum_rows(true, errors);
      break;
    default:
      sum_rows(false, errors);
  }
  emulator::write("errors", errors);
}
