// The Python module hybridrl._C. Tensors arrive as integer addresses with their sizes: PyTorch is not linked, so one
// build serves every version of it. Checks of dtype, shape and device are the business of hybridrl/ops.
#include <pybind11/pybind11.h>

#include <stdexcept>
#include <string>

#include "gae.h"

namespace py = pybind11;
using namespace hybridrl;

namespace {

template <class T>
T* pointer(uintptr_t address) {
  return reinterpret_cast<T*>(address);
}

GaeArgs gae_args(uintptr_t rewards, uintptr_t values, uintptr_t mask, uintptr_t rows_begin, bool wide,
                 uintptr_t advantages, uintptr_t returns, int64_t rows, int64_t tokens, float gamma, float lam) {
  return {pointer<const float>(rewards), pointer<const float>(values), pointer<const float>(mask),
          {pointer<const void>(rows_begin), wide}, pointer<float>(advantages), pointer<float>(returns),
          rows, tokens, gamma, lam};
}

#ifdef HYBRIDRL_WITH_CUDA
void check(const char* error, const char* op) {
  if (error != nullptr) throw std::runtime_error(std::string("hybridrl::") + op + ": CUDA says: " + error);
}
#endif

}  // namespace

PYBIND11_MODULE(_C, m) {
  m.doc() = "Native kernels of hybridrl. Use them through hybridrl.ops, which checks what it passes.";
#ifdef HYBRIDRL_WITH_CUDA
  m.attr("cuda_built") = true;
  m.attr("cuda_archs") = HYBRIDRL_CUDA_ARCHS;
#else
  m.attr("cuda_built") = false;
  m.attr("cuda_archs") = "";
#endif

  m.def(
      "gae_cpu",
      [](uintptr_t rewards, uintptr_t values, uintptr_t mask, uintptr_t rows_begin, bool wide, uintptr_t advantages,
         uintptr_t returns, int64_t rows, int64_t tokens, float gamma, float lam, int threads) {
        const GaeArgs args = gae_args(rewards, values, mask, rows_begin, wide, advantages, returns, rows, tokens,
                                      gamma, lam);
        py::gil_scoped_release release;
        gae_cpu(args, threads);
      },
      py::arg("rewards"), py::arg("values"), py::arg("mask"), py::arg("rows_begin"), py::arg("wide"),
      py::arg("advantages"), py::arg("returns"), py::arg("rows"), py::arg("tokens"), py::arg("gamma"), py::arg("lam"),
      py::arg("threads"));
#ifdef HYBRIDRL_WITH_CUDA
  m.def(
      "gae_cuda",
      [](uintptr_t rewards, uintptr_t values, uintptr_t mask, uintptr_t rows_begin, bool wide, uintptr_t advantages,
         uintptr_t returns, int64_t rows, int64_t tokens, float gamma, float lam, uintptr_t stream) {
        check(gae_cuda(gae_args(rewards, values, mask, rows_begin, wide, advantages, returns, rows, tokens, gamma, lam),
                       pointer<void>(stream)),
              "gae");
      },
      py::arg("rewards"), py::arg("values"), py::arg("mask"), py::arg("rows_begin"), py::arg("wide"),
      py::arg("advantages"), py::arg("returns"), py::arg("rows"), py::arg("tokens"), py::arg("gamma"), py::arg("lam"),
      py::arg("stream"));
#endif
}
