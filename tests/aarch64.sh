#!/usr/bin/env bash
# Builds rerankd for AArch64 and runs the CPU backend's tests on its NEON paths, on a machine of another kind, under QEMU.
#
#   tests/aarch64.sh
#
# It shows that the crate builds there, that every kernel agrees with its definition on every path, and that whole models do
# with `transformers`, alone and in company. It says nothing of speed. On an AArch64 machine, `cargo nextest run` shows more.
#
# It needs, by Debian's names, qemu-user-static, gcc-aarch64-linux-gnu and libc6-dev-arm64-cross; and Rust's standard library
# for the target: `rustup target add aarch64-unknown-linux-gnu`, or in RUSTC a compiler that has it.
#
# .ci/run leaves it out: minutes of building and emulation, with tools that few machines have.
set -euo pipefail
cd "$(dirname "$0")/.."
target=aarch64-unknown-linux-gnu

skip() { echo "SKIPPED: $1"; exit 0; }
for tool in qemu-aarch64-static aarch64-linux-gnu-gcc; do
    command -v "$tool" >/dev/null || skip "no $tool (apt install qemu-user-static gcc-aarch64-linux-gnu libc6-dev-arm64-cross)"
done
libraries=$("${RUSTC:-rustc}" --print target-libdir --target "$target")
ls "$libraries"/libstd-*.rlib >/dev/null 2>&1 || skip "no std in $libraries (rustup target add $target, or RUSTC)"

export CARGO_TARGET_AARCH64_UNKNOWN_LINUX_GNU_LINKER=aarch64-linux-gnu-gcc
export CARGO_TARGET_AARCH64_UNKNOWN_LINUX_GNU_RUNNER="qemu-aarch64-static -L /usr/aarch64-linux-gnu"

# Every path that a machine can run is tested on it, from the best one down.
export QEMU_CPU=max
cargo test --target "$target" --lib backend::cpu -- --nocapture

# Whole models take a machine's best path: all dot products, those of signed bytes, none.
for QEMU_CPU in max neoverse-n1 cortex-a72; do
    printf '\n== %s\n' "$QEMU_CPU"
    cargo test --target "$target" --test it -- --nocapture cpu_backend scores_are
done
