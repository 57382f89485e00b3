#!/usr/bin/env bash
# Compiles src/backend/cuda/kernels with NVRTC for every architecture. Needs no GPU.
#
#   tests/cuda/nvrtc.sh
#
# NVRTC_LIB is the folder of libnvrtc.so.*. If it is not set, pip downloads the library (86 MiB, once) to NVRTC_CACHE,
# by default ~/.cache/rerankd-nvrtc.
set -euo pipefail
here=$(cd "$(dirname "$0")" && pwd)
version=13.0.88

if [ -z "${NVRTC_LIB:-}" ]; then
    cache=${NVRTC_CACHE:-${XDG_CACHE_HOME:-$HOME/.cache}/rerankd-nvrtc}/$version
    NVRTC_LIB=$cache/nvidia/cu13/lib
    if [ ! -d "$NVRTC_LIB" ]; then
        mkdir -p "$cache"
        python3 -m pip download --quiet --no-deps --dest "$cache" "nvidia-cuda-nvrtc==$version"
        python3 -m zipfile -e "$cache"/nvidia_cuda_nvrtc-*.whl "$cache"
        rm "$cache"/nvidia_cuda_nvrtc-*.whl
    fi
fi
exec python3 "$here/nvrtc.py" "$NVRTC_LIB" "$here/../../src/backend/cuda/kernels"
