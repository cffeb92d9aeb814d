// lora_kernels._C: importing it registers the ops of the other files; the module itself holds build
// information and the control of the instruction set.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <string>
#include <vector>

#include "lora_kernels/isa.h"

namespace py = pybind11;
namespace lk = lora_kernels;

namespace {

#ifndef LK_BUILD_CUDA_ARCHS
#define LK_BUILD_CUDA_ARCHS ""
#endif

std::vector<std::string> tiers(bool (*accept)(lk::Isa)) {
  std::vector<std::string> names;
  for (int i = lk::kIsaCount - 1; i >= 0; --i) {
    const auto isa = static_cast<lk::Isa>(i);
    if (accept(isa)) names.emplace_back(lk::isa_name(isa));
  }
  return names;
}

py::dict build_info() {
  py::dict info;
  info["compiler"] = LK_BUILD_COMPILER;
  info["flags"] = LK_BUILD_FLAGS;
  info["torch"] = LK_BUILD_TORCH;
  info["isas"] = tiers(lk::isa_compiled);
  info["cuda_archs"] = LK_BUILD_CUDA_ARCHS;
  return info;
}

void set_isa(const std::string& name) {
  lk::Isa isa;
  if (!lk::parse_isa(name.c_str(), &isa) || !lk::isa_compiled(isa)) {
    std::string text = "isa: got '" + name + "', expected one of";
    for (const std::string& n : tiers(lk::isa_compiled)) text += " " + n;
    throw py::value_error(text);
  }
  if (!lk::set_for_testing(isa)) {
    throw py::value_error("isa: " + name + " needs " + lk::tier_features(isa) +
                          ", which this machine does not offer");
  }
}

}  // namespace

PYBIND11_MODULE(_C, m) {
  m.def("build_info", build_info,
        "What the extension was built with: compiler, flags, torch, isas, cuda_archs "
        "(empty where the CUDA kernels are not linked).");
  m.def(
      "isas", [] { return tiers(lk::isa_usable); },
      "Instruction-set tiers usable on this machine, best first.");
  m.def("current_isa", [] { return std::string(lk::isa_name(lk::current())); });
  m.def("set_isa", set_isa, py::arg("name"),
        "Use another tier, process-wide. ValueError where it cannot run here.");
}
