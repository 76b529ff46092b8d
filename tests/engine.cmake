# Tests and benchmarks of the model side of a rank (worker/engine.h and what it is made of).
if(NOT TARGET tandem_memory OR NOT TARGET tandem_attention OR NOT TARGET tandem_comm)
  return()
endif()
pkg_check_modules(JANSSON REQUIRED IMPORTED_TARGET jansson) # the one of worker/ is not seen here
set(TEST_DATA TEST_DATA="${CMAKE_CURRENT_SOURCE_DIR}/data")

add_library(tandem_engine_group STATIC engine_group.c)
target_link_libraries(tandem_engine_group PUBLIC tandem_engine Threads::Threads)

if(TANDEM_TESTS)
  tandem_check(shard tandem_engine)
  tandem_check(tuned tandem_engine)
  target_sources(check_tuned PRIVATE temp_dir.c)
  tandem_check(sample tandem_engine m)
  tandem_check(sample_options tandem_engine m)
  tandem_check(safetensors tandem_engine)
  tandem_check(model_config tandem_engine PkgConfig::JANSSON)
  tandem_check(engine tandem_engine_group PkgConfig::JANSSON m)
  if(TARGET check_engine)
    target_link_options(check_engine PRIVATE LINKER:--wrap=fallocate) # it fails in a test
  endif()
  tandem_check(engine_options tandem_engine_group m)
  tandem_check(engine_parts tandem_engine_group)
  tandem_check(engine_flights tandem_engine)
  tandem_check(engine_share tandem_engine_group)
  if(NOT TANDEM_SANITIZE) # has an allocator of its own
    tandem_check(engine_memory tandem_engine)
  endif()
  foreach(name safetensors model_config engine engine_options engine_parts engine_flights engine_share engine_memory)
    if(TARGET check_${name})
      target_compile_definitions(check_${name} PRIVATE ${TEST_DATA})
      target_sources(check_${name} PRIVATE temp_dir.c)
    endif()
  endforeach()

  tandem_check(gguf tandem_engine)
  target_sources(check_gguf PRIVATE gguf_build.c temp_dir.c)
  tandem_fuzz(gguf 300000 gguf_build.c tandem_engine)
  tandem_fuzz(safetensors 100000 tandem_engine)
  tandem_fuzz(model_config 30000 tandem_engine)

  add_executable(engine_run engine_run.c)
  target_link_libraries(engine_run PRIVATE tandem_engine_group PkgConfig::JANSSON)
  add_executable(quant_run quant_run.c)
  target_link_libraries(quant_run PRIVATE tandem_engine)
  # Debian's python3: one of another origin on PATH would not see python3-numpy
  add_test(NAME engine_reference
           COMMAND /usr/bin/python3 ${CMAKE_CURRENT_SOURCE_DIR}/reference.py --run $<TARGET_FILE:engine_run>
                   --quant-run $<TARGET_FILE:quant_run>)
  set_tests_properties(engine_reference PROPERTIES TIMEOUT 300 ENVIRONMENT
                       "${SANITIZER_ENV};OPENBLAS_NUM_THREADS=1")
endif()

if(TANDEM_BENCH)
  add_executable(bench_engine bench/bench_engine.c)
  target_link_libraries(bench_engine PRIVATE tandem_engine Threads::Threads)
endif()

# On a GPU; 77 where there is none. The plugin is loaded at run time, as by the worker.
if(TARGET backend_cuda)
  add_library(tandem_gpu_parts STATIC gpu/gpu_parts.c)
  target_link_libraries(tandem_gpu_parts PUBLIC tandem_engine tandem_comm_mpi CUDA::cudart_static Threads::Threads
                        ${CMAKE_DL_LIBS} m)
  if(TANDEM_TESTS)
    add_executable(check_engine_gpu gpu/check_engine_gpu.c gpu/engine_batches_gpu.c gpu/engine_options_gpu.c
                   gpu/engine_ways_gpu.c)
    target_link_libraries(check_engine_gpu PRIVATE tandem_gpu_parts)
    add_dependencies(check_engine_gpu backend_cuda)
    add_test(NAME engine_gpu COMMAND check_engine_gpu ${CMAKE_CURRENT_SOURCE_DIR}/data/demo-model)
    set_tests_properties(engine_gpu PROPERTIES SKIP_RETURN_CODE 77 TIMEOUT 600)
    add_executable(check_comm_gpu gpu/check_comm_gpu.c) # under mpirun, by hand: tests/README.md
    target_link_libraries(check_comm_gpu PRIVATE tandem_comm_cuda tandem_comm_mpi tandem_own Threads::Threads m)
  endif()
  if(TANDEM_BENCH)
    add_executable(bench_engine_gpu bench/bench_engine_gpu.c)
    target_link_libraries(bench_engine_gpu PRIVATE tandem_gpu_parts)
    add_dependencies(bench_engine_gpu backend_cuda)
    add_executable(bench_glu_gpu bench/bench_glu_gpu.cu ${PROJECT_SOURCE_DIR}/worker/cuda_rows.cu
                   $<TARGET_OBJECTS:tandem_glu_sm90>)
    tandem_cuda_options(bench_glu_gpu)
    set_target_properties(bench_glu_gpu PROPERTIES CUDA_ARCHITECTURES 90a-real)
    target_link_libraries(bench_glu_gpu PRIVATE tandem_own CUDA::cudart_static CUDA::cublasLt)
    add_executable(bench_comm_gpu bench/bench_comm_gpu.c)
    target_link_libraries(bench_comm_gpu PRIVATE tandem_comm_cuda tandem_comm_mpi tandem_own)
  endif()
endif()
