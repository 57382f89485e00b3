//! GEMM throughput of the CPU backend, as a fraction of the machine's measured peak.
//!
//! Run with `cargo bench --bench kernels`. Criterion's elements are operations: a multiplication and an addition
//! count as two. Shapes, `m x k x n`, are those of the layers of MiniLM, base and large models.

#![allow(clippy::print_stderr, reason = "the fraction of the peak is part of the report")]

use std::time::{Duration, Instant};

use criterion::{BenchmarkId, Criterion, Throughput, criterion_group, criterion_main};
use rerankd::backend::cpu::CpuDtype;
use rerankd::backend::cpu::gemm_benchmark::GemmBenchmark;
use rerankd::backend::cpu::roofline::peak;

const SHAPES: [[usize; 3]; 5] =
    [[512, 384, 1536], [512, 768, 3072], [512, 3072, 768], [512, 1024, 4096], [512, 4096, 1024]];

fn gemms(criterion: &mut Criterion) {
    let threads = std::thread::available_parallelism().map_or(1, Into::into);
    let run_as_test = std::env::args().any(|argument| argument == "--test");
    for dtype in [CpuDtype::F32, CpuDtype::Bf16, CpuDtype::Int8] {
        let mut group = criterion.benchmark_group(format!("gemm/{dtype:?}"));
        group.sample_size(10).warm_up_time(Duration::from_millis(300)).measurement_time(Duration::from_secs(1));
        for threads in [1, threads] {
            for shape in SHAPES {
                let mut gemm = GemmBenchmark::new(dtype, threads, shape);
                let operations = 2.0 * shape.iter().product::<usize>() as f64;
                let [m, k, n] = shape;
                if !run_as_test {
                    eprintln!("{}", share_of_peak(dtype, threads, &mut gemm, shape, operations));
                }
                group.throughput(Throughput::Elements(operations as u64));
                group.bench_function(
                    BenchmarkId::new(format!("{threads} threads"), format!("{m}x{k}x{n}")),
                    |bencher| {
                        bencher.iter(|| gemm.run());
                    },
                );
            }
        }
        group.finish();
    }
}

/// The median of seven measurements of GEMM rate / peak rate. The two are measured alternately, because the speed of a shared
/// machine drifts.
fn share_of_peak(
    dtype: CpuDtype,
    threads: usize,
    gemm: &mut GemmBenchmark,
    [m, k, n]: [usize; 3],
    operations: f64,
) -> String {
    let mut pairs: Vec<(f64, f64)> = (0..7)
        .map(|_| {
            let peak = peak(dtype, threads).expect("the operating system creates threads");
            gemm.run();
            let begun = Instant::now();
            (0..4).for_each(|_| gemm.run());
            (4.0 * operations / begun.elapsed().as_secs_f64(), peak)
        })
        .collect();
    pairs.sort_by(|a, b| (a.0 / a.1).total_cmp(&(b.0 / b.1)));
    let (rate, peak) = pairs[pairs.len() / 2];
    format!(
        "{dtype:?}, {threads} threads, {m}x{k}x{n}: {:.0} of {:.0} Gop/s, {:.1} %",
        rate / 1e9,
        peak / 1e9,
        100.0 * rate / peak
    )
}

criterion_group!(benches, gemms);
criterion_main!(benches);
