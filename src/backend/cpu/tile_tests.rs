//! The tile path through its portable twin, and its machine code against the twin. `tests.rs` compares the path with the references.

use std::sync::Arc;

use proptest::prelude::*;

use super::simd::SimdPath;
use super::tests::{bits, numbers, tensor, values};
use super::*;
use crate::batch::Pair;

/// The sums of the tile path have the bits that the definition of the tile product has, whatever the blocks, sweeps and slabs are.
/// So a row's result depends on nothing but the row.
#[test]
fn sums_in_tiles_have_the_bits_of_the_definition() {
    let pool = Arc::new(ThreadPool::new(3, false).unwrap());
    let backend = CpuBackend::with_tile_twin(CpuDtype::Bf16, Arc::clone(&pool));
    let mut random = fastrand::Rng::with_seed(16);
    // One step and a part of one; one sweep of 32 steps; sweeps of 24 and 9, of 24, 24 and 1 steps; more than a slab of rows.
    for (m, k, n) in [(1, 3, 1), (33, 47, 40), (70, 1024, 33), (65, 1030, 70), (40, 1540, 32), (515, 1030, 33)] {
        let (x, w, b) = (numbers(&mut random, m * k), numbers(&mut random, n * k), numbers(&mut random, n));
        let residual = numbers(&mut random, m * n);
        let sum = |row: usize, column: usize| {
            let (x, w) = (&x[row * k..][..k], &w[column * k..][..k]);
            x.chunks(32).zip(w.chunks(32)).fold(0f32, |sum, (x, w)| {
                let mut chains = [0f32; 2];
                x.iter().zip(w).enumerate().for_each(|(i, (x, w))| chains[i % 2] = x.mul_add(*w, chains[i % 2]));
                sum + (chains[0] + chains[1])
            })
        };
        let expected: Vec<f32> = (0..m * n).map(|i| sum(i / n, i % n) + b[i % n] + residual[i]).collect();
        let weights = backend.linear(tensor(&[n, k], &w), tensor(&[n], &b), LayerRole::Encoder).unwrap();
        let residual = backend.buffer(m, &residual);
        for ctx in &backend.contexts() {
            let x = backend.buffer(m, &x);
            let ours = backend.apply(ctx, &weights, 0..n, &x, Epilogue::Residual(&residual)).unwrap();
            assert_eq!(bits(&values(&ours)), bits(&expected), "{m} x {k} x {n}");
        }
    }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 24, failure_persistence: None, ..ProptestConfig::default() })]

    /// Attention in tiles and what follows from it have the same bits for a sequence alone and among others.
    #[test]
    fn attention_in_tiles_is_batch_invariant(
        lengths in prop::collection::vec(1usize..90, 1..5),
        parts in 1usize..=4,
        window in prop::option::of(0usize..40),
        dtype in prop::sample::select(vec![CpuDtype::Bf16, CpuDtype::Int8]),
        seed in any::<u64>(),
    ) {
        check_tiled_attention(&lengths, parts, window, dtype, seed);
    }
}

/// With a window and more keys than a block, the keys that a block of queries reads begin in the middle of a block of keys.
#[test]
fn attention_in_tiles_does_not_depend_on_where_blocks_of_keys_begin() {
    check_tiled_attention(&[20, 600], 1, Some(150), CpuDtype::Bf16, 18);
}

/// Checks that one thread, all threads, and each sequence alone give the same bits, with heads of `32 * parts`.
fn check_tiled_attention(lengths: &[usize], parts: usize, window: Option<usize>, dtype: CpuDtype, seed: u64) {
    let backend = CpuBackend::with_tile_twin(dtype, Arc::new(ThreadPool::new(3, false).unwrap()));
    let (shape, c) = (AttentionShape { heads: 2, head_size: 32 * parts }, 64 * parts);
    let mut random = fastrand::Rng::with_seed(seed);
    let batch = |lengths: &[usize]| {
        Batch::pack(&lengths.iter().map(|&n| Pair::new(vec![0; n], vec![0; n])).collect::<Vec<_>>())
    };
    let all = batch(lengths);
    let qkv = numbers(&mut random, all.tokens() * 3 * c);
    let attend = |ctx, batch: &Batch, qkv: &[f32]| {
        let qkv = backend.attention_input(batch.tokens(), qkv);
        values(&backend.attention(ctx, shape, window, &qkv, batch).unwrap())
    };
    let [single_thread, all_threads] = backend.contexts();
    let together = attend(&single_thread, &all, &qkv);
    assert_eq!(bits(&together), bits(&attend(&all_threads, &all, &qkv)));
    for (rows, &length) in all.ranges().zip(lengths) {
        let own = &qkv[rows.start * 3 * c..rows.end * 3 * c];
        let alone = attend(&all_threads, &batch(&[length]), own);
        assert_eq!(bits(&together[rows.start * c..rows.end * c]), bits(&alone));
    }
}

/// The machine code of the AMX path, on a tile unit or emulated, against the twin. Without AVX-512 this cannot run;
/// `golden::instruction_sets_that_this_machine_lacks_are_skips` reports that.
#[cfg(all(target_arch = "x86_64", target_os = "linux"))]
#[test]
fn the_amx_path_gives_the_bits_of_the_twin() {
    let Some(amx) = SimdPath::amx_or_emulated() else { return };
    let pool = Arc::new(ThreadPool::new(2, false).unwrap());
    for dtype in [CpuDtype::Bf16, CpuDtype::Int8] {
        let [amx, twin] = [amx, SimdPath::tile_twin()].map(|path| CpuBackend::on(path, dtype, Arc::clone(&pool)));
        let mut random = fastrand::Rng::with_seed(17);
        for (m, k, n) in [(1, 5, 3), (33, 70, 40), (70, 200, 64), (40, 1100, 33), (35, 2200, 20)] {
            let (x, w, b) = (numbers(&mut random, m * k), numbers(&mut random, n * k), numbers(&mut random, n));
            let residual = numbers(&mut random, m * n);
            let result = |backend: &CpuBackend, ctx| {
                let weights = backend.linear(tensor(&[n, k], &w), tensor(&[n], &b), LayerRole::Encoder).unwrap();
                let (x, residual) = (backend.buffer(m, &x), backend.buffer(m, &residual));
                let epilogues = [Epilogue::Residual(&residual), Epilogue::Activation(Activation::Gelu)];
                epilogues.map(|epilogue| bits(&values(&backend.apply(ctx, &weights, 0..n, &x, epilogue).unwrap())))
            };
            for ctx in &amx.contexts() {
                assert_eq!(result(&amx, ctx), result(&twin, ctx), "{dtype:?}, {m} x {k} x {n}");
            }
        }
        for d in [32, 64, 96, 128] {
            let (shape, c) = (AttentionShape { heads: 2, head_size: d }, 2 * d);
            let batch = Batch::pack(&[1, 40, 130, 300].map(|n| Pair::new(vec![0; n], vec![0; n])));
            let qkv = numbers(&mut random, batch.tokens() * 3 * c);
            for window in [None, Some(20)] {
                let result = |backend: &CpuBackend, ctx| {
                    let qkv = backend.attention_input(batch.tokens(), &qkv);
                    bits(&values(&backend.attention(ctx, shape, window, &qkv, &batch).unwrap()))
                };
                for ctx in &amx.contexts() {
                    assert_eq!(result(&amx, ctx), result(&twin, ctx), "{dtype:?}, heads of {d}, window {window:?}");
                }
            }
        }
    }
}
