include(CMakeFindDependencyMacro)
find_dependency(natten)
include("${CMAKE_CURRENT_LIST_DIR}/hostTargets.cmake")
