//! Scores and rankings of a real cross-encoder at each dtype and on a GPU, compared with f32 on the CPU. Each
//! combination of device and dtype has its own bounds; docs/quality.md has the measured figures and the rule for `--dtype auto`.
//!
//! The test is skipped without real weights and XQuAD (tests/README.md). A GPU is included if a CUDA driver is found; the stand-in
//! of tests/cuda is one. `RERANKD_FULL_EVAL=1` takes 200 questions (2,000 pairs) instead of 20.

use rerankd::backend::cpu::CpuDtype;
use rerankd::batch::Batch;
use rerankd::client::ClientId;
use rerankd::eval::topics::{self, TopicOptions};
use rerankd::eval::{Measures, Topic};
use rerankd::loading::DeviceChoice;
use rerankd::text::{Chunk, DocumentOptions};

use crate::support::{cpu, load_on, real};

/// Scores by topic, then by document.
type Scores = Vec<Vec<f64>>;

#[tokio::test]
async fn minilm_ranking_is_kept_at_lower_precision() {
    let test = "minilm_ranking_is_kept_at_lower_precision";
    let (Some(folder), Some(xquad)) = (real(test, "ms-marco-MiniLM-L-12-v2"), real(test, "xquad/xquad.en.json")) else {
        return;
    };
    let full = std::env::var_os("RERANKD_FULL_EVAL").is_some_and(|value| value == "1");
    let options = TopicOptions {
        run: None,
        candidates: 10,
        negatives: 9,
        hard: true,
        seed: 1,
        limit: Some(if full { 200 } else { 20 }),
    };
    let topics = topics::read(&xquad, &options).unwrap();
    let mut exact: Option<Scores> = None;
    eprintln!("| | largest score difference | mean | Kendall tau | recall@1 | nDCG@10 |");
    for Candidate { name, device, difference, tau: tau_bound, lost: ndcg_bound } in candidates() {
        let scores = score(device, &folder, &topics).await;
        let exact = exact.get_or_insert_with(|| scores.clone());
        let differences: Vec<f64> =
            scores.iter().flatten().zip(exact.iter().flatten()).map(|(ours, exact)| (ours - exact).abs()).collect();
        let largest = differences.iter().copied().fold(0.0, f64::max);
        let mean = differences.iter().sum::<f64>() / differences.len() as f64;
        let tau = scores.iter().zip(exact.iter()).map(|(a, b)| kendall_tau(a, b)).sum::<f64>() / scores.len() as f64;
        let measures = quality(&scores, &topics);
        eprintln!(
            "| {name} | {largest:.4} | {mean:.5} | {tau:.4} | {:.3} | {:.4} |",
            measures.recall[0], measures.ndcg_10
        );
        assert!(largest <= difference, "{name}: a score differs from f32 by {largest}");
        assert!(tau >= tau_bound, "{name}: Kendall tau {tau} against f32");
        let lost = quality(exact, &topics).ndcg_10 - measures.ndcg_10;
        assert!(lost <= ndcg_bound, "{name}: nDCG@10 is {lost} below that of f32");
    }
}

/// A device and dtype, with bounds on its results against f32 on the CPU.
struct Candidate {
    name: &'static str,
    device: DeviceChoice,
    /// Largest allowed difference of a score.
    difference: f64,
    /// Smallest allowed Kendall tau.
    tau: f64,
    /// Largest allowed loss of nDCG@10.
    lost: f64,
}

fn candidates() -> Vec<Candidate> {
    let on = |name, device, difference, tau, lost| Candidate { name, device, difference, tau, lost };
    let threads = std::thread::available_parallelism().map_or(2, Into::into);
    #[allow(unused_mut, reason = "a build without CUDA adds nothing")]
    let mut all = vec![
        on("f32", cpu(CpuDtype::F32, threads), 0.0, 1.0, 0.0),
        on("bf16", cpu(CpuDtype::Bf16, threads), 0.02, 0.99, 0.005),
        on("int8", cpu(CpuDtype::Int8, threads), 0.1, 0.97, 0.01),
    ];
    #[cfg(feature = "cuda")]
    if matches!(rerankd::backend::cuda::find_device(), Some(Ok(()))) {
        use rerankd::backend::cuda::{CudaDtype, CudaOptions, GemmChoice};
        let gpu = |dtype| {
            let options = CudaOptions {
                dtype,
                max_batch_tokens: 2048,
                batch_invariant: false,
                gemm: GemmChoice::Fastest,
                mma_attention_only: false,
                cache: None,
            };
            DeviceChoice::Cuda(vec![0], options)
        };
        all.push(on("f32 on the GPU", gpu(CudaDtype::F32), 1e-4, 0.9999, 0.001));
        all.push(on("f16 on the GPU", gpu(CudaDtype::F16), 2e-3, 0.999, 0.001));
        all.push(on("bf16 on the GPU", gpu(CudaDtype::Bf16), 0.02, 0.99, 0.005));
        all.push(on("fp8 on the GPU", gpu(CudaDtype::Fp8), 0.15, 0.95, 0.01));
    }
    all
}

async fn score(device: DeviceChoice, folder: &std::path::Path, topics: &[Topic]) -> Scores {
    let model = load_on(device, folder).unwrap();
    let whole = DocumentOptions { overlap_tokens: 0, max_chunks_per_doc: 8, ..DocumentOptions::default() };
    let mut scores = Vec::new();
    for topic in topics {
        let encoded =
            model.text.encode(ClientId::Only, &topic.query, topic.documents.clone().into(), whole).await.unwrap();
        let logits = model.encoder.score(&Batch::pack(&encoded.pairs)).unwrap();
        let best =
            |chunks: &Vec<Chunk>| chunks.iter().map(|chunk| logits[chunk.pair]).fold(f32::NEG_INFINITY, f32::max);
        scores.push(encoded.documents.iter().map(|chunks| 1.0 / (1.0 + (-f64::from(best(chunks))).exp())).collect());
    }
    scores
}

fn quality(scores: &Scores, topics: &[Topic]) -> Measures {
    let measured: Vec<Measures> = scores
        .iter()
        .zip(topics)
        .map(|(scores, topic)| {
            let mut order: Vec<usize> = (0..scores.len()).collect();
            order.sort_by(|&a, &b| scores[b].total_cmp(&scores[a]).then(a.cmp(&b)));
            let ranked: Vec<u32> = order.iter().map(|&i| topic.relevance[i]).collect();
            Measures::of(&ranked, &topic.relevant, &[1])
        })
        .collect();
    Measures::mean(&measured).expect("there are topics")
}

/// Kendall's tau: the share of document pairs in the same order minus the share in the opposite order (Kendall 1938).
fn kendall_tau(a: &[f64], b: &[f64]) -> f64 {
    let n = a.len();
    let pairs = (0..n).flat_map(|i| (0..i).map(move |j| (i, j)));
    let agreement =
        pairs.map(|(i, j)| f64::from(a[i].total_cmp(&a[j]) as i8 * b[i].total_cmp(&b[j]) as i8)).sum::<f64>();
    agreement / (n * (n - 1) / 2) as f64
}
