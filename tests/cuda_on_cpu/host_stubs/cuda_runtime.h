// As much of CUDA's runtime as csrc/cuda/device_error.h calls, on the host; device_error_main.cpp defines the
// functions.
#pragma once

#include <cstddef>

enum cudaError_t { cudaSuccess = 0 };
constexpr unsigned cudaHostAllocPortable = 1, cudaHostAllocMapped = 2;

cudaError_t cudaHostAlloc(void** memory, std::size_t bytes, unsigned flags);
cudaError_t cudaGetDevice(int* device);
cudaError_t cudaSetDevice(int device);
cudaError_t cudaDeviceSynchronize();
