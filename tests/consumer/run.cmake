# cmake -DBUILD=DIR -DGENERATOR=G -DCC=cc -DCXX=c++ [-DTORCH=PREFIX] -P run.cmake
# Installs the build in DIR into a fresh prefix, moves the prefix, and builds and runs the consumer against it: by
# find_package, and by pkg-config where there is one. TORCH, torch.utils.cmake_prefix_path: with the C++ optimizer.

set(_work "${BUILD}/consumer")
set(_source "${CMAKE_CURRENT_LIST_DIR}")
file(REMOVE_RECURSE "${_work}")

function(run)
  execute_process(COMMAND ${ARGN} RESULT_VARIABLE _failed OUTPUT_VARIABLE _output ERROR_VARIABLE _output)
  message(STATUS "${_output}")
  if(_failed)
    list(JOIN ARGN " " _command)
    message(FATAL_ERROR "failed (${_failed}): ${_command}")
  endif()
endfunction()

run(${CMAKE_COMMAND} --install ${BUILD} --prefix ${_work}/installed)
file(RENAME "${_work}/installed" "${_work}/moved") # nothing in it may name the place it was installed to

set(_torch "")
if(TORCH)
  set(_torch "-DTorch_DIR=${TORCH}/Torch")
endif()
run(${CMAKE_COMMAND} -S ${_source} -B ${_work}/build -G ${GENERATOR} -DCMAKE_PREFIX_PATH=${_work}/moved ${_torch}
  -DCMAKE_C_COMPILER=${CC} -DCMAKE_CXX_COMPILER=${CXX})
run(${CMAKE_COMMAND} --build ${_work}/build)
run(${CMAKE_CTEST_COMMAND} --test-dir ${_work}/build --output-on-failure)
if(TORCH AND NOT EXISTS "${_work}/build/train")
  message(FATAL_ERROR "the component torch was not found")
endif()

find_program(PKG_CONFIG NAMES pkg-config pkgconf)
if(NOT PKG_CONFIG)
  message(STATUS "no pkg-config here: that half is left out")
  return()
endif()
file(GLOB_RECURSE _pc "${_work}/moved/*/flatmtl.pc")
get_filename_component(_pc_dir "${_pc}" DIRECTORY)
get_filename_component(_lib_dir "${_pc_dir}" DIRECTORY)
function(pkg_config OUT)
  execute_process(COMMAND ${CMAKE_COMMAND} -E env PKG_CONFIG_PATH=${_pc_dir} ${PKG_CONFIG} ${ARGN} flatmtl
    OUTPUT_VARIABLE _output OUTPUT_STRIP_TRAILING_WHITESPACE COMMAND_ERROR_IS_FATAL ANY)
  separate_arguments(_output UNIX_COMMAND "${_output}")
  set(${OUT} ${_output} PARENT_SCOPE)
endfunction()
pkg_config(_version --modversion)
pkg_config(_flags --cflags --libs)
run(${CC} ${_source}/main.c -o ${_work}/by_pkg_config ${_flags} -lm)
run(${CMAKE_COMMAND} -E env LD_LIBRARY_PATH=${_lib_dir} ${_work}/by_pkg_config ${_version})
# Static: the archive itself, with what it needs.
pkg_config(_flags --cflags)
run(${CC} ${_source}/main.c -o ${_work}/by_pkg_config_static ${_flags} ${_lib_dir}/libflatmtl.a -lm)
run(${_work}/by_pkg_config_static ${_version})
