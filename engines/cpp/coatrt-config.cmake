# find_package(coatrt [COMPONENTS ort trt c sign]): the library is compiled from source as part of your build.
#
#   coatrt::coatrt   Bundle, Session, Tokenizer over ONNX Runtime, on the CPU and on a GPU
#   component trt    also TensorRT or TensorRT-RTX: your SDK's include directory in coatrt_TRT_INCLUDE, its library in
#                    coatrt_TRT_LIBRARY; CUDA's runtime through find_package(CUDAToolkit)
#   component sign   requires OpenSSL's libcrypto (1.1.1 or later), which checks signatures of bundles; it is used
#                    where it is found without this component too, unless coatrt_OPENSSL=OFF
#   component c      also the C functions of coatrt/coatrt.h
#
# Where the headers come from: coatrt-headers.cmake.
cmake_minimum_required(VERSION 3.16...3.31)
set(_root "${CMAKE_CURRENT_LIST_DIR}")

function(_coatrt_refuse reason)
  set(coatrt_FOUND FALSE PARENT_SCOPE)
  set(coatrt_NOT_FOUND_MESSAGE "${reason}" PARENT_SCOPE)
endfunction()

if(TARGET coatrt::coatrt)
  return()
endif()
foreach(_component IN LISTS coatrt_FIND_COMPONENTS)
  if(NOT _component MATCHES "^(ort|trt|sign|c)$" AND coatrt_FIND_REQUIRED_${_component})
    _coatrt_refuse("no component ${_component}; allowed: ort, trt, sign, c")
    return()
  endif()
endforeach()

include("${CMAKE_CURRENT_LIST_DIR}/coatrt-headers.cmake")
if(NOT TARGET coatrt::nlohmann_json)
  _coatrt_refuse("nlohmann/json.hpp is not found; install nlohmann-json, or name its directory in CMAKE_PREFIX_PATH, or set coatrt_FETCH_HEADERS=ON")
  return()
endif()
if(NOT TARGET coatrt::onnxruntime)
  _coatrt_refuse("onnxruntime_c_api.h is not found; install ONNX Runtime's headers, or name their directory in CMAKE_PREFIX_PATH, or set coatrt_FETCH_HEADERS=ON")
  return()
endif()
find_package(Threads REQUIRED)

# Where there is OpenSSL, it computes SHA-256, six times as fast as portable code on a processor with instructions for it,
# and checks signatures.
option(coatrt_OPENSSL "Use OpenSSL's libcrypto where CMake finds it" ON)
if(coatrt_OPENSSL OR "sign" IN_LIST coatrt_FIND_COMPONENTS)
  find_package(OpenSSL 1.1.1 QUIET COMPONENTS Crypto)
endif()
if(TARGET OpenSSL::Crypto AND (coatrt_OPENSSL OR "sign" IN_LIST coatrt_FIND_COMPONENTS))
  set(_hashes openssl)
elseif("sign" IN_LIST coatrt_FIND_COMPONENTS)
  _coatrt_refuse("component sign needs OpenSSL's headers and libcrypto; install libssl-dev")
  return()
else()
  set(_hashes portable)
  if(NOT coatrt_FIND_QUIETLY)
    message(STATUS "coatrt: hashes files without OpenSSL, more slowly; install libssl-dev for it")
  endif()
endif()

file(GLOB _sources "${_root}/src/*.cpp" "${_root}/src/cuda/*.cpp" "${_root}/src/ort/*.cpp" "${_root}/src/tokenizer/*.cpp"
  "${_root}/src/${_hashes}/*.cpp")
add_library(coatrt STATIC EXCLUDE_FROM_ALL ${_sources})
add_library(coatrt::coatrt ALIAS coatrt)
target_compile_features(coatrt PUBLIC cxx_std_17)
set_target_properties(coatrt PROPERTIES POSITION_INDEPENDENT_CODE ON CXX_EXTENSIONS OFF)
target_include_directories(coatrt PUBLIC "${_root}/include" PRIVATE "${_root}/src")
# Their directories and not the targets, which a directory that links coatrt::coatrt need not know.
target_include_directories(coatrt SYSTEM PRIVATE
  $<TARGET_PROPERTY:coatrt::nlohmann_json,INTERFACE_INCLUDE_DIRECTORIES>
  $<TARGET_PROPERTY:coatrt::onnxruntime,INTERFACE_INCLUDE_DIRECTORIES>)
target_link_libraries(coatrt PUBLIC Threads::Threads ${CMAKE_DL_LIBS})
if(_hashes STREQUAL openssl)
  target_compile_definitions(coatrt PRIVATE COATRT_OPENSSL=1)
  target_link_libraries(coatrt PUBLIC OpenSSL::Crypto)
endif()

# pip's ONNX Runtime, where it lies beside this package: the default at run time.
file(GLOB _library "${_root}/../../../onnxruntime/capi/libonnxruntime.so.*")
if(_library)
  list(GET _library 0 _library)
  get_filename_component(_library "${_library}" REALPATH)
  target_compile_definitions(coatrt PRIVATE "COATRT_ONNXRUNTIME_LIBRARY=\"${_library}\"")
endif()

if("trt" IN_LIST coatrt_FIND_COMPONENTS)
  find_path(coatrt_TRT_INCLUDE NvInferRuntime.h)
  find_library(coatrt_TRT_LIBRARY NAMES tensorrt_rtx nvinfer)
  find_package(CUDAToolkit QUIET)
  if(NOT coatrt_TRT_INCLUDE OR NOT coatrt_TRT_LIBRARY OR NOT TARGET CUDA::cudart)
    _coatrt_refuse("component trt needs NvInferRuntime.h (coatrt_TRT_INCLUDE), its library (coatrt_TRT_LIBRARY) and CUDA's runtime; take them from the SDK that built the engines")
    return()
  endif()
  target_sources(coatrt PRIVATE "${_root}/src/trt/decoder.cpp" "${_root}/src/trt/engine.cpp")
  target_include_directories(coatrt SYSTEM PRIVATE "${coatrt_TRT_INCLUDE}")
  target_compile_definitions(coatrt PRIVATE COATRT_TRT=1)
  target_link_libraries(coatrt PUBLIC "${coatrt_TRT_LIBRARY}" CUDA::cudart)
endif()
if("c" IN_LIST coatrt_FIND_COMPONENTS)
  target_sources(coatrt PRIVATE "${_root}/src/c/coatrt.cpp")
endif()
