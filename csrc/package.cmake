# The C++ package: a static library, its headers, and what find_package(pyargs) reads.
include(GNUInstallDirs)
include(CMakePackageConfigHelpers)
find_package(Threads REQUIRED)

add_library(pyargs STATIC csrc/threads.cpp ${OBJECTS})
target_include_directories(pyargs INTERFACE $<INSTALL_INTERFACE:${CMAKE_INSTALL_INCLUDEDIR}>)
target_compile_features(pyargs INTERFACE cxx_std_20)
target_link_libraries(pyargs PRIVATE Threads::Threads)

set(CONFIG ${CMAKE_INSTALL_LIBDIR}/cmake/pyargs)
install(TARGETS pyargs EXPORT pyargs)
install(DIRECTORY csrc/include/pyargs DESTINATION ${CMAKE_INSTALL_INCLUDEDIR})
install(EXPORT pyargs NAMESPACE pyargs:: FILE pyargsTargets.cmake DESTINATION ${CONFIG})
file(WRITE ${CMAKE_CURRENT_BINARY_DIR}/pyargsConfig.cmake
  "include(CMakeFindDependencyMacro)\nfind_dependency(Threads)\ninclude(\${CMAKE_CURRENT_LIST_DIR}/pyargsTargets.cmake)\n")
# Before 1.0 a minor version may change what callers see.
write_basic_package_version_file(${CMAKE_CURRENT_BINARY_DIR}/pyargsConfigVersion.cmake COMPATIBILITY SameMinorVersion)
install(FILES ${CMAKE_CURRENT_BINARY_DIR}/pyargsConfig.cmake ${CMAKE_CURRENT_BINARY_DIR}/pyargsConfigVersion.cmake
  DESTINATION ${CONFIG})
