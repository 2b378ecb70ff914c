# libflatmtl, shared and static, from the objects of csrc/, with what other build systems need to find it:
# a CMake package (flatmtl::flatmtl, flatmtl::flatmtl_static) and a pkg-config file.

include(CMakePackageConfigHelpers)

set(_targets "")

# Before 1.0 a minor version may change the interface, so it is part of the SONAME.
if(PROJECT_VERSION_MAJOR EQUAL 0)
  set(FLATMTL_SOVERSION "${PROJECT_VERSION_MAJOR}.${PROJECT_VERSION_MINOR}")
else()
  set(FLATMTL_SOVERSION "${PROJECT_VERSION_MAJOR}")
endif()

if(FLATMTL_BUILD_SHARED)
  add_library(flatmtl SHARED $<TARGET_OBJECTS:flatmtl_core>)
  # A wheel holds no symbolic links: one file there, named like the SONAME.
  if(_wheel)
    set_target_properties(flatmtl PROPERTIES SOVERSION "${FLATMTL_SOVERSION}")
  else()
    set_target_properties(flatmtl PROPERTIES VERSION "${PROJECT_VERSION}" SOVERSION "${FLATMTL_SOVERSION}")
  endif()
  if(UNIX AND NOT APPLE)
    set(_script "${CMAKE_CURRENT_BINARY_DIR}/flatmtl.map")
    file(CONFIGURE OUTPUT "${_script}" CONTENT "FLATMTL_@FLATMTL_SOVERSION@ {\n  global: flatmtl_*;\n  local: *;\n};\n" @ONLY)
    target_link_options(flatmtl PRIVATE "LINKER:--version-script=${_script}")
    set_property(TARGET flatmtl APPEND PROPERTY LINK_DEPENDS "${_script}")
  endif()
  list(APPEND _targets flatmtl)
endif()

if(FLATMTL_BUILD_STATIC)
  add_library(flatmtl_static STATIC $<TARGET_OBJECTS:flatmtl_core>)
  set_target_properties(flatmtl_static PROPERTIES OUTPUT_NAME flatmtl)
  list(APPEND _targets flatmtl_static)
endif()

foreach(_target IN LISTS _targets)
  add_library(flatmtl::${_target} ALIAS ${_target})
  target_include_directories(${_target} INTERFACE "$<BUILD_INTERFACE:${PROJECT_SOURCE_DIR}/csrc/include>"
                                                  "$<INSTALL_INTERFACE:${CMAKE_INSTALL_INCLUDEDIR}>")
  if(UNIX)
    target_link_libraries(${_target} PRIVATE m)
  endif()
endforeach()

set(_package_dir "${CMAKE_INSTALL_LIBDIR}/cmake/flatmtl")
if(_targets)
  if(_wheel)
    set(_namelink NAMELINK_SKIP)
  endif()
  install(TARGETS ${_targets} EXPORT flatmtlTargets
    RUNTIME DESTINATION "${CMAKE_INSTALL_BINDIR}"
    LIBRARY DESTINATION "${CMAKE_INSTALL_LIBDIR}" ${_namelink}
    ARCHIVE DESTINATION "${CMAKE_INSTALL_LIBDIR}")
  install(EXPORT flatmtlTargets NAMESPACE flatmtl:: DESTINATION "${_package_dir}")

  configure_package_config_file(cmake/flatmtlConfig.cmake.in "${CMAKE_CURRENT_BINARY_DIR}/flatmtlConfig.cmake"
    INSTALL_DESTINATION "${_package_dir}")
  write_basic_package_version_file("${CMAKE_CURRENT_BINARY_DIR}/flatmtlConfigVersion.cmake"
    COMPATIBILITY SameMinorVersion)
  install(FILES "${CMAKE_CURRENT_BINARY_DIR}/flatmtlConfig.cmake" "${CMAKE_CURRENT_BINARY_DIR}/flatmtlConfigVersion.cmake"
    DESTINATION "${_package_dir}")

  # Relative to the file itself, so that an installed tree, or a wheel, can be moved.
  file(RELATIVE_PATH FLATMTL_PC_PREFIX "/prefix/${CMAKE_INSTALL_LIBDIR}/pkgconfig" "/prefix")
  if(_wheel AND FLATMTL_BUILD_SHARED)
    set(FLATMTL_PC_LIBRARY "-l:$<TARGET_SONAME_FILE_NAME:flatmtl>")
  else()
    set(FLATMTL_PC_LIBRARY "-lflatmtl")
  endif()
  configure_file(cmake/flatmtl.pc.in "${CMAKE_CURRENT_BINARY_DIR}/flatmtl.pc.in" @ONLY)
  file(GENERATE OUTPUT "${CMAKE_CURRENT_BINARY_DIR}/flatmtl.pc" INPUT "${CMAKE_CURRENT_BINARY_DIR}/flatmtl.pc.in")
  install(FILES "${CMAKE_CURRENT_BINARY_DIR}/flatmtl.pc" DESTINATION "${CMAKE_INSTALL_LIBDIR}/pkgconfig")
endif()

install(FILES csrc/include/flatmtl.h DESTINATION "${CMAKE_INSTALL_INCLUDEDIR}")

# The C++ optimizer: headers alone, compiled against the user's LibTorch (target flatmtl::torch of the CMake package).
install(DIRECTORY shim/include/flatmtl DESTINATION "${CMAKE_INSTALL_INCLUDEDIR}")
