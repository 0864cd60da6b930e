// Stands for torch's header of this name in device_error_main.cpp.
#pragma once

#define STD_CUDA_CHECK(call) static_cast<void>(call)
