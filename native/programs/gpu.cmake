# A GPU backend of llama.cpp as a module, libggml-${GPU}.so, which llama.cpp's programs load because it lies beside them,
# and Python because tsconv/native/devices.py does. Its folder in llama.cpp expects a function and options of ggml's own
# CMakeLists.txt.
function(ggml_add_backend_library backend)
    add_library(${backend} MODULE ${ARGN})
    target_compile_definitions(${backend} PRIVATE
        GGML_BACKEND_DL GGML_BACKEND_BUILD GGML_BACKEND_SHARED GGML_SHARED GGML_SCHED_MAX_COPIES=4)
    target_include_directories(${backend} PRIVATE "${LLAMA}/ggml/src")
    target_link_libraries(${backend} PRIVATE ggml-base)
    add_custom_target(gpu ALL DEPENDS ${backend})
    install(TARGETS ${backend} LIBRARY DESTINATION bin)
endfunction()

include("${LLAMA}/ggml/cmake/common.cmake")
set(GGML_NATIVE ON)
set(GGML_CUDA_FA ON)
set(GGML_CUDA_FA_QUANTS "q4_0-q4_0;q8_0-q8_0;f16-f16;bf16-bf16")
set(GGML_CUDA_GRAPHS ON)
set(GGML_CUDA_COMPRESSION_MODE size)
set(GGML_HIP_GRAPHS ON)
set(GGML_HIP_NO_VMM ON)
set(GGML_HIP_MMQ_MFMA ON)
if(GPU STREQUAL "vulkan")
    include_directories(BEFORE "${CMAKE_CURRENT_SOURCE_DIR}/../compat")
endif()
add_subdirectory("${LLAMA}/ggml/src/ggml-${GPU}" ggml-${GPU})
