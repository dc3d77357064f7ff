find_program(NATTEN_NVCC nvcc REQUIRED)

# For the oldest architecture that there are kernels for; later ones run the same code.
natten_cuda_sources(cuda_sources unused)
set(ptx_files "")
foreach(source IN LISTS cuda_sources)
  get_filename_component(name ${source} NAME_WE)
  set(ptx ${CMAKE_CURRENT_BINARY_DIR}/ptx/${name}.ptx)
  add_custom_command(OUTPUT ${ptx}
    COMMAND ${CMAKE_COMMAND} -E make_directory ${CMAKE_CURRENT_BINARY_DIR}/ptx
    COMMAND ${NATTEN_NVCC} -ptx -arch=sm_80 -O3 -DNDEBUG -std=c++17 --expt-relaxed-constexpr
      -DNATTEN_STATIC_DEFINE -I ${PROJECT_SOURCE_DIR}/libnatten/src
      -I ${PROJECT_SOURCE_DIR}/libnatten/include -I ${PROJECT_BINARY_DIR}/libnatten/include
      -MD -MF ${ptx}.d -o ${ptx} ${source}
    DEPENDS ${source} DEPFILE ${ptx}.d
    COMMENT "PTX of ${name}" VERBATIM)
  list(APPEND ptx_files ${ptx})
endforeach()
add_custom_target(natten_ptx DEPENDS ${ptx_files})

add_executable(natten_ptx_tests
  attention_test.cpp
  borders_test.cpp
  cuda_fna_test.cpp
  cuda_gemm_test.cpp
  cuda_simt_test.cpp
  fused_test.cpp
  unfused_test.cpp
  ptx/block.cpp
  ptx/launcher.cpp
  ptx/memory.cpp
  ptx/mutation_test.cpp
  ptx/parser.cpp
  ptx/ptx_test.cpp
  ptx/warp.cpp)
# A function per instruction and type, each run once: to optimise them takes longer than all tests.
set_source_files_properties(ptx/ptx_test.cpp PROPERTIES COMPILE_OPTIONS -O0)
add_dependencies(natten_ptx_tests natten_ptx)
list(JOIN ptx_files ":" joined)
target_compile_definitions(natten_ptx_tests PRIVATE NATTEN_PTX_FILES="${joined}")
target_compile_options(natten_ptx_tests PRIVATE ${NATTEN_WARNINGS})
target_link_libraries(natten_ptx_tests PRIVATE natten::natten GTest::gtest_main)

# In as many processes as fill two cores evenly: each reads all of the PTX.
set(shards 8)
math(EXPR last "${shards} - 1")
foreach(shard RANGE ${last})
  add_test(NAME ptx_${shard} COMMAND natten_ptx_tests --gtest_brief=1
    --gtest_filter=Ptx*:*CudaFna.*:*CudaGemm.*:CudaFnaCounts.*:CudaGemmCounts.*:*CudaSimt.*:Registry/Unfused.*simt_ptx_*:Registry/*.*/fna_ptx_*)
  set_tests_properties(ptx_${shard} PROPERTIES
    ENVIRONMENT "GTEST_TOTAL_SHARDS=${shards};GTEST_SHARD_INDEX=${shard}")
endforeach()
