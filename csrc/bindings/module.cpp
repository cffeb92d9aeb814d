// lora_kernels._C: importing it registers the ops of the other files; the module itself holds build
// information and the control of the instruction set and of the block sizes.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <string>
#include <vector>

#include "bindings/common.h"
#include "bindings/observers.h"
#include "lora_kernels/build_facts.h"
#include "lora_kernels/isa.h"
#include "lora_kernels/tuning.h"

namespace py = pybind11;
namespace lk = lora_kernels;

namespace {

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
  info["compiler"] = lk::build_facts::kCompiler;
  info["flags"] = lk::build_facts::kFlags;
  info["torch"] = lk::build_facts::kTorch;
  info["isas"] = tiers(lk::isa_compiled);
  info["cuda"] = lk::build_facts::kCuda;
  info["cuda_archs"] = lk::build_facts::kCudaArchs;
  info["without_cuda"] = lk::build_facts::kWithoutCuda;
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

py::dict as_dict(const lk::Tuning& tuning) {
  py::dict values;
  for (const lk::Knob& knob : lk::kKnobs) values[knob.name] = tuning.*knob.value;
  return values;
}

// Block sizes that had another name before; files made then are still read.
constexpr const char* kFormerNames[][2] = {{"cheap_depth", "nf4_k_tiles"},
                                           {"cheap_sum_bytes", "nf4_sum_bytes"},
                                           {"dear_depth", "dense_k_tiles"},
                                           {"dear_sum_bytes", "dense_sum_bytes"},
                                           {"block_strips", "block_panels"}};

const lk::Knob& knob_named(const py::handle& key) {
  py::object name = py::reinterpret_borrow<py::object>(key);
  for (const auto& [former, now] : kFormerNames)
    if (py::str(former).equal(key)) name = py::str(now);
  for (const lk::Knob& knob : lk::kKnobs)
    if (py::str(knob.name).equal(name)) return knob;
  std::string text = "tuning: got key " + std::string(py::repr(key)) + ", expected one of";
  for (const lk::Knob& knob : lk::kKnobs) text += std::string(" ") + knob.name;
  throw py::value_error(text);
}

int64_t value_for(const lk::Knob& knob, const py::handle& value) {
  const bool whole = py::isinstance<py::int_>(value) && !py::isinstance<py::bool_>(value);
  int overflow = 0;
  const int64_t v = whole ? PyLong_AsLongLongAndOverflow(value.ptr(), &overflow) : 0;
  if (whole && overflow == 0 && knob.takes(v)) return v;
  const std::string kind =
      knob.unit == 1 ? "an integer" : "a multiple of " + std::to_string(knob.unit);
  throw py::value_error(std::string(knob.name) + ": got " + std::string(py::repr(value)) +
                        ", expected " + kind + " from " + std::to_string(knob.least) + " to " +
                        std::to_string(knob.most));
}

void set_tuning(const py::dict& values) {
  lk::Tuning tuning = lk::tuning();
  for (const auto& [key, value] : values) {
    const lk::Knob& knob = knob_named(key);
    tuning.*knob.value = value_for(knob, value);
  }
  lk::set_tuning(tuning);
}

}  // namespace

PYBIND11_MODULE(_C, m) {
  m.def(
      "build_info", build_info,
      "What the extension was built with: compiler, flags, torch, isas; cuda (nvcc's version) and "
      "cuda_archs, or without_cuda: why the CUDA kernels are not linked.");
  m.def(
      "isas", [] { return tiers(lk::isa_usable); },
      "Instruction-set tiers usable on this machine, best first.");
  m.def("current_isa", [] { return std::string(lk::isa_name(lk::current())); });
  m.def("set_isa", set_isa, py::arg("name"),
        "Use another tier, process-wide. ValueError where it cannot run here.");
  m.def("l2_bytes", lk::l2_bytes, "Of a core of this machine; 0 where that is unknown.");
  m.def(
      "default_tuning", [](int64_t l2) { return as_dict(lk::default_tuning(l2)); }, py::arg("l2"),
      "Block sizes for an L2 cache of so many bytes, 0 being unknown.");
  m.def(
      "tuning", [] { return as_dict(lk::tuning()); },
      "The block sizes in use. They change no bit of a result.");
  m.def("set_tuning", set_tuning, py::arg("values"),
        "Use other block sizes, process-wide; those not named stay. ValueError, and no change, for "
        "a name or a value that does not fit.");
  m.def("set_observers", lk::set_observers, py::arg("count"),
        "How many blocks are open that force a backend or ask which one runs.");
  m.def(
      "fill_new_tensors", lk::fill_new_tensors, py::arg("on"),
      "Have torch fill what the CPU kernels write to, as its deterministic mode does: for tests.");
}
