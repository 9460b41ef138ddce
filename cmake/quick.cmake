# The kernels of TensorRT's quick plugins as PTX, data of the Python package: sparsekit/_ptx/<kernel>.ptx. PTX for
# compute capability 8.0 runs on every later GPU, translated by the driver when an engine is loaded.

set(SPARSEKIT_QUICK_SOURCE ${PROJECT_SOURCE_DIR}/csrc/cuda/quick/sparse_linear.cu)
set(SPARSEKIT_QUICK_PTX "")
foreach(dtype IN ITEMS f32 f16 bf16)
  foreach(kind IN ITEMS decode tiles)
    set(ptx ${PROJECT_BINARY_DIR}/_ptx/sparsekit_linear_nm_${dtype}_${kind}.ptx)
    add_custom_command(
      OUTPUT ${ptx}
      COMMAND ${CMAKE_COMMAND} -E make_directory ${PROJECT_BINARY_DIR}/_ptx
      COMMAND ${CMAKE_CUDA_COMPILER} -std=c++17 -O3 -ptx -arch=compute_80 --Werror=all-warnings
              -I ${PROJECT_SOURCE_DIR}/csrc -I ${PROJECT_SOURCE_DIR}/csrc/include
              -DSK_QUICK_KIND=${kind} -DSK_QUICK_DTYPE=${dtype} -MD -MF ${ptx}.d -o ${ptx} ${SPARSEKIT_QUICK_SOURCE}
      DEPENDS ${SPARSEKIT_QUICK_SOURCE} DEPFILE ${ptx}.d VERBATIM)
    list(APPEND SPARSEKIT_QUICK_PTX ${ptx})
  endforeach()
endforeach()
add_custom_target(sparsekit_ptx ALL DEPENDS ${SPARSEKIT_QUICK_PTX})
install(FILES ${SPARSEKIT_QUICK_PTX} DESTINATION sparsekit/_ptx COMPONENT python)
