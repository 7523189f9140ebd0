# The CUDA kernels, a second target of the same library, where CASVIT_NVCC names a compiler that works.
# One object with machine code for each architecture and PTX for later ones, and the static runtime: no
# library of CUDA is needed to load it.
set(CASVIT_CUDA_ARCHITECTURES sm_80 sm_90a sm_100 sm_120 compute_80)

# Sets CUDA_SOURCES and CUDA_LIBRARIES, to nothing where there are no such kernels.
function(find_cuda_kernels)
  set(CUDA_SOURCES "" PARENT_SCOPE)
  set(CUDA_LIBRARIES "" PARENT_SCOPE)
  if(NOT CASVIT_NVCC)
    message(NOTICE "casvit_kernels: building without CUDA kernels: no nvcc was found "
                   "(CUDA_HOME names its folder; 'make cuda' installs one)")
    return()
  endif()
  get_filename_component(home ${CASVIT_NVCC} DIRECTORY)
  get_filename_component(home ${home} DIRECTORY)
  find_library(runtime NAMES libcudart_static.a HINTS ${home}/lib64 ${home}/lib ${home}/targets/x86_64-linux/lib
               NO_CACHE NO_DEFAULT_PATH)
  # What this nvcc knows of the list; a trial of each, since it may lack a host compiler, too, or be too
  # old for what the sources use: they must not take the CPU's kernels with them.
  set(try ${CMAKE_CURRENT_BINARY_DIR}/try.cu)
  file(WRITE ${try} "#include <cuda_runtime.h>\nstatic_assert(__is_same(int, int));\n"
                    "__global__ void nothing(const __grid_constant__ int of) { if constexpr (sizeof(of) == 0) return; }\n")
  set(codes)
  set(names)
  set(reason "libcudart_static.a is not beside it")
  foreach(name IN LISTS CASVIT_CUDA_ARCHITECTURES)
    if(runtime)
      string(REGEX REPLACE "^[a-z]+_" "" number ${name})
      execute_process(COMMAND ${CASVIT_NVCC} -ccbin ${CMAKE_CXX_COMPILER} -std=c++17
                              -gencode arch=compute_${number},code=${name} -c ${try} -o ${try}.o
                      RESULT_VARIABLE failed ERROR_VARIABLE reason OUTPUT_QUIET)
      if(NOT failed)
        list(APPEND codes -gencode arch=compute_${number},code=${name})
        list(APPEND names ${name})
      endif()
    endif()
  endforeach()
  if(NOT names)
    string(STRIP "${reason}" reason)
    string(REGEX REPLACE "\n.*" "" reason "${reason}")
    message(NOTICE "casvit_kernels: building without CUDA kernels: ${CASVIT_NVCC} cannot be used: ${reason}")
    if(CASVIT_REQUIRE_NATIVE)
      message(FATAL_ERROR "CUDA kernels are required where nvcc is")
    endif()
    return()
  endif()
  list(JOIN names "," list)
  set(sources bindings/cuda.cpp bindings/cuda_backward.cpp)
  foreach(unit mixer backward)
    set(source ${CMAKE_CURRENT_SOURCE_DIR}/cuda/${unit}.cu)
    set(object ${CMAKE_CURRENT_BINARY_DIR}/cuda_${unit}.o)
    add_custom_command(
      OUTPUT ${object}
      COMMAND ${CASVIT_NVCC} -ccbin ${CMAKE_CXX_COMPILER} -std=c++17 -O3 ${codes}
              "-DCASVIT_CUDA_NAMES=\"${list}\"" -I${CMAKE_CURRENT_SOURCE_DIR}
              -Xcompiler -fPIC,-fvisibility=hidden -MD -MF ${object}.d -MT ${object}
              -c ${source} -o ${object}
      DEPENDS ${source}
      DEPFILE ${object}.d
      VERBATIM)
    list(APPEND sources ${object})
    set_source_files_properties(${object} PROPERTIES EXTERNAL_OBJECT ON GENERATED ON)
  endforeach()
  set(CUDA_SOURCES ${sources} PARENT_SCOPE)
  set(CUDA_LIBRARIES ${runtime} dl rt pthread PARENT_SCOPE)
endfunction()
