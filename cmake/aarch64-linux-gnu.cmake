# Cross build for 64-bit Arm with Debian's compiler; programs run under qemu-user.
#
#   cmake --toolchain cmake/aarch64-linux-gnu.cmake ...
#
# needs the packages g++-aarch64-linux-gnu, libc6-dev-arm64-cross and, to run tests, qemu-user.

set(CMAKE_SYSTEM_NAME Linux)
set(CMAKE_SYSTEM_PROCESSOR aarch64)
set(CMAKE_CXX_COMPILER aarch64-linux-gnu-g++)
# nvcc compiles for Arm where its host compiler does: .ci/aarch64_cuda.sh makes one that has the runtime for Arm.
set(CMAKE_CUDA_HOST_COMPILER ${CMAKE_CXX_COMPILER})
set(CMAKE_FIND_ROOT_PATH /usr/aarch64-linux-gnu)
set(CMAKE_FIND_ROOT_PATH_MODE_PROGRAM NEVER)
set(CMAKE_FIND_ROOT_PATH_MODE_LIBRARY ONLY)
set(CMAKE_FIND_ROOT_PATH_MODE_INCLUDE ONLY)
set(CMAKE_FIND_ROOT_PATH_MODE_PACKAGE ONLY)
# -cpu max: every feature that the emulator knows. SPARSEKIT_ISA takes some away again.
set(CMAKE_CROSSCOMPILING_EMULATOR qemu-aarch64 -L /usr/aarch64-linux-gnu -cpu max)
