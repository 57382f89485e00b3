//! The server in process, without a socket: JSON, tokenization, queue, encoder, JSON.
//!
//! `cargo bench --bench server` runs two groups:
//! - `stub`, in documents per second: the model computes almost nothing, so the figures are those of the rest of the server.
//! - `end to end`, in tokens per second: random weights of the base shape and a real tokenizer. It measures a request of 32
//!   documents that fill the window, and the encoder alone on the same 32 pairs.
//!
//! `RERANKD_BENCH_DTYPE=f32|bf16|int8` sets the dtype. `RERANKD_BENCH_BATCH_TOKENS` sets the tokens per batch; the default is the
//! server's.

#![allow(clippy::print_stderr, reason = "the ratio is part of the report")]

#[path = "../tests/it/support/random.rs"]
mod random;
#[path = "../tests/it/support/stub.rs"]
mod stub;

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, Instant};

use criterion::{Criterion, Throughput, criterion_group, criterion_main};
use rerankd::api::{App, Keys};
use rerankd::backend::cpu::CpuDtype;
use rerankd::backend::cpu::roofline::MultiplyRates;
use rerankd::batch::{Batch, Pair};
use rerankd::checkpoint::config::ModelConfig;
use rerankd::client::ClientId;
use rerankd::config::resolve::CPU_BATCH_TOKENS;
use rerankd::loading::download::{Hub, HubOptions};
use rerankd::loading::source::ModelSource;
use rerankd::loading::{DeviceChoice, LoadOptions, LoadedModel, Loader};
use rerankd::scheduler::SchedulerLimits;
use rerankd::served::Model;
use rerankd::text::{DocumentOptions, Tail, TextLimits};
use serde_json::{Value, json};

fn request(documents: usize, words: usize) -> Value {
    let text = |i: usize| (0..words).map(|w| stub::WORDS[(i + w * 3) % 6]).collect::<Vec<_>>().join(" ");
    json!({"model": "m", "query": "red apple", "documents": (0..documents).map(text).collect::<Vec<_>>()})
}

fn requests(criterion: &mut Criterion) {
    let runtime = tokio::runtime::Builder::new_multi_thread().enable_all().build().expect("a runtime");
    let (app, _watch): (Arc<App>, _) = stub::app();
    let mut group = criterion.benchmark_group("server/stub");
    group.sample_size(20).warm_up_time(Duration::from_secs(1)).measurement_time(Duration::from_secs(3));
    for (workload, documents, words) in
        [("1_document", 1, 20), ("100_documents", 100, 20), ("20_long_documents", 20, 600)]
    {
        let body = request(documents, words);
        group.throughput(Throughput::Elements(documents as u64));
        group.bench_function(workload, |bencher| {
            bencher.iter(|| assert_eq!(runtime.block_on(stub::rerank(&app, body.clone())).status, 200));
        });
    }
    group.finish();
}

const WINDOW: usize = 512;

/// The base shape with random weights and the built-in model's tokenizer.
fn base(threads: usize) -> LoadedModel {
    let folder = tempfile::tempdir().expect("a folder for the model");
    let json = r#"{"model_type":"xlm-roberta","vocab_size":16000,"hidden_size":768,"num_hidden_layers":12,
        "num_attention_heads":12,"intermediate_size":3072,"max_position_embeddings":514,"pad_token_id":1,"num_labels":1}"#;
    let config = ModelConfig::parse(json).expect("a valid shape");
    std::fs::write(folder.path().join("config.json"), json).expect("a writable folder");
    let tokenizer = Path::new(env!("CARGO_MANIFEST_DIR")).join("models/mini/tokenizer.json");
    std::fs::copy(tokenizer, folder.path().join("tokenizer.json")).expect("a writable folder");
    random::write_checkpoint(&config, &folder.path().join("model.safetensors")).expect("a writable folder");
    let dtype = match std::env::var("RERANKD_BENCH_DTYPE").as_deref() {
        Ok("f32") => CpuDtype::F32,
        Ok("int8") => CpuDtype::Int8,
        Ok("bf16") => CpuDtype::Bf16,
        _ if MultiplyRates::measured().bf16_is_fast() => CpuDtype::Bf16,
        _ => CpuDtype::F32,
    };
    let options = LoadOptions {
        device: DeviceChoice::Cpu { dtype, threads, pin_threads: false },
        window: Some(WINDOW),
        limits: TextLimits {
            max_query_tokens: None,
            max_document_chars: 1 << 20,
            max_request_tokens: 1 << 20,
            tail: Tail::Aligned,
            threads,
            max_tokenizer_wait: std::time::Duration::MAX,
        },
        profile: None,
    };
    let source = ModelSource::parse(&format!("base={}", folder.path().display())).expect("a folder");
    let hub = Hub::new(HubOptions { cache: PathBuf::new(), endpoint: String::new(), token: None, offline: true });
    Loader::new(&hub, &options).and_then(|loader| loader.load(&source)).expect("the model loads")
}

/// `n` documents of about 520 English tokens, each with the words in a different order.
fn documents(n: usize) -> Vec<String> {
    const WORDS: &str = "the committee published its findings on tuesday after eleven months of interviews and a review of documents it \
        recommends smaller classes better paid teachers and above all more time for reading writing and arithmetic in every school";
    let words: Vec<&str> = WORDS.split_whitespace().collect();
    let mut random = fastrand::Rng::with_seed(1);
    let text = |_| (0..520).map(|_| words[random.usize(..words.len())]).collect::<Vec<_>>().join(" ");
    (0..n).map(text).collect()
}

fn end_to_end(criterion: &mut Criterion) {
    let run_as_test = std::env::args().any(|argument| argument == "--test");
    let n = if run_as_test { 2 } else { 32 };
    let threads = std::thread::available_parallelism().map_or(1, Into::into);
    let runtime = tokio::runtime::Builder::new_multi_thread().enable_all().build().expect("a runtime");
    let (query, documents) = ("how long did the review of the schools take", documents(n));
    let first_chunk = DocumentOptions { overlap_tokens: 0, max_chunks_per_doc: 1, ..DocumentOptions::default() };
    let alone = base(threads);
    let encoded = runtime
        .block_on(alone.text.encode(ClientId::Only, query, documents.clone().into(), first_chunk))
        .expect("pairs");
    assert!(encoded.pairs.len() == n && encoded.pairs.iter().all(|pair| pair.tokens() == WINDOW));
    let batch = Batch::pack(&encoded.pairs);
    let tokens = encoded.pairs.iter().map(Pair::tokens).sum::<usize>();

    let max_batch_tokens =
        std::env::var("RERANKD_BENCH_BATCH_TOKENS").map_or(CPU_BATCH_TOKENS, |n| n.parse().expect("a number"));
    let queue = SchedulerLimits { max_batch_tokens, ..stub::QUEUE };
    let model = Model::start(base(threads), queue).expect("a thread");
    let app = stub::serving(vec![model], Keys::default(), stub::LIMITS);
    let body = json!({"model": "base", "query": query, "documents": documents, "max_chunks_per_doc": 1});
    let request = || assert_eq!(runtime.block_on(stub::rerank(&app, body.clone())).status, 200);

    // The two are measured alternately, because the speed of a shared machine drifts.
    let mut ratios: Vec<f64> = (0..if run_as_test { 1 } else { 5 })
        .map(|_| {
            let begun = Instant::now();
            alone.encoder.score(&batch).expect("scores");
            let encoder = begun.elapsed().as_secs_f64();
            let begun = Instant::now();
            request();
            encoder / begun.elapsed().as_secs_f64()
        })
        .collect();
    ratios.sort_by(f64::total_cmp);
    eprintln!(
        "end to end: {:.3} of the encoder's rate ({:.3} to {:.3}), batches of {max_batch_tokens} tokens; {}",
        ratios[ratios.len() / 2],
        ratios[0],
        ratios[ratios.len() - 1],
        alone.description
    );
    let mut group = criterion.benchmark_group("server/end to end");
    group.sample_size(10).warm_up_time(Duration::from_millis(100)).measurement_time(Duration::from_secs(5));
    group.throughput(Throughput::Elements(tokens as u64));
    group.bench_function("encoder", |bencher| bencher.iter(|| alone.encoder.score(&batch).expect("scores")));
    group.bench_function("http", |bencher| bencher.iter(request));
    group.finish();
}

criterion_group!(benches, requests, end_to_end);
criterion_main!(benches);
