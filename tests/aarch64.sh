#!/usr/bin/env bash
# Builds rerankd for AArch64 and runs the tests of the CPU backend's NEON paths under QEMU, on a machine of another architecture.
#
#   tests/aarch64.sh
#
# It checks that the crate builds, that every kernel agrees with its reference on every path, that whole models agree with
# `transformers`, and batch invariance. It does not measure speed. On an AArch64 machine, run `cargo test` instead.
#
# It needs these Debian packages: qemu-user-static, gcc-aarch64-linux-gnu and libc6-dev-arm64-cross; and Rust's standard library
# for the target: `rustup target add aarch64-unknown-linux-gnu`, or set RUSTC to a compiler that has it.
#
# .ci/run does not call it: it takes minutes, and few machines have the tools.
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

# Kernel tests run every path that the emulated CPU supports.
export QEMU_CPU=max
cargo test --target "$target" --lib backend::cpu -- --nocapture

# Whole models use the best path of the emulated CPU: with all dot products, with signed int8 only, and with none.
for QEMU_CPU in max neoverse-n1 cortex-a72; do
    printf '\n== %s\n' "$QEMU_CPU"
    cargo test --target "$target" --test it -- --nocapture cpu_backend golden::scores_are
done
