//! The encoder alone, at the shapes of the models that we serve, over four workloads. Tokens per second, no padding counted.
//!
//! `cargo bench --bench encoder`; `RERANKD_BENCH_SHAPES=minilm,base,large` chooses shapes (default minilm). Weights are random: speed
//! does not depend on their values.

#![allow(missing_docs, reason = "criterion writes the functions")]

#[path = "../tests/common/random.rs"]
mod random;

use std::time::Duration;

use criterion::{BenchmarkId, Criterion, Throughput, criterion_group, criterion_main};
use rerankd::backend::candle::CandleBackend;
use rerankd::batch::{Batch, Pair};
use rerankd::encoder::{self, CrossEncoder};
use rerankd::loading::config::ModelConfig;
use rerankd::loading::weights::Weights;

/// Name, layers, C, H, F.
const SHAPES: [(&str, usize, usize, usize, usize); 3] =
    [("minilm", 12, 384, 12, 1536), ("base", 12, 768, 12, 3072), ("large", 24, 1024, 16, 4096)];

/// Name and lengths of the pairs of one batch: long, mixed, short, and one alone.
const WORKLOADS: [(&str, &[usize]); 4] = [
    ("a_512x4", &[512; 4]),
    ("b_mixed", &[32, 512, 96, 256, 160, 384, 64, 224]),
    ("c_short", &[20, 24, 28, 32, 36, 40, 44, 48, 52, 56, 60, 64, 22, 26, 30, 34, 38, 42, 46, 50]),
    ("d_one_128", &[128]),
];

const VOCABULARY: usize = 1000;

fn encoder(layers: usize, c: usize, heads: usize, f: usize) -> Box<dyn CrossEncoder> {
    let json = format!(
        r#"{{"model_type":"xlm-roberta","vocab_size":{VOCABULARY},"hidden_size":{c},"num_hidden_layers":{layers},
            "num_attention_heads":{heads},"intermediate_size":{f},"max_position_embeddings":514,"pad_token_id":1}}"#
    );
    let config = ModelConfig::parse(&json).expect("a valid shape");
    let folder = tempfile::tempdir().expect("a folder for the weights");
    let path = folder.path().join("model.safetensors");
    random::write_checkpoint(&config, &path).expect("room for the weights");
    let weights = Weights::open(&path).expect("just written");
    encoder::load(&config, weights, CandleBackend::cpu()).expect("complete")
}

fn pair(tokens: usize) -> Pair {
    let ids = (0..tokens).map(|i| (i * 37 % VOCABULARY) as u32).collect();
    Pair::new(ids, vec![0; tokens])
}

fn encoders(criterion: &mut Criterion) {
    let chosen = std::env::var("RERANKD_BENCH_SHAPES").unwrap_or_else(|_| "minilm".to_owned());
    for (shape, layers, c, heads, f) in SHAPES {
        if !chosen.split(',').any(|name| name == shape) {
            continue;
        }
        let encoder = encoder(layers, c, heads, f);
        let mut group = criterion.benchmark_group(format!("encoder/candle-f32/{shape}"));
        group.sample_size(10).warm_up_time(Duration::from_secs(1)).measurement_time(Duration::from_secs(5));
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

criterion_group!(benches, encoders);
criterion_main!(benches);
