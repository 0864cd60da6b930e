// Host half of device_error.cuh: one pinned record for each rule, raised as the rule's sentence once it is seen.
//
// A record becomes visible when its kernel has run. It is raised by the next collm_fast op on CUDA tensors, and by
// collm_fast::check_device_errors, which Python calls where it synchronises anyway. Nothing waits for a device until
// a record says that something is wrong.
//
//     ErrorRecord* record = error_record("embed_inject: expected token_ids in [0, ");   // once, in the launcher
//     raise_device_errors();                                                            // at the entry of each op
//     -> "embed_inject: expected token_ids in [0, 32000), got 32007"
#pragma once

#include <cstdint>
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
  uint64_t devices = 0;  // bit d: a kernel on device d was given a record
};

// `inline` with default visibility: one table for all families of the library.
inline ErrorTable& error_table() {
  static ErrorTable* table = new ErrorTable;  // never destroyed: a kernel may still report while the process ends
  return *table;
}

// The record of a rule for a kernel on the current device. `rule` is a literal that ends where the limit follows.
inline ErrorRecord* error_record(const char* rule) {
  ErrorTable& table = error_table();
  const std::lock_guard<std::mutex> lock(table.mutex);
  int device = 0;
  STD_CUDA_CHECK(cudaGetDevice(&device));
  table.devices |= uint64_t{1} << (device % 64);
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

// Waits for every device whose kernels were given a record; touches no other, and no driver where there is none.
inline void wait_for_reports(const ErrorTable& table) {
  if (table.devices == 0) {
    return;
  }
  int before = 0;
  STD_CUDA_CHECK(cudaGetDevice(&before));
  for (int device = 0; device < 64; ++device) {
    if ((table.devices >> device & 1) != 0 && cudaSetDevice(device) == cudaSuccess) {
      // A failed wait is the next CUDA call's to tell; the sentence here says why it failed.
      static_cast<void>(cudaDeviceSynchronize());
    }
  }
  STD_CUDA_CHECK(cudaSetDevice(before));
}

// Raises the first record that a kernel has filled. One fault raises once and with its own number: kernels that read
// the same bad value may still be under way, so the devices are waited for before the record is read, and all records
// are cleared.
inline void raise_device_errors(bool synchronize = false) {
  ErrorTable& table = error_table();
  const std::lock_guard<std::mutex> lock(table.mutex);
  if (synchronize) {
    wait_for_reports(table);
  }
  for (int i = 0; i < table.count; ++i) {
    volatile ErrorRecord* record = table.records + i;
    if (record->raised == 0) {
      continue;
    }
    wait_for_reports(table);
    const long long value = record->value, limit = record->limit;
    std::memset(table.records, 0, sizeof(ErrorRecord) * ErrorTable::kRules);
    throw std::invalid_argument(table.rules[i] + std::to_string(limit) + "), got " + std::to_string(value));
  }
}

}  // namespace collm
