// Host half of device_error.cuh: one pinned record for each rule, raised as the rule's sentence once it is seen.
//
// A record becomes visible when its kernel has run. It is raised by the next collm_fast op on CUDA tensors, and by
// collm_fast::check_device_errors, which Python calls where it synchronises anyway. Nothing here waits for the device.
//
//     ErrorRecord* record = error_record("embed_inject: expected token_ids in [0, ");   // once, in the launcher
//     raise_device_errors();                                                            // at the entry of each op
//     -> "embed_inject: expected token_ids in [0, 32000), got 32007"
#pragma once

#include <cstring>
#include <mutex>
#include <stdexcept>
#include <string>

#include <cuda_runtime.h>
#include <torch/csrc/stable/macros.h>

#include "device_error.cuh"

namespace collm {

struct ErrorTable {
  static constexpr int kRules = 32;
  std::mutex mutex;
  ErrorRecord* records = nullptr;
  std::string rules[kRules];
  int count = 0;
};

// `inline` with default visibility: one table for all families of the library.
inline ErrorTable& error_table() {
  static ErrorTable* table = new ErrorTable;  // never destroyed: a kernel may still report while the process ends
  return *table;
}

// The record of a rule, usable on every device. `rule` is a literal that ends where the limit follows.
inline ErrorRecord* error_record(const char* rule) {
  ErrorTable& table = error_table();
  const std::lock_guard<std::mutex> lock(table.mutex);
  if (table.records == nullptr) {
    void* memory = nullptr;
    STD_CUDA_CHECK(
        cudaHostAlloc(&memory, sizeof(ErrorRecord) * ErrorTable::kRules, cudaHostAllocPortable | cudaHostAllocMapped));
    std::memset(memory, 0, sizeof(ErrorRecord) * ErrorTable::kRules);
    table.records = static_cast<ErrorRecord*>(memory);
  }
  for (int i = 0; i < table.count; ++i) {
    if (table.rules[i] == rule) {
      return table.records + i;
    }
  }
  if (table.count == ErrorTable::kRules) {
    throw std::logic_error("device_error.h: more rules than records");
  }
  table.rules[table.count] = rule;
  return table.records + table.count++;
}

// Raises the first record that a kernel has filled, and clears it.
inline void raise_device_errors() {
  ErrorTable& table = error_table();
  const std::lock_guard<std::mutex> lock(table.mutex);
  for (int i = 0; i < table.count; ++i) {
    volatile ErrorRecord* record = table.records + i;
    if (record->raised != 0) {
      const long long value = record->value, limit = record->limit;
      record->raised = 0;
      throw std::invalid_argument(table.rules[i] + std::to_string(limit) + "), got " + std::to_string(value));
    }
  }
}

}  // namespace collm
