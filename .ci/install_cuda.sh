#!/usr/bin/env bash
# What wheels are built with, installed into a manylinux_2_28 container: nvcc, the static CUDA runtime, and
# the headers of the oldest TensorRT that the plugin is for.
set -euo pipefail

CUDA=13-0       # drivers of every CUDA 13 run it, and JetPack 7.0
TENSORRT=10.3.0

case $(uname -m) in
  x86_64) repository=x86_64 ;;
  aarch64) repository=sbsa ;;
  *) echo "install_cuda.sh: expected x86_64 or aarch64, this is $(uname -m)" >&2; exit 1 ;;
esac
dnf -y install dnf-plugins-core
dnf config-manager --add-repo \
  "https://developer.download.nvidia.com/compute/cuda/repos/rhel8/$repository/cuda-rhel8.repo"
dnf -y install "cuda-nvcc-$CUDA" "cuda-cudart-devel-$CUDA" "cuda-cccl-$CUDA"
"/usr/local/cuda-${CUDA/-/.}/bin/nvcc" --version

mkdir -p /opt/tensorrt
curl --fail --silent --show-error --location --retry 3 \
  "https://github.com/NVIDIA/TensorRT/archive/refs/tags/v$TENSORRT.tar.gz" |
  tar xz -C /opt/tensorrt --strip-components=1 "TensorRT-$TENSORRT/include"
ls /opt/tensorrt/include/NvInferRuntime.h
