# In the place of CMake's module where a Python module is made for another system: what to compile for
# is not asked of an interpreter, but said by tools/wheels.py.
#
# NATTEN_PYTHON_INTERPRETER  a Python that runs here, which has nanobind and jaxlib
# NATTEN_PYTHON_VERSION      such as 3.11, of the module
# NATTEN_PYTHON_HEADERS      folder that holds Python.h and pyconfig.h
# NATTEN_PYTHON_SUFFIX       what follows the module's name, such as .abi3.so
# NATTEN_PYTHON_STABLE_ABI   whether the module is for the stable ABI
# NATTEN_PYTHON_LIBRARY      import library of Python's DLL, on Windows

if(APPLE) # zig makes no bundles. Python's names are found when the module is loaded.
  set(CMAKE_SHARED_MODULE_CREATE_CXX_FLAGS "-shared -undefined dynamic_lookup")
endif()

set(Python_FOUND TRUE)
set(Python_VERSION ${NATTEN_PYTHON_VERSION})
set(Python_EXECUTABLE ${NATTEN_PYTHON_INTERPRETER})
set(Python_INTERPRETER_ID Python)
set(Python_INCLUDE_DIRS ${NATTEN_PYTHON_HEADERS})
set(NB_SUFFIX ${NATTEN_PYTHON_SUFFIX})
set(NB_SUFFIX_S ${NATTEN_PYTHON_SUFFIX})

add_executable(Python::Interpreter IMPORTED)
set_target_properties(Python::Interpreter PROPERTIES IMPORTED_LOCATION "${Python_EXECUTABLE}")
set(modules Module)
if(NATTEN_PYTHON_STABLE_ABI)
  list(APPEND modules SABIModule)
endif()
foreach(module IN LISTS modules)
  add_library(Python::${module} INTERFACE IMPORTED)
  target_include_directories(Python::${module} INTERFACE ${Python_INCLUDE_DIRS})
  target_link_libraries(Python::${module} INTERFACE ${NATTEN_PYTHON_LIBRARY})
endforeach()
