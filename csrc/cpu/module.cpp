// The Python module fastres._C: importing it registers the ops of namespace fastres_cpu.
#include <Python.h>

#include <string>

#include "common.h"
#include "isa.h"

namespace {
std::string isa_in_use() { return fastres::isa_name(fastres::isa()); }
}  // namespace

STABLE_TORCH_LIBRARY(fastres_cpu, m) { m.def("isa() -> str"); }

STABLE_TORCH_LIBRARY_IMPL(fastres_cpu, CompositeExplicitAutograd, m) { m.impl("isa", TORCH_BOX(&isa_in_use)); }

extern "C" PyObject* PyInit__C(void) {
  try {
    fastres::isa();
  } catch (const std::exception& e) {
    PyErr_SetString(PyExc_ImportError, e.what());
    return nullptr;
  }
  static struct PyModuleDef definition = {
      PyModuleDef_HEAD_INIT, "_C", nullptr, -1, nullptr, nullptr, nullptr, nullptr, nullptr};
  return PyModule_Create(&definition);
}
