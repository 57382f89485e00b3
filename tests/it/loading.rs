//! Damaged model files: each is an error that names the file, the tensor and the expected value, and none is a panic.
//!
//! Every case is a copy of a fixture with one defect, loaded as at server start.

use std::collections::HashMap;
use std::fs;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::{Path, PathBuf};

use candle_core::{DType, Device, Tensor};
use serde_json::{Value, json};
use tempfile::TempDir;

use crate::support::{fixture, load};

const WEIGHTS: &str = "model.safetensors";
const INDEX: &str = "model.safetensors.index.json";
const PICKLE: &str = "pytorch_model.bin";
const SHARD: &str = "model-00001-of-00002.safetensors";
const KEY: &str = "roberta.encoder.layer.1.attention.self.key.weight";
const WORDS: &str = "roberta.embeddings.word_embeddings.weight";

#[test]
fn an_undamaged_copy_loads() {
    for name in [
        "xlmr",
        "xlmr-pickle",
        "xlmr-shards",
        "bert",
        "roberta",
        "modernbert",
        "modernbert-old",
        "ettin",
        "new",
        "electra",
    ] {
        load(Model::copy(name).folder.path()).unwrap();
    }
}

#[test]
fn a_missing_file_is_named_in_the_error() {
    for (file, says) in [
        ("config.json", "config.json"),
        ("tokenizer.json", "tokenizer.json"),
        (WEIGHTS, "expected one of model.safetensors, model.safetensors.index.json, pytorch_model.bin"),
    ] {
        let model = Model::copy("xlmr");
        fs::remove_file(model.path(file)).unwrap();
        model.check_rejected(file, &[says]);
    }
}

#[test]
fn a_wrong_module_is_named_in_the_error() {
    let replaced = |file: &str, from: &str, to: &str, says: &[&str]| {
        let model = Model::copy("ettin");
        let text = fs::read_to_string(model.path(file)).unwrap();
        assert!(text.contains(from), "{file}: {from}");
        fs::write(model.path(file), text.replace(from, to)).unwrap();
        model.check_rejected(file, says);
    };
    replaced("modules.json", "layer_norm.LayerNorm", "normalize.Normalize", &["modules.json", "Normalize"]);
    replaced("1_Pooling/config.json", "\"cls\"", "\"max\"", &["1_Pooling", "pooling_mode", "max"]);
    // A Dense of the wrong size: in its configuration, and in its weights.
    replaced("4_Dense/config.json", "\"in_features\": 64", "\"in_features\": 63", &["4_Dense", "in_features"]);
    replaced("2_Dense/config.json", "\"bias\": false", "\"bias\": true", &["2_Dense/linear.bias", "missing"]);
    replaced(
        "config_sentence_transformers.json",
        "linear.Identity",
        "activation.Softplus",
        &["activation_fn", "Softplus"],
    );
    replaced("config.json", "\"local_attention\": 8", "\"local_attention\": 0", &["local_attention"]);
    for file in ["2_Dense/config.json", "3_LayerNorm/model.safetensors"] {
        let model = Model::copy("ettin");
        fs::remove_file(model.path(file)).unwrap();
        model.check_rejected(file, &[file]);
    }
    // Without the chain, the trunk has no head.
    let model = Model::copy("ettin");
    fs::remove_file(model.path("modules.json")).unwrap();
    model.check_rejected("modules.json", &["head.dense.weight", "missing"]);
}

#[test]
fn a_wrong_tensor_is_named_in_the_error() {
    type Tensors = HashMap<String, Tensor>;
    type Defect = (&'static str, fn(&mut Tensors), &'static [&'static str]);
    let defects: [Defect; 8] = [
        ("missing", |t| drop(t.remove(KEY)), &[KEY, "missing", "[64, 64]"]),
        (
            "extra",
            |t| drop(t.insert("roberta.encoder.layer.3.output.dense.bias".into(), t[KEY].clone())),
            &["roberta.encoder.layer.3.output.dense.bias", "no place"],
        ),
        (
            "one row fewer than the vocabulary",
            |t| drop(t.insert(WORDS.into(), t[WORDS].narrow(0, 0, 299).unwrap())),
            &[WORDS, "[299, 64]", "[300, 64]"],
        ),
        (
            "transposed",
            |t| {
                let name = "roberta.encoder.layer.0.output.dense.weight";
                let transposed = t[name].t().unwrap().contiguous().unwrap();
                t.insert(name.into(), transposed);
            },
            &["roberta.encoder.layer.0.output.dense.weight", "[128, 64]", "[64, 128]"],
        ),
        (
            "two labels in the weights",
            |t| {
                let name = "classifier.out_proj.weight";
                let twice = Tensor::cat(&[&t[name], &t[name]], 0).unwrap();
                t.insert(name.into(), twice);
            },
            &["classifier.out_proj.weight", "[2, 64]", "[1, 64]"],
        ),
        ("a NaN", |t| spoil(t, f32::NAN), &[KEY, "NaN", "element 77"]),
        ("an infinity", |t| spoil(t, f32::NEG_INFINITY), &[KEY, "-inf", "element 77"]),
        (
            "integers",
            |t| drop(t.insert(KEY.into(), t[KEY].to_dtype(DType::I64).unwrap())),
            &[KEY, "I64", "F64, F32, F16 and BF16"],
        ),
    ];
    for (what, damage, says) in defects {
        let model = Model::copy("xlmr");
        let mut tensors = candle_core::safetensors::load(model.path(WEIGHTS), &Device::Cpu).unwrap();
        damage(&mut tensors);
        candle_core::safetensors::save(&tensors, model.path(WEIGHTS)).unwrap();
        model.check_rejected(what, &[&[WEIGHTS], says].concat());
    }
}

#[test]
fn weights_of_another_architecture_are_rejected() {
    let model = Model::copy("xlmr");
    fs::copy(fixture("bert").join(WEIGHTS), model.path(WEIGHTS)).unwrap();
    model.check_rejected("BERT's weights", &[WEIGHTS, WORDS, "missing"]);
}

/// Truncated to each length below 10, to a sample of longer ones, around the start of the data, and before the last byte.
#[test]
fn truncated_safetensors_is_rejected_with_the_file_name() {
    let model = Model::copy("bert");
    let whole = fs::read(model.path(WEIGHTS)).unwrap();
    let data_start = 8 + header_bytes(&whole);
    let edges = [data_start - 1, data_start, data_start + 1, whole.len() - 1];
    for length in (0..10).chain((10..whole.len()).step_by(997)).chain(edges) {
        fs::write(model.path(WEIGHTS), &whole[..length]).unwrap();
        model.check_rejected(
            &format!("cut at {length} of {}", whole.len()),
            &[WEIGHTS, "not a complete safetensors file"],
        );
    }
}

#[test]
fn a_trailing_byte_is_rejected() {
    let model = Model::copy("bert");
    let mut bytes = fs::read(model.path(WEIGHTS)).unwrap();
    let described = bytes.len();
    bytes.push(0);
    fs::write(model.path(WEIGHTS), &bytes).unwrap();
    let (found, described) = (format!("{} bytes", described + 1), described.to_string());
    model.check_rejected("one byte more", &[WEIGHTS, &found, &described]);
}

/// The claimed length must be checked before memory is allocated for it.
#[test]
fn an_impossible_header_length_is_rejected() {
    let model = Model::copy("bert");
    let whole = fs::read(model.path(WEIGHTS)).unwrap();
    let true_length = header_bytes(&whole) as u64;
    for claim in [0, 1, true_length - 1, true_length + 1, whole.len() as u64, 1 << 32, 1 << 63, u64::MAX] {
        let mut bytes = whole.clone();
        bytes[..8].copy_from_slice(&claim.to_le_bytes());
        fs::write(model.path(WEIGHTS), &bytes).unwrap();
        model.check_rejected(&format!("a header of {claim} bytes"), &[WEIGHTS]);
    }
}

#[test]
fn an_inconsistent_safetensors_header_is_rejected() {
    let name = "bert.encoder.layer.0.output.dense.weight";
    type Defect = (&'static str, &'static str, fn(u64, u64) -> Value);
    let defects: [Defect; 9] = [
        ("overlaps its neighbour", "data_offsets", |start, end| json!([start - 2, end - 2])),
        ("leaves a gap", "data_offsets", |start, end| json!([start + 2, end])),
        ("ends before it starts", "data_offsets", |start, end| json!([end, start])),
        ("ends beyond the file", "data_offsets", |start, _| json!([start, 1u64 << 40])),
        ("ends at the largest u64", "data_offsets", |start, _| json!([start, u64::MAX])),
        ("starts before the file", "data_offsets", |_, end| json!([-1, end])),
        ("has more elements than a u64 can count", "shape", |_, _| json!([1u64 << 63, 1u64 << 63])),
        ("has fewer elements than bytes", "shape", |_, _| json!([32, 63])),
        ("is of an unknown type", "dtype", |_, _| json!("F31")),
    ];
    for (what, field, damage) in defects {
        let model = Model::copy("bert");
        let bytes = fs::read(model.path(WEIGHTS)).unwrap();
        let (header, data) = bytes[8..].split_at(header_bytes(&bytes));
        let mut header: Value = serde_json::from_slice(header).unwrap();
        let offsets = header[name]["data_offsets"].clone();
        header[name][field] = damage(offsets[0].as_u64().unwrap(), offsets[1].as_u64().unwrap());
        let header = serde_json::to_vec(&header).unwrap();
        let damaged = [&(header.len() as u64).to_le_bytes(), &header[..], data].concat();
        fs::write(model.path(WEIGHTS), damaged).unwrap();
        model.check_rejected(&format!("a tensor that {what}"), &[WEIGHTS]);
    }
}

#[test]
fn a_config_that_contradicts_the_weights_is_rejected() {
    let changes: [(&str, Value, &[&str]); 9] = [
        ("id2label", json!({"0": "NO", "1": "YES"}), &["config.json", "2 labels", "id2label"]),
        ("model_type", json!("gpt2"), &["config.json", "gpt2", "xlm-roberta"]),
        ("hidden_size", json!(32), &[WEIGHTS, WORDS, "[300, 64]", "[300, 32]"]),
        ("num_hidden_layers", json!(4), &[WEIGHTS, "roberta.encoder.layer.3.", "missing"]),
        ("num_hidden_layers", json!(2), &[WEIGHTS, "roberta.encoder.layer.2.", "no place"]),
        ("max_position_embeddings", json!(514), &[WEIGHTS, "position_embeddings", "[66, 64]", "[514, 64]"]),
        ("pad_token_id", json!(65), &["config.json", "pad_token_id 65"]),
        // The embedding has fewer rows than the tokenizer has ids, so an id would be out of range.
        ("vocab_size", json!(184), &["tokenizer.json", "184"]),
        ("vocab_size", json!(301), &[WEIGHTS, WORDS, "[300, 64]", "[301, 64]"]),
    ];
    for (field, value, says) in changes {
        let model = Model::copy("xlmr");
        let mut config: Value = serde_json::from_slice(&fs::read(model.path("config.json")).unwrap()).unwrap();
        config[field] = value.clone();
        fs::write(model.path("config.json"), config.to_string()).unwrap();
        model.check_rejected(&format!("{field} = {value}"), says);
    }
}

#[test]
fn invalid_json_is_rejected_with_the_file_name() {
    for file in ["config.json", "tokenizer.json"] {
        for content in [&b""[..], b"{", b"null", b"[]", b"{}", b"\xff\xfe\x00"] {
            let model = Model::copy("xlmr");
            fs::write(model.path(file), content).unwrap();
            model.check_rejected(&format!("{file} holds {content:?}"), &[file]);
        }
    }
}

/// Found by fuzzing: these parts are read without an error, and the tokenizer panics when it uses them.
#[test]
fn a_tokenizer_that_panics_is_rejected() {
    // A double array of four units, all zero, and two replacements.
    let map = json!({"type": "Precompiled", "precompiled_charsmap": "EAAAAAAAAAAAAAAAAAAAAAAAAAAgAGEA"});
    let token = json!({"SpecialToken": {"id": "<unknown>", "type_id": 0}});
    let sequence = |id: &str| json!({"Sequence": {"id": id, "type_id": 0}});
    let template = json!({
        "type": "TemplateProcessing", "single": [sequence("A")], "pair": [token, sequence("A"), sequence("B")],
        "special_tokens": {},
    });
    for (part, content) in [("normalizer", map), ("post_processor", template)] {
        let model = Model::copy("xlmr");
        let mut tokenizer: Value = serde_json::from_slice(&fs::read(model.path("tokenizer.json")).unwrap()).unwrap();
        tokenizer[part] = content;
        fs::write(model.path("tokenizer.json"), tokenizer.to_string()).unwrap();
        model.check_rejected(part, &["tokenizer.json", "the tokenizer panicked"]);
    }
}

#[test]
fn a_wrong_shard_index_is_rejected() {
    let index = |shard: &str| json!({"weight_map": {WORDS: shard, KEY: SHARD}}).to_string();
    let outside = |shard: &str| (index(shard), vec![INDEX.to_owned(), format!("{shard:?}")]);
    let cases = [
        outside("../xlmr/model.safetensors"),
        outside("/etc/hostname"),
        outside("below/model.safetensors"),
        outside("./model.safetensors"),
        outside(".."),
        outside(""),
        (index("model-00003-of-00002.safetensors"), vec![INDEX.into(), "model-00003-of-00002.safetensors".into()]),
        (index("config.json"), vec!["config.json".into(), "not a complete safetensors file".into()]),
        // This tensor is in the other shard.
        (json!({"weight_map": {KEY: SHARD, WORDS: other_shard()}}).to_string(), vec![INDEX.into(), "is not in".into()]),
        (json!({"weight_map": {}}).to_string(), vec!["missing".into()]),
        ("{}".into(), vec![INDEX.into(), "not a shard index".into()]),
        ("".into(), vec![INDEX.into(), "not a shard index".into()]),
    ];
    for (content, says) in cases {
        let model = Model::copy("xlmr-shards");
        fs::write(model.path(INDEX), &content).unwrap();
        model.check_rejected(&content, &says.iter().map(String::as_str).collect::<Vec<_>>());
    }
}

#[test]
fn a_tensor_in_two_shards_is_rejected() {
    let model = Model::copy("xlmr-shards");
    fs::copy(model.path(SHARD), model.path(&other_shard())).unwrap();
    model.check_rejected("the same shard twice", &["is in", SHARD, &other_shard()]);
}

/// An empty file, an HTML page, a bare pickle, an empty zip and noise, such as failed downloads leave behind.
#[test]
fn a_pytorch_file_without_a_checkpoint_is_rejected() {
    let model = Model::copy("xlmr-pickle");
    let check = |what: &str, bytes: &[u8]| {
        fs::write(model.path(PICKLE), bytes).unwrap();
        model.check_rejected(what, &[PICKLE]);
    };
    check("empty", b"");
    check("a page of HTML", b"<!doctype html><title>Not found</title>");
    check("a pickle without a zip", b"\x80\x02}q\x00.");
    check("a zip without entries", b"PK\x05\x06\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0");
    let mut noise = 1u64;
    for length in [1, 2, 22, 23, 100, 4096, 70_000] {
        let bytes: Vec<u8> = (0..length).map(|_| next(&mut noise)).collect();
        check(&format!("{length} bytes of noise"), &bytes);
        check(&format!("{length} bytes of noise after a zip's signature"), &[b"PK\x03\x04", &bytes[..]].concat());
    }
}

#[test]
fn a_truncated_pytorch_file_is_rejected() {
    let model = Model::copy("xlmr-pickle");
    let whole = fs::read(model.path(PICKLE)).unwrap();
    for length in (0..whole.len()).step_by(4999).chain([whole.len() - 23, whole.len() - 1]) {
        fs::write(model.path(PICKLE), &whole[..length]).unwrap();
        model.check_rejected(&format!("cut at {length} of {}", whole.len()), &[PICKLE]);
    }
}

/// A changed byte may only change a weight, so loading may succeed. It must not panic.
#[test]
fn a_changed_byte_in_a_pytorch_file_never_panics() {
    let model = Model::copy("xlmr-pickle");
    let whole = fs::read(model.path(PICKLE)).unwrap();
    // The pickle program comes first and the zip directory last, with the weights between them.
    let (program, directory) = (0..14_000, whole.len() - 10_000..whole.len());
    let mut noise = 1u64;
    for at in program.step_by(97).chain(directory.step_by(89)) {
        let mut bytes = whole.clone();
        bytes[at] ^= next(&mut noise) | 1;
        fs::write(model.path(PICKLE), &bytes).unwrap();
        let answer = catch_unwind(AssertUnwindSafe(|| load(model.folder.path()).map(drop)));
        assert!(answer.is_ok(), "byte {at} changed from {} to {}: loading panicked", whole[at], bytes[at]);
    }
}

/// Two single-byte changes on which candle 0.11.1's reader panics, found by changing every byte of this file.
#[test]
fn pickles_that_make_candle_panic_are_rejected() {
    let whole = fs::read(fixture("xlmr-pickle").join(PICKLE)).unwrap();
    let find = |pattern: &[u8]| whole.windows(pattern.len()).position(|window| window == pattern).unwrap();
    for (what, at, opcode) in [
        // BININT1 64, the size of a storage, becomes PROTO 64: the storage tuple lacks a field.
        ("a storage of four fields", find(b"h\x06K@tq") + 2, 0x80),
        // BINPUT 17 becomes LONG1 of 17 bytes, which overflows an i64. It panics in builds with overflow checks.
        ("an integer of 17 bytes", find(b"\x86q\x11") + 1, 0x8a),
    ] {
        let model = Model::copy("xlmr-pickle");
        let mut bytes = whole.clone();
        bytes[at] = opcode;
        fs::write(model.path(PICKLE), &bytes).unwrap();
        model.check_rejected(what, &[PICKLE]);
    }
}

/// A copy of a fixture that a test may damage.
struct Model {
    folder: TempDir,
}

impl Model {
    fn copy(name: &str) -> Self {
        let folder = tempfile::tempdir().unwrap();
        copy_files(&fixture(name), folder.path());
        Self { folder }
    }

    fn path(&self, file: &str) -> PathBuf {
        self.folder.path().join(file)
    }

    /// Checks that loading fails with a message that contains each of `says`.
    fn check_rejected(&self, what: &str, says: &[&str]) {
        let error = match load(self.folder.path()) {
            Ok(_) => panic!("{what}: the model was loaded"),
            Err(error) => format!("{error:#}"),
        };
        for expected in says {
            assert!(error.contains(expected), "{what}: the error does not say {expected:?}: {error}");
        }
    }
}

fn copy_files(from: &Path, to: &Path) {
    for entry in fs::read_dir(from).unwrap() {
        let entry = entry.unwrap();
        let to = to.join(entry.file_name());
        if entry.file_type().unwrap().is_dir() {
            fs::create_dir(&to).unwrap();
            copy_files(&entry.path(), &to);
        } else {
            fs::copy(entry.path(), to).unwrap();
        }
    }
}

fn other_shard() -> String {
    SHARD.replacen('1', "2", 1)
}

fn spoil(tensors: &mut HashMap<String, Tensor>, value: f32) {
    let mut values = tensors[KEY].flatten_all().unwrap().to_vec1::<f32>().unwrap();
    values[77] = value;
    tensors.insert(KEY.into(), Tensor::from_vec(values, tensors[KEY].shape(), &Device::Cpu).unwrap());
}

fn header_bytes(file: &[u8]) -> usize {
    u64::from_le_bytes(file[..8].try_into().unwrap()).try_into().unwrap()
}

/// The next byte of a linear congruential generator, the same on every machine.
fn next(state: &mut u64) -> u8 {
    *state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
    (*state >> 56) as u8
}
