#!/usr/bin/env bash
# Compiles src/backend/cuda/kernels with NVRTC for every architecture. Needs no GPU.
#
#   tests/cuda/nvrtc.sh [--if-changed]
#
# A full run that passes writes a digest of the kernels, of nvrtc.py and of NVRTC's version to compiled.txt, which is
# committed. --if-changed is a full run if the digest is another one; else it compiles one shape for sm_80 and sm_90a.
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
kernels=$here/../../src/backend/cuda/kernels
digest=$( (LC_ALL=C; cat "$kernels"/* "$here/nvrtc.py"; echo "$version") | sha256sum | cut -d' ' -f1)
if [ "${1:-}" = --if-changed ] && [ "$digest" = "$(cat "$here/compiled.txt" 2>/dev/null)" ]; then
    echo "unchanged since a full run passed (compiled.txt)"
    exec python3 "$here/nvrtc.py" "$NVRTC_LIB" "$kernels" --quick
fi
python3 "$here/nvrtc.py" "$NVRTC_LIB" "$kernels"
echo "$digest" >"$here/compiled.txt"
