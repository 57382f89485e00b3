#!/usr/bin/env bash
# Builds the stand-in CUDA libraries: driver, NVRTC and cuBLASLt.
#
#   tests/cuda/standin/build.sh OUT_DIR [selftest]
#
# Programs use them with LD_LIBRARY_PATH=OUT_DIR. They contain the path of this checkout's emulator and are built for this CPU.
set -euo pipefail
here=$(cd "$(dirname "$0")" && pwd)
out=${1:?usage: build.sh OUT_DIR [selftest]}

if ! command -v g++ > /dev/null; then
    echo "SKIPPED: no g++"
    exit 0
fi
mkdir -p "$out"
out=$(cd "$out" && pwd)

library() { # name, version, source, further arguments
    local file=$1.so.$2
    # Written under another name and moved, so that running programs keep the old file.
    g++ -std=c++17 -O2 -Wall -Wextra -shared -fPIC -fvisibility=hidden -Wl,-soname,"$file" "$here/$3" \
        -o "$out/.$file" "${@:4}" -ldl -pthread
    mv "$out/.$file" "$out/$file"
    ln -sf "$file" "$out/$1.so"
}
library libcuda 1 driver.cpp
library libnvrtc 13 nvrtc.cpp -DSTANDIN_EMULATOR_DEFAULT="\"$(cd "$here/.." && pwd)/emulator.h\""
# GEMMs take most of the time. No fast-math: NaN and infinity must propagate.
library libcublasLt 13 cublaslt.cpp -O3 -march=native -Wno-psabi "$out/libcuda.so.1" -Wl,-rpath,'$ORIGIN'

if [ "${2:-}" = selftest ]; then
    g++ -std=c++17 -O2 -Wall -Wextra "$here/selftest.cpp" -DKERNELS_CU="\"$here/../../../src/backend/cuda/kernels/kernels.cu\"" \
        -o "$out/selftest" "$out/libcuda.so.1" "$out/libnvrtc.so.13" "$out/libcublasLt.so.13" -Wl,-rpath,'$ORIGIN' -pthread
    cd "$out" && LD_LIBRARY_PATH=$out ./selftest
fi
