// How a kernel says that a value it read is out of range: a record in memory that host and device both see.
//
// Device code only; the host half, which turns a record into the sentence, is device_error.h. A kernel that finds a
// bad value reports it, reads nothing through it, and goes on: no step waits for the answer.
#pragma once

#include <cstdint>

namespace collm {

struct ErrorRecord {
  long long raised;  // 0 until a kernel reports
  long long value;
  long long limit;
};

// Plain stores: threads that race all carry a value that is truly bad, and `raised` is stored last. The host waits for
// the device before it reads the rest, so value and limit are those of one launch.
__device__ __forceinline__ void report(ErrorRecord* record, long long value, long long limit) {
  volatile ErrorRecord* out = record;
  out->value = value;
  out->limit = limit;
  __threadfence_system();
  out->raised = 1;
}

// Whether 0 <= value < limit; reports where it is not.
__device__ __forceinline__ bool in_range(long long value, long long limit, ErrorRecord* record) {
  if (static_cast<unsigned long long>(value) < static_cast<unsigned long long>(limit)) {
    return true;
  }
  report(record, value, limit);
  return false;
}

}  // namespace collm
