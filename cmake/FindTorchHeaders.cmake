# Sets FLATMTL_TORCH_INCLUDE_DIRS: the headers of the torch that is installed where pip (or cmake) was called. The ops use
# torch's stable C interface, so headers are all that is needed, and no torch is pulled in for the build.
#
# In order: -DTORCH_ROOT=DIR or the environment variable TORCH_ROOT (the directory `torch` of an installed torch, or an
# unpacked LibTorch), then the Python environment of -DPython_EXECUTABLE, or of the python3 on the PATH.

set(TORCH_ROOT "$ENV{TORCH_ROOT}" CACHE PATH "Directory of an installed torch (it holds include/)")
set(_probe include/torch/csrc/stable/library.h)

if(TORCH_ROOT)
  if(NOT EXISTS "${TORCH_ROOT}/${_probe}")
    message(FATAL_ERROR "TORCH_ROOT=${TORCH_ROOT}: no ${_probe} there. flatmtl needs torch >= 2.10.")
  endif()
  set(_torch "${TORCH_ROOT}")
else()
  if(NOT Python_EXECUTABLE)
    find_package(Python 3.10 REQUIRED COMPONENTS Interpreter)
  endif()
  execute_process(
    COMMAND "${Python_EXECUTABLE}" "${CMAKE_CURRENT_LIST_DIR}/find_torch.py"
    OUTPUT_VARIABLE _torch ERROR_VARIABLE _searched RESULT_VARIABLE _failed OUTPUT_STRIP_TRAILING_WHITESPACE)
  if(_failed)
    message(FATAL_ERROR
      "torch >= 2.10 was not found in the environment of ${Python_EXECUTABLE}.\n${_searched}"
      "flatmtl builds against the torch you have, so install torch first, then flatmtl. If your installer builds in an "
      "environment of its own (uv, build), either let it build without isolation (--no-build-isolation, with "
      "scikit-build-core installed) or set the environment variable TORCH_ROOT to the directory that this prints:\n"
      "  python -c \"import torch; print(torch.__path__[0])\"\n")
  endif()
endif()

set(FLATMTL_TORCH_INCLUDE_DIRS "${_torch}/include")
message(STATUS "torch headers: ${FLATMTL_TORCH_INCLUDE_DIRS}")
