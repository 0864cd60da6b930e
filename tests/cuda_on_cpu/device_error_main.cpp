// csrc/cuda/device_error.h, the host half of the reports, on a runtime that pretends to have four GPUs.
//
// A wait for a device runs what its kernels have still to do: they report the fault that another of them has already
// reported. test_device_error.py reads what was raised.
#include "emulator.h"

#include "cuda/device_error.h"

namespace {

int current = 0, calls = 0;
std::string waited;
std::function<void()> under_way = [] {};

}  // namespace

cudaError_t cudaHostAlloc(void** memory, std::size_t bytes, unsigned) {
  *memory = std::malloc(bytes);
  return cudaSuccess;
}
cudaError_t cudaGetDevice(int* device) {
  ++calls;
  *device = current;
  return cudaSuccess;
}
cudaError_t cudaSetDevice(int device) {
  ++calls;
  current = device;
  return cudaSuccess;
}
cudaError_t cudaDeviceSynchronize() {
  ++calls;
  waited += std::to_string(current);
  under_way();
  return cudaSuccess;
}

int main() {
  std::string log;
  const auto raise = [&](bool synchronize) {
    waited.clear();
    try {
      collm::raise_device_errors(synchronize);
      log += "nothing";
    } catch (const std::invalid_argument& error) {
      log += error.what();
    }
    log += " after " + waited + " on " + std::to_string(current) + "\n";
  };
  // Nothing ran: the runtime is not even asked.
  raise(true);
  log += std::to_string(calls) + " calls\n";
  current = 1;
  collm::ErrorRecord* a = collm::error_record("op: expected a in [0, ");
  current = 3;
  collm::ErrorRecord* b = collm::error_record("op: expected b in [0, ");
  current = 2;
  raise(false);
  raise(true);
  // The first report of a launch is seen while the rest of it, and the next launch, are under way.
  under_way = [&] {
    collm::report(a, 7, 4);
    collm::report(b, 9, 5);
  };
  a->raised = 1;
  raise(false);
  under_way = [] {};
  raise(true);
  collm::report(b, -1, 5);
  raise(false);
  raise(false);
  std::free(std::min(a, b));
  emulator::write("log", std::vector<char>(log.begin(), log.end()));
}
