//! Text to pairs: tokenization, chunking with overlap, deduplication. Reports characters per second.
//!
//! `cargo bench --bench text`. Uses the built-in model's tokenizer, and that of bge-reranker-v2-m3 if the test data has it.

use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use criterion::{Criterion, Throughput, criterion_group, criterion_main};
use rerankd::client::ClientId;
use rerankd::text::{DocumentOptions, EmbeddingRows, Tail, TextEncoder, TextLimits};

const ENGLISH: &str = "The committee published its findings on Tuesday, after eleven months of interviews and a review of \
    some 4,000 documents. It recommends smaller classes, better paid teachers and, above all, more time. ";
const CHINESE: &str = "委员会在经过十一个月的访谈和对大约四千份文件的审查之后，于星期二公布了调查结果。它建议缩小班级规模，提高教师工资，最重要的是给予更多时间。";

fn encoder(tokenizer: &PathBuf) -> TextEncoder {
    let limits = TextLimits {
        max_query_tokens: None,
        max_document_chars: 1 << 20,
        max_request_tokens: 1 << 24,
        tail: Tail::Aligned,
        threads: std::thread::available_parallelism().map_or(1, Into::into),
        max_tokenizer_wait: std::time::Duration::MAX,
    };
    let json = std::fs::read(tokenizer).expect("a tokenizer.json");
    TextEncoder::new(&json, EmbeddingRows { vocabulary: usize::MAX, token_types: 256 }, 512, limits)
        .expect("a supported tokenizer")
}

fn texts(criterion: &mut Criterion) {
    let root = PathBuf::from(env!("CARGO_MANIFEST_DIR"));
    let data = std::env::var_os("RERANKD_TEST_DATA").map_or_else(|| root.join("../shared/data"), PathBuf::from);
    let runtime = tokio::runtime::Builder::new_multi_thread().enable_all().build().expect("a runtime");
    let options = DocumentOptions::default();
    for (name, path) in
        [("mini", root.join("models/mini/tokenizer.json")), ("bge", data.join("bge-reranker-v2-m3/tokenizer.json"))]
    {
        if !path.exists() {
            eprintln!("skipped: no {}", path.display());
            continue;
        }
        let encoder = encoder(&path);
        let mut group = criterion.benchmark_group(format!("text/{name}"));
        group.sample_size(10).warm_up_time(Duration::from_secs(1)).measurement_time(Duration::from_secs(3));
        for (workload, text, copies, documents) in [
            ("100_passages_en", ENGLISH, 4, 100),
            ("100_passages_zh", CHINESE, 8, 100),
            ("1_book_en", ENGLISH, 1000, 1),
        ] {
            // Numbered, because equal passages would be deduplicated.
            let texts: Arc<[String]> = (0..documents).map(|i| format!("{i}. {}", text.repeat(copies))).collect();
            group.throughput(Throughput::Elements(texts.iter().map(|text| text.chars().count() as u64).sum()));
            group.bench_function(workload, |bencher| {
                bencher.iter(|| {
                    runtime
                        .block_on(encoder.encode(
                            ClientId::Only,
                            "What does the committee recommend?",
                            Arc::clone(&texts),
                            options,
                        ))
                        .expect("pairs")
                });
            });
        }
        group.finish();
    }
}

criterion_group!(benches, texts);
criterion_main!(benches);
