# libtsffn-cuda.so: the FFN on a CUDA device. Nothing else of the package depends on it: the backend opens it at run time
# where it is asked to.
set(TSFFN_CUDA AUTO CACHE STRING "build the CUDA module: AUTO (in a package, where a CUDA compiler is found), ON, OFF")
option(TSFFN_CUDA_STRICT "a register that a kernel spills to memory is an error" OFF)

# What the module is made of beside the kernels: C, without CUDA's headers.
set(cuda_dir "${PROJECT_SOURCE_DIR}/src/cuda")
set(TSFFN_CUDA_C "${PROJECT_SOURCE_DIR}/src/error.c" "${cuda_dir}/module.c" "${cuda_dir}/layers.c" "${cuda_dir}/queue.c"
    "${cuda_dir}/call.c" "${cuda_dir}/prefill.c" "${cuda_dir}/stream.c" "${cuda_dir}/repack.c")
set(TSFFN_CUDA_KERNELS "${cuda_dir}/runtime.cu" "${cuda_dir}/predictor.cu" "${cuda_dir}/neurons.cu"
    "${cuda_dir}/down.cu" "${cuda_dir}/prefill.cu")

if(TSFFN_CUDA STREQUAL "OFF" OR (TSFFN_CUDA STREQUAL "AUTO" AND NOT SKBUILD))
    message(STATUS "CUDA module: not built (TSFFN_CUDA=${TSFFN_CUDA})")
    return()
endif()
set(CMAKE_CUDA_ARCHITECTURES 75-real)
include(CheckLanguage)
check_language(CUDA)
if(NOT CMAKE_CUDA_COMPILER)
    if(TSFFN_CUDA STREQUAL "ON")
        message(FATAL_ERROR "CUDA module: TSFFN_CUDA=ON, and no CUDA compiler found: pip install nvidia-cuda-nvcc "
            "nvidia-cuda-cccl, or set CMAKE_CUDA_COMPILER")
    endif()
    message(STATUS "CUDA module: not built (no CUDA compiler)")
    return()
endif()
enable_language(CUDA)
if(CMAKE_CUDA_COMPILER_VERSION VERSION_LESS 11.8) # cudaLaunchKernelEx
    if(TSFFN_CUDA STREQUAL "ON")
        message(FATAL_ERROR "CUDA module: expected CUDA 11.8 or later, found ${CMAKE_CUDA_COMPILER_VERSION}")
    endif()
    message(STATUS "CUDA module: not built (CUDA ${CMAKE_CUDA_COMPILER_VERSION} is older than 11.8)")
    return()
endif()
# Turing to Blackwell; PTX of the last for what comes after.
set(capabilities 75-real 80-real 86-real 89-real 90-real 100-real 120)
if(CMAKE_CUDA_COMPILER_VERSION VERSION_LESS 12.8)
    set(capabilities 75-real 80-real 86-real 89-real 90)
endif()
message(STATUS "CUDA module: built by CUDA ${CMAKE_CUDA_COMPILER_VERSION} for ${capabilities}")

add_library(tsffn-cuda MODULE ${TSFFN_CUDA_C} ${TSFFN_CUDA_KERNELS})
# -fmad=false: products and sums are contracted where the source says so, and nowhere else: the same bits everywhere.
target_compile_options(tsffn-cuda PRIVATE
    "$<$<COMPILE_LANGUAGE:CUDA>:-fmad=false;-Xcompiler=-fvisibility=hidden,-Wall,-Wextra>")
if(TSFFN_CUDA_STRICT)
    target_compile_options(tsffn-cuda PRIVATE "$<$<COMPILE_LANGUAGE:CUDA>:-Xptxas=-warn-spills,-Werror>")
endif()
set_target_properties(tsffn-cuda PROPERTIES CUDA_ARCHITECTURES "${capabilities}" CUDA_STANDARD 17
    CUDA_RUNTIME_LIBRARY Static SKIP_BUILD_RPATH ON INSTALL_RPATH "")
# The runtime inside stays inside: llama.cpp may bring another one.
target_link_options(tsffn-cuda PRIVATE -Wl,--exclude-libs,ALL)
target_link_libraries(tsffn-cuda PRIVATE ${CMAKE_DL_LIBS})
if(NOT TSFFN_KERNELS_ONLY)
    install(TARGETS tsffn-cuda LIBRARY DESTINATION tsconv/lib)
endif()
