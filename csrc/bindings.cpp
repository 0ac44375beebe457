// The Python module grpo_fast._C. Pointers and streams come as integers and CUDA's error codes go back, so nothing here
// depends on torch.
#include <pybind11/pybind11.h>

#include "fill.cuh"

PYBIND11_MODULE(_C, m) {
  m.attr("architectures") = GRPO_FAST_ARCHITECTURES;  // what the build compiled for, as "80 90a 100+PTX"
  m.attr("cuda_version") = GRPO_FAST_CUDA_VERSION;    // of nvcc, as "13.0"
  m.def("error_string", [](int code) { return cudaGetErrorString(static_cast<cudaError_t>(code)); });
  m.def("fill", [](uintptr_t out, int64_t numel, float value, uintptr_t stream) {
    return static_cast<int>(
        grpo_fast::fill(reinterpret_cast<float*>(out), numel, value, reinterpret_cast<cudaStream_t>(stream)));
  });
}
