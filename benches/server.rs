//! The server in process, without a socket: JSON, tokenising, queue, encoder, JSON. Documents per second.
//!
//! `cargo bench --bench server`. The `stub` model costs nothing, so its figures are those of everything else.

#![allow(missing_docs, reason = "criterion writes the functions")]

#[path = "../tests/common/stub.rs"]
mod stub;

use std::sync::Arc;
use std::time::Duration;

use criterion::{Criterion, Throughput, criterion_group, criterion_main};
use rerankd::api::App;
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

criterion_group!(benches, requests);
criterion_main!(benches);
