//! Encoder outputs against references: `transformers` at every stage (`tests/fixtures`), candle-transformers, and a float64
//! forward pass of a real cross-encoder. Also batch invariance.
//!
//! Tests with real weights are skipped without them (tests/README.md). `RERANKD_FULL_EVAL=1` ranks all questions of XQuAD
//! instead of a sample.

use std::collections::HashMap;
use std::fs;
use std::ops::Range;
use std::path::Path;
use std::sync::Arc;

use candle_core::{DType, Device, IndexOp, Tensor};
use candle_nn::{Module, VarBuilder, linear};
use candle_transformers::models::{bert, xlm_roberta};
use proptest::prelude::*;
use proptest::test_runner::{RngAlgorithm, TestRng, TestRunner};
use rerankd::backend::candle::CandleBackend;
use rerankd::backend::cpu::{CpuBackend, ThreadPool};
use rerankd::backend::profile::{Profile, Profiled};
use rerankd::backend::{Backend, cpu::CpuDtype};
use rerankd::batch::{Batch, Pair};
use rerankd::checkpoint::config::{ModelConfig, NormOrder, Pooling};
use rerankd::checkpoint::modules::parse_modules;
use rerankd::checkpoint::weights::Weights;
use rerankd::client::ClientId;
use rerankd::encoder::{self, CrossEncoder, Stage};
use rerankd::loading::DeviceChoice;
use rerankd::text::{Chunk, DocumentOptions};
use serde::Deserialize;

use crate::support::{SplitMix64, cpu, fixture, load, load_on, paragraphs, real, skip};

/// Bound on the absolute difference from `transformers` at every stage.
///
/// Each side adds about a hundred f32 terms of size 1 in its own order, several times in sequence. The largest difference measured
/// is 9e-6. The smallest plausible mistakes change more: a wrong epsilon changes a layer's output by 1e-4, the wrong GELU by 7e-4.
const STAGE_BOUND: f32 = 5e-5;

/// Bound on the absolute difference from candle-transformers, which runs the same kernels in f32 on GEMMs of other shapes (one
/// sequence, one weight matrix at a time). Only the order of summation may differ.
const CANDLE_BOUND: f32 = 1e-5;

/// Bound on the absolute difference from the float64 logits.
///
/// The largest difference measured is 5e-6, after twelve layers in f32, for logits of about 10. The bound allows for any order of
/// summation and is about a thousandth of a usual difference between two documents.
const REAL_BOUND: f64 = 1e-3;

/// The kernels' unit tests run on every instruction set of the machine.
#[test]
fn instruction_sets_that_this_machine_lacks_are_skips() {
    for name in CpuBackend::missing_instruction_sets() {
        skip(&format!("instruction set {name}"), "this processor does not have it");
    }
}

#[test]
fn candle_matches_transformers_at_every_stage() {
    for family in FAMILIES {
        check_stages(family, CandleBackend::cpu(2).unwrap());
    }
}

/// With one thread, the batch is a single partition, as `stages` requires.
#[test]
fn the_cpu_backend_matches_transformers_at_every_stage() {
    for family in FAMILIES {
        check_stages(family, CpuBackend::new(CpuDtype::F32, Arc::new(ThreadPool::new(1, false).unwrap())));
    }
}

#[test]
fn profiling_counts_operations_and_keeps_scores_bitwise_equal() {
    for family in ["xlmr", "bert", "roberta", "electra"] {
        let pool = Arc::new(ThreadPool::new(1, false).unwrap());
        let backend = CpuBackend::new(CpuDtype::Bf16, pool);
        let batch = Batch::pack(&Golden::read(family).pairs);
        let config = config(family);
        let plain = encoder::load(&config, weights(family), backend.clone()).unwrap().score(&batch).unwrap();

        let profile = Arc::new(Profile::default());
        let profiled = encoder::load(&config, weights(family), Profiled::new(backend, Arc::clone(&profile))).unwrap();
        assert_eq!(profiled.score(&batch).unwrap(), plain, "{family}");
        let operations = profile.take();
        let calls = |name: &str| operations.iter().filter(|o| o.name.starts_with(name)).map(|o| o.calls).sum::<usize>();
        let layers = config.layers;
        assert_eq!(calls("attention"), layers - 1, "{operations:?}");
        assert_eq!(calls("layer norm"), 2 * (layers - 1), "{operations:?}");
        // Q, K and V are one GEMM. In the last layer K and V are one GEMM over all tokens, and Q is computed for the CLS tokens
        // only.
        assert_eq!(calls("GEMM"), 4 * (layers - 1) + 1, "{operations:?}");
        assert_eq!((calls("CLS: GEMM"), calls("CLS: attention")), (4, 1), "{operations:?}");
        assert_eq!((calls("embeddings"), calls("head")), (1, 2), "{operations:?}");
        for operation in &operations {
            let multiplies = operation.name.contains("GEMM") || operation.name.contains("attention");
            // Computed from the operation's shape, not timed: only operations that multiply have a minimum.
            let has_minimum = operation.roofline_seconds != 0.0;
            assert_eq!(has_minimum, multiplies, "{operation:?}");
        }
        assert!(profile.take().is_empty());
    }
}

/// Packs all sequences into one batch and compares each sequence's rows with its golden tensors.
fn check_stages(family: &str, backend: impl Backend) {
    let golden = Golden::read(family);
    let config = config(family);
    let about = backend.describe();
    let encoder = encoder::load(&config, weights(family), backend).unwrap();
    let batch = Batch::pack(&golden.pairs);
    let mut seen = Vec::new();
    let mut largest = 0f32;
    for (stage, values) in encoder.stages(&batch).unwrap() {
        for (sequence, rows) in rows(stage, &config, &batch).into_iter().enumerate() {
            let columns = values.len() / rows.of;
            let ours = &values[rows.range.start * columns..rows.range.end * columns];
            let theirs = golden.stage(sequence, stage);
            let at = format!(
                "{about}, {family}, sequence {sequence} of {} tokens, {stage:?}",
                golden.pairs[sequence].tokens()
            );
            assert_eq!(ours.len(), theirs.len(), "{at}");
            let difference = max_difference(ours, &theirs);
            assert!(difference <= STAGE_BOUND, "{at}: differs by {difference}");
            largest = largest.max(difference);
        }
        seen.push(stage);
    }
    let mut expected: Vec<Stage> =
        std::iter::once(Stage::Embeddings).chain((0..config.layers).map(Stage::Layer)).collect();
    expected.extend((config.norm_order == NormOrder::Pre).then_some(Stage::FinalNorm));
    expected.extend((config.head.pooling == Pooling::Mean).then_some(Stage::Pooled));
    expected.push(Stage::Logits);
    assert_eq!(seen, expected, "{family}");
    eprintln!("{about}, {family}: largest difference from transformers {largest:e}");
}

const FAMILIES: [&str; 8] = ["xlmr", "bert", "roberta", "modernbert", "modernbert-old", "ettin", "new", "electra"];

/// A sequence's rows in the buffer of a stage, which has `of` rows.
struct Rows {
    range: Range<usize>,
    of: usize,
}

fn rows(stage: Stage, config: &ModelConfig, batch: &Batch) -> Vec<Rows> {
    let first_tokens_only = match stage {
        Stage::Logits | Stage::Pooled => true,
        Stage::FinalNorm => config.head.pooling == Pooling::Cls,
        Stage::Layer(layer) => layer == config.layers - 1 && config.head.pooling == Pooling::Cls,
        Stage::Embeddings => false,
    };
    let of = if first_tokens_only { batch.sequences() } else { batch.tokens() };
    let rows = |(sequence, range)| Rows { range: if first_tokens_only { sequence..sequence + 1 } else { range }, of };
    batch.ranges().enumerate().map(rows).collect()
}

#[test]
fn every_checkpoint_format_gives_bitwise_equal_scores() {
    let golden = Golden::read("xlmr");
    let batch = Batch::pack(&golden.pairs);
    let logits = |folder: &str| load(&fixture(folder)).unwrap().encoder.score(&batch).unwrap();
    let expected = logits("xlmr");
    for folder in ["xlmr-pickle", "xlmr-shards", "xlmr-merged"] {
        assert_eq!(logits(folder), expected, "{folder}");
    }
}

/// candle's XLM-R takes the activation (erf or tanh GELU) from config.json and numbers positions as `transformers` does.
#[test]
fn roberta_and_xlmr_match_candle_transformers() {
    for family in ["xlmr", "roberta"] {
        let config: xlm_roberta::Config = read_json(&fixture(family).join("config.json"));
        let model = xlm_roberta::XLMRobertaForSequenceClassification::new(1, &config, tensors(family)).unwrap();
        check_against_candle(family, |ids, types| model.forward(ids, &ids.ones_like().unwrap(), types).unwrap());
    }
}

/// candle's BERT has no classification head, so the test adds pooler and classifier.
#[test]
fn bert_matches_candle_transformers() {
    let config: bert::Config = read_json(&fixture("bert").join("config.json"));
    let weights = tensors("bert");
    let model = bert::BertModel::load(weights.clone(), &config).unwrap();
    let pooler = linear(config.hidden_size, config.hidden_size, weights.pp("bert.pooler.dense")).unwrap();
    let classifier = linear(config.hidden_size, 1, weights.pp("classifier")).unwrap();
    check_against_candle("bert", |ids, types| {
        let first = model.forward(ids, types, None).unwrap().i((.., 0)).unwrap().contiguous().unwrap();
        classifier.forward(&pooler.forward(&first).unwrap().tanh().unwrap()).unwrap()
    });
}

fn check_against_candle(family: &str, forward: impl Fn(&Tensor, &Tensor) -> Tensor) {
    let golden = Golden::read(family);
    let ours = load(&fixture(family)).unwrap().encoder.score(&Batch::pack(&golden.pairs)).unwrap();
    let mut largest = 0f32;
    for (pair, ours) in golden.pairs.iter().zip(ours) {
        let types: Vec<u32> = pair.type_ids().iter().map(|&t| t.into()).collect();
        let row = |values: &[u32]| Tensor::new(values, &Device::Cpu).unwrap().unsqueeze(0).unwrap();
        let theirs: f32 = forward(&row(pair.ids()), &row(&types)).flatten_all().unwrap().to_vec1().unwrap()[0];
        let difference = (ours - theirs).abs();
        assert!(difference <= CANDLE_BOUND, "{family}, {} tokens: {ours}, candle's own {theirs}", pair.tokens());
        largest = largest.max(difference);
    }
    eprintln!("{family}: largest difference from candle-transformers {largest:e}");
}

/// The whole pipeline, from text to logit, against `CrossEncoder.predict` on the same folder.
#[tokio::test]
async fn texts_score_as_in_sentence_transformers() {
    for family in ["modernbert", "modernbert-old", "ettin", "electra"] {
        let lines = fs::read_to_string(fixture(family).join("predict.jsonl")).unwrap();
        let rows: Vec<Predicted> = lines.lines().map(|line| serde_json::from_str(line).unwrap()).collect();
        assert!(!rows.is_empty());
        for device in [DeviceChoice::Candle { threads: 2 }, cpu(CpuDtype::F32, 2)] {
            let model = load_on(device, &fixture(family)).unwrap();
            for row in &rows {
                let documents = [row.document.clone()].into();
                let options = DocumentOptions::default();
                let encoded = model.text.encode(ClientId::Only, &row.query, documents, options).await.unwrap();
                assert_eq!(encoded.pairs.len(), 1, "{family}");
                let logit = model.encoder.score(&Batch::pack(&encoded.pairs)).unwrap()[0];
                let difference = (logit - row.logit).abs();
                assert!(difference <= STAGE_BOUND, "{}: {logit}, not {}", model.description, row.logit);
            }
        }
    }
}

/// A line of predict.jsonl.
#[derive(Deserialize)]
struct Predicted {
    query: String,
    document: String,
    logit: f32,
}

/// The logits of each precision against those of `transformers` in f32.
///
/// bf16 rounds GEMM operands to within 2^-9 of the value, and int8 to within 2^-9 of a row's range or 2^-8 of a column's largest
/// weight. The rounding errors of some ten GEMMs of random weights add up like a random walk, to about 1 % and 4 % of logits that
/// differ by 1. The largest differences measured are 0.011 and 0.041.
#[test]
fn lower_precisions_stay_near_transformers() {
    for family in ["modernbert", "modernbert-old", "ettin", "new", "electra"] {
        let golden = Golden::read(family);
        let batch = Batch::pack(&golden.pairs);
        for (dtype, bound) in [(CpuDtype::Bf16, 0.04), (CpuDtype::Int8, 0.12)] {
            for new in [CpuBackend::new, CpuBackend::with_tile_twin] {
                let backend = new(dtype, Arc::new(ThreadPool::new(2, false).unwrap()));
                let about = backend.describe();
                let logits = encoder::load(&config(family), weights(family), backend).unwrap().score(&batch).unwrap();
                let theirs: Vec<f32> =
                    (0..golden.pairs.len()).map(|sequence| golden.stage(sequence, Stage::Logits)[0]).collect();
                let difference = max_difference(&logits, &theirs);
                eprintln!("{family}, {about}: largest difference from transformers {difference:e}");
                assert!(difference <= bound, "{family}, {about}: {logits:?}, not {theirs:?}");
            }
        }
    }
}

#[test]
fn scores_are_batch_invariant() {
    // A fixture, the longest sequence, and the number of random batches. Lengths reach beyond the window of local attention.
    for (family, longest, cases) in [("xlmr", 64, 64), ("modernbert", 200, 12), ("ettin", 200, 12), ("new", 200, 12)] {
        let folder = fixture(family);
        let reference = load(&folder).unwrap();
        let ours = cpu_models(&folder);
        // Any ids except padding.
        let sequences = prop::collection::vec(prop::collection::vec(2u32..300, 1..=longest), 1..12);
        let config = ProptestConfig { cases, failure_persistence: None, ..ProptestConfig::default() };
        // A fixed seed: every run has the same cases.
        TestRunner::new_with_rng(config, TestRng::deterministic_rng(RngAlgorithm::ChaCha))
            .run(&sequences, |sequences| {
                let pairs: Vec<Pair> =
                    sequences.into_iter().map(|ids| Pair::new(ids.clone(), vec![0; ids.len()])).collect();
                check_batch_invariance(std::slice::from_ref(&reference.encoder), &pairs);
                for same in &ours {
                    check_batch_invariance(same, &pairs);
                }
                Ok(())
            })
            .unwrap();
    }
}

/// As above, through the portable twin of the tile unit, which is slow. The heads of `bert` are too small for tiles; `modernbert`
/// has local attention.
#[test]
fn scores_of_the_tile_path_are_batch_invariant() {
    let mut random = SplitMix64(16);
    for family in ["modernbert", "new", "bert"] {
        let encoder = |dtype, threads| -> Arc<dyn CrossEncoder> {
            let backend = CpuBackend::with_tile_twin(dtype, Arc::new(ThreadPool::new(threads, false).unwrap()));
            Arc::new(encoder::load(&config(family), weights(family), backend).unwrap())
        };
        for lengths in [&[1, 40, 33][..], &[32, 2, 38, 31]] {
            let ids = |n: usize| (0..n).map(|_| 2 + random.below(298) as u32).collect::<Vec<u32>>();
            let ids: Vec<Vec<u32>> = lengths.iter().copied().map(ids).collect();
            let pairs: Vec<Pair> = ids.into_iter().map(|ids| Pair::new(ids.clone(), vec![0; ids.len()])).collect();
            for dtype in [CpuDtype::Bf16, CpuDtype::Int8] {
                check_batch_invariance(&[encoder(dtype, 1), encoder(dtype, 3)], &pairs);
            }
        }
    }
}

#[test]
fn minilm_scores_are_batch_invariant() {
    let Some(folder) = real("minilm_scores_are_batch_invariant", MINILM) else { return };
    let pairs: Vec<Pair> = rows_of_minilm(&folder).into_iter().map(Row::into_pair).collect();
    // The shortest row with the longest, which fills the window; then rows of various lengths.
    let select = |rows: &[usize]| rows.iter().map(|&row| pairs[row].clone()).collect::<Vec<Pair>>();
    let batches = [select(&[1, 46, 6]), select(&[0, 20, 3, 36, 7])];
    let reference = load(&folder).unwrap();
    batches.iter().for_each(|pairs| check_batch_invariance(std::slice::from_ref(&reference.encoder), pairs));
    let some: Vec<Pair> = pairs.iter().skip(1).step_by(5).cloned().collect();
    for models in cpu_models(&folder) {
        check_batch_invariance(&models, &some);
    }
}

/// The model on the CPU backend: one list per dtype, with one, two and three threads.
fn cpu_models(folder: &Path) -> Vec<Vec<Arc<dyn CrossEncoder>>> {
    let on = |dtype| [1, 2, 3].map(|threads| load_on(cpu(dtype, threads), folder).unwrap().encoder).into();
    [CpuDtype::F32, CpuDtype::Bf16, CpuDtype::Int8].map(on).into()
}

/// Checks that all `models` give bitwise equal logits for the pairs in one batch, in reverse order, and each alone.
///
/// candle would compute GEMMs of one row or one column with other kernels; `matmul` in `backend/candle.rs` avoids these. In the CPU
/// backend, the instructions that compute a row do not depend on the other rows or on the number of threads.
fn check_batch_invariance(models: &[Arc<dyn CrossEncoder>], pairs: &[Pair]) {
    let mut expected: Option<Vec<f32>> = None;
    for model in models {
        let logits = |pairs: &[&Pair]| model.score(&Batch::pack(pairs.iter().copied())).unwrap();
        let together = logits(&pairs.iter().collect::<Vec<_>>());
        let mut reversed = logits(&pairs.iter().rev().collect::<Vec<_>>());
        reversed.reverse();
        let alone: Vec<f32> = pairs.iter().map(|pair| logits(&[pair])[0]).collect();
        let expected = expected.get_or_insert_with(|| together.clone());
        for (how, found) in [("in one batch", &together), ("in reverse order", &reversed), ("alone", &alone)] {
            for (i, (found, expected)) in found.iter().zip(expected.iter()).enumerate() {
                let (tokens, about) = (pairs[i].tokens(), model.describe());
                assert_eq!(
                    found.to_bits(),
                    expected.to_bits(),
                    "{about}: {tokens} tokens: {found} {how}, not {expected}"
                );
            }
        }
    }
}

/// The last row's document is longer than the window. The reference truncates it to the window, where the first chunk ends too.
#[tokio::test]
async fn minilm_ids_and_logits_match_the_float64_reference() {
    let Some(folder) = real("minilm_ids_and_logits_match_the_float64_reference", MINILM) else { return };
    let rows = rows_of_minilm(&folder);
    assert_eq!((rows.len(), rows[46].ids.len()), (47, 512));
    let first_chunk = DocumentOptions { overlap_tokens: 0, max_chunks_per_doc: 1, ..DocumentOptions::default() };
    // The logits span 20. For the rounding of bf16 and int8 see `lower_precisions_stay_near_transformers`. The largest differences
    // measured are 0.013 and 0.095.
    for (device, bound) in [
        (DeviceChoice::Candle { threads: 2 }, REAL_BOUND),
        (cpu(CpuDtype::F32, 2), REAL_BOUND),
        (cpu(CpuDtype::Bf16, 2), 0.05),
        (cpu(CpuDtype::Int8, 2), 0.3),
    ] {
        let model = load_on(device, &folder).unwrap();
        let mut largest = 0f64;
        for (line, row) in (1..).zip(&rows) {
            let encoded =
                model.text.encode(ClientId::Only, &row.query, [row.text.clone()].into(), first_chunk).await.unwrap();
            let pair = &encoded.pairs[0];
            assert_eq!((pair.ids(), pair.type_ids()), (&row.ids[..], &row.type_ids[..]), "row {line}");
            let logit = f64::from(model.encoder.score(&Batch::pack([pair])).unwrap()[0]);
            let difference = (logit - row.logit).abs();
            let about = &model.description;
            assert!(difference <= bound, "{about}: row {line}: logit {logit}, the reference's {}", row.logit);
            largest = largest.max(difference);
        }
        eprintln!("{MINILM}, {}: largest difference from the float64 reference {largest:e}", model.description);
    }
}

/// Ranks each question's own paragraph among nine others. The model puts nearly all first. A fault in tokenization, pairing or
/// arithmetic that still gives finite scores lowers recall@1 towards 0.1.
#[tokio::test]
async fn minilm_ranks_the_right_xquad_paragraph_first() {
    let test = "minilm_ranks_the_right_xquad_paragraph_first";
    let (Some(folder), Some(xquad)) = (real(test, MINILM), real(test, "xquad/xquad.en.json")) else { return };
    let model = load_on(cpu(CpuDtype::Bf16, 2), &folder).unwrap();
    let paragraphs = paragraphs(&xquad);
    let questions: Vec<(usize, &str)> = paragraphs
        .iter()
        .enumerate()
        .flat_map(|(i, paragraph)| paragraph.qas.iter().map(move |qa| (i, qa.question.as_str())))
        .collect();
    let full = std::env::var_os("RERANKD_FULL_EVAL").is_some_and(|value| value == "1");
    // A question with its ten paragraphs has about 1,900 tokens: 0.1 s on a CPU with bf16 instructions, seconds without.
    let step = if full { 1 } else { questions.len() / SAMPLE };
    let whole = DocumentOptions { overlap_tokens: 0, max_chunks_per_doc: 8, ..DocumentOptions::default() };
    let mut random = SplitMix64(1);
    let (mut found, mut asked) = (0, 0);
    for &(own, question) in questions.iter().step_by(step) {
        let mut candidates = vec![own];
        while candidates.len() < 10 {
            let other = random.below(paragraphs.len());
            if !candidates.contains(&other) {
                candidates.push(other);
            }
        }
        let documents: Arc<[String]> = candidates.iter().map(|&i| paragraphs[i].context.clone()).collect();
        let encoded = model.text.encode(ClientId::Only, question, documents, whole).await.unwrap();
        let logits = model.encoder.score(&Batch::pack(&encoded.pairs)).unwrap();
        let best =
            |chunks: &Vec<Chunk>| chunks.iter().map(|chunk| logits[chunk.pair]).fold(f32::NEG_INFINITY, f32::max);
        let scores: Vec<f32> = encoded.documents.iter().map(best).collect();
        found += usize::from(scores[1..].iter().all(|&other| scores[0] > other));
        asked += 1;
    }
    eprintln!("{MINILM}: recall@1 on XQuAD en, one of ten: {found} of {asked}");
    assert!(found * 10 >= asked * 9, "recall@1 {found} of {asked}");
}

const MINILM: &str = "ms-marco-MiniLM-L-12-v2";
/// About how many questions of XQuAD are asked without `RERANKD_FULL_EVAL=1`.
const SAMPLE: usize = 10;

/// The pairs of an architecture family and the tensors that `transformers` computed for them.
struct Golden {
    tensors: HashMap<String, Tensor>,
    pairs: Vec<Pair>,
}

impl Golden {
    fn read(family: &str) -> Self {
        let tensors = candle_core::safetensors::load(fixture(family).join("golden.safetensors"), &Device::Cpu).unwrap();
        let integers = |name: String| tensors.get(&name).map(|t| t.to_vec1::<i64>().unwrap());
        let pairs: Vec<Pair> = (0..)
            .map_while(|i| Some((integers(format!("{i}.ids"))?, integers(format!("{i}.type_ids"))?)))
            .map(|(ids, types)| {
                Pair::new(ids.iter().map(|&id| id as u32).collect(), types.iter().map(|&t| t as u8).collect())
            })
            .collect();
        let lengths: Vec<usize> = pairs.iter().map(Pair::tokens).collect();
        assert!(lengths == [4, 5, 17, 31, 32, 64] || lengths == [4, 5, 17, 64, 65, 129], "{family}: {lengths:?}");
        Self { tensors, pairs }
    }

    fn stage(&self, sequence: usize, stage: Stage) -> Vec<f32> {
        let name = match stage {
            Stage::Embeddings => format!("{sequence}.embeddings"),
            Stage::Layer(layer) => format!("{sequence}.layer.{layer}"),
            Stage::FinalNorm => format!("{sequence}.final_norm"),
            Stage::Pooled => format!("{sequence}.pooled"),
            Stage::Logits => format!("{sequence}.logits"),
        };
        self.tensors[&name].flatten_all().unwrap().to_vec1().unwrap()
    }
}

/// A line of golden.jsonl.
#[derive(Deserialize)]
struct Row {
    query: String,
    text: String,
    ids: Vec<u32>,
    type_ids: Vec<u8>,
    logit: f64,
}

impl Row {
    fn into_pair(self) -> Pair {
        Pair::new(self.ids, self.type_ids)
    }
}

fn rows_of_minilm(folder: &Path) -> Vec<Row> {
    let text = fs::read_to_string(folder.join("golden.jsonl")).unwrap();
    text.lines().map(|line| serde_json::from_str(line).unwrap()).collect()
}

fn config(family: &str) -> ModelConfig {
    let read = |file: &str| fs::read_to_string(fixture(family).join(file));
    let modules = read("modules.json").map_or(Vec::new(), |json| parse_modules(&json).unwrap());
    let configs = modules.iter().skip(1).map(|module| read(&format!("{}/config.json", module.path)).unwrap());
    let configs: Vec<String> = configs.collect();
    ModelConfig::parse_with_modules(&read("config.json").unwrap(), &modules, &configs).unwrap()
}

fn weights(family: &str) -> Weights {
    let mut weights = Weights::open(&fixture(family).join("model.safetensors")).unwrap();
    if let Ok(json) = fs::read_to_string(fixture(family).join("modules.json")) {
        for module in parse_modules(&json).unwrap().iter().filter(|module| module.has_weights()) {
            let file = fixture(family).join(&module.path).join("model.safetensors");
            weights.add(&format!("{}/", module.path), &file).unwrap();
        }
    }
    weights
}

/// The weights of a fixture in f32, for candle-transformers.
fn tensors(family: &str) -> VarBuilder<'static> {
    let file = fixture(family).join("model.safetensors");
    VarBuilder::from_buffered_safetensors(fs::read(file).unwrap(), DType::F32, &Device::Cpu).unwrap()
}

fn read_json<T: serde::de::DeserializeOwned>(path: &Path) -> T {
    serde_json::from_str(&fs::read_to_string(path).unwrap()).unwrap()
}

/// The largest absolute difference. NaN counts as infinity; `f32::max` would ignore it.
fn max_difference(ours: &[f32], theirs: &[f32]) -> f32 {
    ours.iter()
        .zip(theirs)
        .map(|(a, b)| (a - b).abs())
        .fold(0.0, |m, d| if d.is_nan() { f32::INFINITY } else { m.max(d) })
}
