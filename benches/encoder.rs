//! Throughput of the encoder without HTTP, tokenizer and scheduler, in tokens per second, for model shapes and
//! workloads.
//!
//! Run with `cargo bench --bench encoder`. `RERANKD_BENCH_SHAPES=minilm,base,large` selects shapes (default minilm) and
//! `RERANKD_BENCH_ENGINES=f32,bf16,int8,candle` engines (default all). Weights are random: speed does not depend on
//! them.

#[path = "../tests/it/support/random.rs"]
mod random;

use std::sync::Arc;
use std::time::Duration;

use criterion::{BenchmarkId, Criterion, Throughput, criterion_group, criterion_main};
use rerankd::backend::candle::CandleBackend;
use rerankd::backend::cpu::CpuDtype;
use rerankd::backend::cpu::{CpuBackend, ThreadPool};
use rerankd::batch::{Batch, Pair};
use rerankd::checkpoint::config::ModelConfig;
use rerankd::checkpoint::weights::Weights;
use rerankd::encoder::{self, CrossEncoder};

/// Name, layers, hidden size, heads, feed-forward size.
const SHAPES: [(&str, usize, usize, usize, usize); 3] =
    [("minilm", 12, 384, 12, 1536), ("base", 12, 768, 12, 3072), ("large", 24, 1024, 16, 4096)];

/// Name, and lengths in tokens of the pairs of one batch: long, mixed, short, and a single pair.
const WORKLOADS: [(&str, &[usize]); 4] = [
    ("a_512x4", &[512; 4]),
    ("b_mixed", &[32, 512, 96, 256, 160, 384, 64, 224]),
    ("c_short", &[20, 24, 28, 32, 36, 40, 44, 48, 52, 56, 60, 64, 22, 26, 30, 34, 38, 42, 46, 50]),
    ("d_one_128", &[128]),
];

const VOCABULARY: usize = 1000;

fn encoder(engine: &str, (layers, c, heads, f): (usize, usize, usize, usize)) -> Arc<dyn CrossEncoder> {
    let json = format!(
        r#"{{"model_type":"xlm-roberta","vocab_size":{VOCABULARY},"hidden_size":{c},"num_hidden_layers":{layers},
            "num_attention_heads":{heads},"intermediate_size":{f},"max_position_embeddings":514,"pad_token_id":1}}"#
    );
    let config = ModelConfig::parse(&json).expect("a valid shape");
    let folder = tempfile::tempdir().expect("a temporary folder");
    let path = folder.path().join("model.safetensors");
    random::write_checkpoint(&config, &path).expect("the weights are written");
    let weights = Weights::open(&path).expect("the weights are read");
    let threads = std::thread::available_parallelism().map_or(1, Into::into);
    let cpu = |dtype| CpuBackend::new(dtype, Arc::new(ThreadPool::new(threads, false).expect("threads")));
    let dtype = match engine {
        "f32" => CpuDtype::F32,
        "bf16" => CpuDtype::Bf16,
        "int8" => CpuDtype::Int8,
        _ => {
            let backend = CandleBackend::cpu(threads).expect("threads");
            return Arc::new(encoder::load(&config, weights, backend).expect("the model is loaded"));
        }
    };
    Arc::new(encoder::load(&config, weights, cpu(dtype)).expect("the model is loaded"))
}

fn pair(tokens: usize) -> Pair {
    let ids = (0..tokens).map(|i| (i * 37 % VOCABULARY) as u32).collect();
    Pair::new(ids, vec![0; tokens])
}

/// Whether the comma-separated list in the environment variable (`default` if unset) contains `name`.
fn selected(variable: &str, default: &str, name: &str) -> bool {
    std::env::var(variable).unwrap_or_else(|_| default.to_owned()).split(',').any(|entry| entry == name)
}

fn encoders(criterion: &mut Criterion) {
    for (shape, layers, c, heads, f) in SHAPES {
        for engine in ["f32", "bf16", "int8", "candle"] {
            if !selected("RERANKD_BENCH_SHAPES", "minilm", shape)
                || !selected("RERANKD_BENCH_ENGINES", "f32,bf16,int8,candle", engine)
            {
                continue;
            }
            let encoder = encoder(engine, (layers, c, heads, f));
            let mut group = criterion.benchmark_group(format!("encoder/{engine}/{shape}"));
            group.sample_size(10).warm_up_time(Duration::from_millis(500)).measurement_time(Duration::from_secs(3));
            for (workload, lengths) in WORKLOADS {
                let pairs: Vec<Pair> = lengths.iter().map(|&tokens| pair(tokens)).collect();
                let batch = Batch::pack(&pairs);
                group.throughput(Throughput::Elements(batch.tokens() as u64));
                group.bench_with_input(BenchmarkId::from_parameter(workload), &batch, |bencher, batch| {
                    bencher.iter(|| encoder.score(batch).expect("scores"));
                });
            }
            group.finish();
        }
    }
}

criterion_group!(benches, encoders);
criterion_main!(benches);
