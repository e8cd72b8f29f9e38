// The Python module fastres._C: importing it registers the ops of namespace fastres_cpu.
#include <Python.h>

#include <string>

#include "common.h"
#include "isa.h"

namespace {

// same_attributes(modules, types, dicts, views, expected): whether every module still has its type and its __dict__, and the
// dictionaries `views` hold just the keys and values of `expected`, the same objects in the same order. All are tuples.
PyObject* same_attributes(PyObject*, PyObject* args) {
  PyObject *modules, *types, *dicts, *views, *expected;
  if (!PyArg_ParseTuple(args, "O!O!O!O!O!", &PyTuple_Type, &modules, &PyTuple_Type, &types, &PyTuple_Type, &dicts,
                        &PyTuple_Type, &views, &PyTuple_Type, &expected)) {
    return nullptr;
  }
  const Py_ssize_t count = PyTuple_Size(modules), known = PyTuple_Size(expected);
  if (PyTuple_Size(types) != count || PyTuple_Size(dicts) != count) Py_RETURN_FALSE;
  for (Py_ssize_t i = 0; i < count; ++i) {
    PyObject* module = PyTuple_GetItem(modules, i);
    if (reinterpret_cast<PyObject*>(Py_TYPE(module)) != PyTuple_GetItem(types, i)) Py_RETURN_FALSE;
    PyObject* dict = PyObject_GenericGetDict(module, nullptr);
    if (dict == nullptr) return nullptr;
    Py_DECREF(dict);  // the module keeps it
    if (dict != PyTuple_GetItem(dicts, i)) Py_RETURN_FALSE;
  }
  Py_ssize_t next = 0;
  for (Py_ssize_t i = 0; i < PyTuple_Size(views); ++i) {
    PyObject *view = PyTuple_GetItem(views, i), *key, *value;
    if (!PyDict_Check(view)) Py_RETURN_FALSE;
    if (!PyDict_CheckExact(view) && PyDict_Size(view) > 1) Py_RETURN_FALSE;  // an OrderedDict has its order elsewhere
    Py_ssize_t position = 0;
    while (PyDict_Next(view, &position, &key, &value)) {
      if (next + 2 > known || PyTuple_GetItem(expected, next) != key || PyTuple_GetItem(expected, next + 1) != value) {
        Py_RETURN_FALSE;
      }
      next += 2;
    }
  }
  if (next != known) Py_RETURN_FALSE;
  Py_RETURN_TRUE;
}

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
  static PyMethodDef methods[] = {{"same_attributes", same_attributes, METH_VARARGS, nullptr},
                                  {nullptr, nullptr, 0, nullptr}};
  static struct PyModuleDef definition = {
      PyModuleDef_HEAD_INIT, "_C", nullptr, -1, methods, nullptr, nullptr, nullptr, nullptr};
  return PyModule_Create(&definition);
}
