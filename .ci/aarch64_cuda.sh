#!/usr/bin/env bash
# A CUDA toolkit that compiles for 64-bit Arm, out of this machine's for x86-64.
#
#   .ci/aarch64_cuda.sh DIR
#
# DIR/bin/nvcc and the headers are links to those of the nvcc on the path, which picks the target's folder by
# the host compiler's name; the runtime for Arm comes from NVIDIA's package on PyPI (PYTHON: whose pip).
set -euo pipefail

die() {
  echo "aarch64_cuda.sh: $*" >&2
  exit 1
}

[[ $# == 1 ]] || die "expected one argument, the folder to make"
nvcc=$(command -v nvcc) || die "nvcc is missing; install CUDA 13.0 or later, or put its bin folder on the path"
read -r major minor < <("$nvcc" --version | sed -n 's/.*release \([0-9]*\)\.\([0-9]*\).*/\1 \2/p')
# Until CUDA 12 Jetsons have a runtime of their own, which is not for download: build there.
((major >= 13)) || die "nvcc is $major.$minor; from 13.0 on servers and Jetsons share one runtime for Arm"
# A wrapper script may be in front of it.
root=$("$nvcc" -dryrun -c -x cu /dev/null 2>&1 | sed -n 's/^#\$ TOP=//p')
root=$(realpath "$root")
include=$root/targets/x86_64-linux/include
[[ -f $include/cuda_runtime_api.h ]] || die "$include has no cuda_runtime_api.h; install CUDA's headers for x86-64"

mkdir -p "$1"
cd "$1"
target=targets/aarch64-linux
rm -rf bin nvvm targets wheel
mkdir -p bin "$target/lib"
# Links to the files: the compiler looks for its parts beside the path by which it was called.
ln -s "$root"/bin/* bin/
ln -s "$root/nvvm" nvvm
ln -s "$include" "$target/include"
"${PYTHON:-python3}" -m pip --disable-pip-version-check download --quiet --no-deps --only-binary :all: \
  --platform manylinux2014_aarch64 --dest wheel "nvidia-cuda-runtime==$major.$minor.*"
"${PYTHON:-python3}" -m zipfile -e wheel/*.whl wheel
mv wheel/nvidia/cu"$major"/lib/* "$target/lib/"
ln -s "libcudart.so.$major" "$target/lib/libcudart.so"
rm -r wheel
