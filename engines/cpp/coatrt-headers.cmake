# The headers of nlohmann-json and of ONNX Runtime, as targets coatrt::nlohmann_json and coatrt::onnxruntime (headers
# alone: the library is opened at run time). Each is taken from the first of these that has it:
#
#   1. a target of the project: nlohmann_json::nlohmann_json, onnxruntime::onnxruntime
#   2. a directory: coatrt_JSON_INCLUDE, coatrt_ORT_INCLUDE, CMAKE_PREFIX_PATH, the system's
#   3. a CMake package nlohmann_json, onnxruntime, as Conan and vcpkg write them
#   4. FetchContent: a release archive, its SHA-256 pinned here. coatrt_FETCH_HEADERS=OFF forbids downloads; a copy is
#      named by FETCHCONTENT_SOURCE_DIR_NLOHMANN_JSON and FETCHCONTENT_SOURCE_DIR_ONNXRUNTIME_HEADERS, a mirror by
#      coatrt_JSON_URL and coatrt_ORT_URL (another archive also needs coatrt_JSON_SHA256, coatrt_ORT_SHA256).
option(coatrt_FETCH_HEADERS "Download headers that CMake does not find" ON)

function(_coatrt_default name value)
  if(NOT DEFINED ${name})
    set(${name} "${value}" PARENT_SCOPE)
  endif()
endfunction()
_coatrt_default(coatrt_JSON_URL "https://github.com/nlohmann/json/releases/download/v3.12.0/include.zip")
_coatrt_default(coatrt_JSON_SHA256 b8cb0ef2dd7f57f18933997c9934bb1fa962594f701cd5a8d3c2c80541559372)
# Headers are the same for every processor.
_coatrt_default(coatrt_ORT_URL
  "https://github.com/microsoft/onnxruntime/releases/download/v1.24.4/onnxruntime-linux-x64-1.24.4.tgz")
_coatrt_default(coatrt_ORT_SHA256 3a211fbea252c1e66290658f1b735b772056149f28321e71c308942cdb54b747)

# Define coatrt::<package>, or leave it undefined. <kind> is JSON or ORT, <content> the name for FetchContent.
function(_coatrt_headers kind package content header)
  if(TARGET coatrt::${package})
    return()
  endif()
  set(include coatrt_${kind}_INCLUDE)
  set(target ${package}::${package})
  if(NOT TARGET ${target})
    find_path(${include} ${header} PATH_SUFFIXES ${ARGN})
    if(NOT ${include})
      find_package(${package} CONFIG QUIET)
    endif()
    if(NOT ${include} AND NOT TARGET ${target} AND coatrt_FETCH_HEADERS)
      include(FetchContent)
      # There is no such subdirectory: whatever the archive holds, nothing of it is built.
      FetchContent_Declare(${content} URL "${coatrt_${kind}_URL}" URL_HASH SHA256=${coatrt_${kind}_SHA256} SOURCE_SUBDIR none)
      FetchContent_MakeAvailable(${content})
      find_path(${include} ${header} PATHS "${${content}_SOURCE_DIR}" PATH_SUFFIXES include ${ARGN} NO_DEFAULT_PATH)
    endif()
  endif()
  if(${include})
    set(directories "${${include}}")
  elseif(TARGET ${target})
    set(directories "$<TARGET_PROPERTY:${target},INTERFACE_INCLUDE_DIRECTORIES>")
  else()
    return()
  endif()
  add_library(coatrt::${package} INTERFACE IMPORTED)
  set_target_properties(coatrt::${package} PROPERTIES INTERFACE_INCLUDE_DIRECTORIES "${directories}")
endfunction()

_coatrt_headers(JSON nlohmann_json nlohmann_json nlohmann/json.hpp)
_coatrt_headers(ORT onnxruntime onnxruntime_headers onnxruntime_c_api.h
  onnxruntime onnxruntime/core/session include/onnxruntime include/onnxruntime/core/session)
