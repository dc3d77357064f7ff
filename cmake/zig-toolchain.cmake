# Compiles for another system with the PyPI package ziglang: clang, and the headers and libraries of
# many systems. NATTEN_ZIG_TARGET names one, such as aarch64-macos, x86_64-windows-gnu,
# x86_64-linux-musl or aarch64-linux-gnu.2.28; NATTEN_ZIG_PYTHON is the Python that has the package.

set(NATTEN_ZIG_TARGET "" CACHE STRING "What zig compiles for")
set(NATTEN_ZIG_PYTHON python3 CACHE STRING "The Python that has ziglang")
list(APPEND CMAKE_TRY_COMPILE_PLATFORM_VARIABLES NATTEN_ZIG_TARGET NATTEN_ZIG_PYTHON)
if(NOT NATTEN_ZIG_TARGET MATCHES "^([a-z0-9_]+)-(linux|macos|windows)([.-]|$)")
  message(FATAL_ERROR "NATTEN_ZIG_TARGET: got \"${NATTEN_ZIG_TARGET}\"; must be a processor and linux, "
    "macos or windows, such as aarch64-macos")
endif()
set(CMAKE_SYSTEM_PROCESSOR ${CMAKE_MATCH_1})
set(system_of_linux Linux)
set(system_of_macos Darwin)
set(system_of_windows Windows)
set(CMAKE_SYSTEM_NAME ${system_of_${CMAKE_MATCH_2}})

set(zig ${NATTEN_ZIG_PYTHON} -m ziglang)
set(CMAKE_C_COMPILER ${zig} cc -target ${NATTEN_ZIG_TARGET})
set(CMAKE_CXX_COMPILER ${zig} c++ -target ${NATTEN_ZIG_TARGET})
# These are single programs to CMake, so what it would run is written out.
list(JOIN zig " " zig)
foreach(language C CXX)
  set(CMAKE_${language}_ARCHIVE_CREATE "${zig} ar qc <TARGET> <OBJECTS>")
  set(CMAKE_${language}_ARCHIVE_APPEND "${zig} ar q <TARGET> <OBJECTS>")
  set(CMAKE_${language}_ARCHIVE_FINISH "${zig} ranlib <TARGET>")
endforeach()
# CMake wants these, for installing on macOS and for resources on Windows, of which there are none.
set(CMAKE_INSTALL_NAME_TOOL true)
set(CMAKE_RC_COMPILER true)

# CMake's tries only compile, and what it would find out by linking is said here: zig makes a system's
# libraries, in minutes, when it first links for it.
set(CMAKE_TRY_COMPILE_TARGET_TYPE STATIC_LIBRARY)
execute_process(COMMAND ${NATTEN_ZIG_PYTHON} -m ziglang c++ --version OUTPUT_VARIABLE version)
string(REGEX MATCH "[0-9]+\\.[0-9.]+" version "${version}")
foreach(language C CXX)
  set(CMAKE_${language}_COMPILER_ID_RUN TRUE)
  set(CMAKE_${language}_COMPILER_ID Clang)
  set(CMAKE_${language}_COMPILER_VERSION ${version})
  set(CMAKE_${language}_COMPILER_FRONTEND_VARIANT GNU)
  set(CMAKE_${language}_STANDARD_COMPUTED_DEFAULT 17)
  set(CMAKE_${language}_EXTENSIONS_COMPUTED_DEFAULT ON)
endforeach()
if(CMAKE_SYSTEM_NAME STREQUAL Linux)
  set(CMAKE_EXECUTABLE_FORMAT ELF) # or installing cannot change where libraries are looked for
endif()

# Nothing that is installed here is for that system.
set(CMAKE_FIND_ROOT_PATH_MODE_LIBRARY ONLY)
set(CMAKE_FIND_ROOT_PATH_MODE_INCLUDE ONLY)
set(CMAKE_FIND_ROOT_PATH_MODE_PACKAGE ONLY)
