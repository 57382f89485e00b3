//! The CUDA backend without a card: the shipped binary on a stand-in driver, which runs the kernels of `src/backend/cuda/kernels/kernels.cu`
//! on the processor (tests/cuda/standin), and the kernels by themselves (tests/cuda/check.sh).

#![cfg(feature = "cuda")]

#[path = "common/server.rs"]
mod server;

use std::io::Write;
use std::path::{Path, PathBuf};
use std::process::{Command, Output, Stdio};

use serde_json::{Value, json};
use server::{Server, rerankd};

const SOURCES: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/tests/cuda");

/// The stand-in's libraries, built by whichever test comes first and again when their sources change, or `None` where there is
/// no compiler for them.
fn standin() -> Option<PathBuf> {
    let folder = Path::new(env!("CARGO_TARGET_TMPDIR")).join("cuda-standin");
    std::fs::create_dir_all(&folder).unwrap();
    let lock = std::fs::File::create(folder.join("lock")).unwrap();
    lock.lock().unwrap(); // each test is a process of its own
    let script = Path::new(SOURCES).join("standin/build.sh");
    let changed = |path: &Path| std::fs::metadata(path).and_then(|file| file.modified()).ok();
    let built = changed(&folder.join("libcublasLt.so.13"));
    let sources = std::fs::read_dir(script.parent().unwrap()).unwrap().map(|entry| entry.unwrap().path());
    if built.is_none() || sources.map(|source| changed(&source)).max().unwrap() > built {
        let output = Command::new(script).arg(&folder).output().unwrap();
        assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
        if String::from_utf8_lossy(&output.stdout).contains("SKIPPED") {
            eprintln!("SKIPPED: no g++, which builds the stand-in driver");
            return None;
        }
    }
    Some(folder)
}

/// What makes the binary see the stand-in. `cache` is where it keeps compiled kernels. Products are the library's: our own kernel
/// is slow on the emulator, and has a test of its own.
fn environment(cache: &str) -> Option<[(&'static str, String); 3]> {
    let cache = Path::new(env!("CARGO_TARGET_TMPDIR")).join(cache);
    Some([
        ("LD_LIBRARY_PATH", standin()?.display().to_string()),
        ("RERANKD_CUDA_CACHE", cache.display().to_string()),
        ("RERANKD_CUDA_GEMM", "cublaslt".to_owned()),
    ])
}

/// Runs the binary on the stand-in, or not at all where that cannot be built.
fn on_standin(arguments: &[&str], faults: &[(&str, &str)], input: &str) -> Option<Output> {
    let environment = environment("cuda-cache")?;
    let mut command = rerankd();
    command.args(arguments).envs(environment).envs(faults.iter().copied());
    let mut child = command.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap();
    child.stdin.take().unwrap().write_all(input.as_bytes()).ok(); // it may not read any
    Some(child.wait_with_output().unwrap())
}

/// Pairs of awkward lengths: around a warp, a step of keys, a tile of queries.
const LENGTHS: [usize; 9] = [1, 5, 63, 64, 65, 127, 128, 129, 200];

/// A file of one workload for `rerankd bench`.
fn workloads(folder: &Path) -> String {
    let pair = |(i, &n): (usize, &usize)| (0..n).map(|j| 5 + (i * 31 + j * 17) % 900).collect::<Vec<_>>();
    let pairs: Vec<Vec<usize>> = LENGTHS.iter().enumerate().map(pair).collect();
    let path = folder.join("workloads.json");
    std::fs::write(&path, json!({ "all": pairs, "two": &pairs[3..5] }).to_string()).unwrap();
    path.to_str().unwrap().to_owned()
}

/// The logits of each turn.
fn logits(output: &Output) -> Vec<Vec<f64>> {
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    let lines = String::from_utf8_lossy(&output.stdout);
    let answers = lines.lines().map(|line| serde_json::from_str::<Value>(line).unwrap());
    let numbers = |answer: &Value| answer["logits"].as_array().unwrap().iter().map(|x| x.as_f64().unwrap()).collect();
    answers.skip(1).map(|answer| numbers(&answer)).collect()
}

const ALL: &str = "{\"workload\":\"all\",\"runs\":1}\n";

fn largest_difference(a: &[f64], b: &[f64]) -> f64 {
    assert_eq!(a.len(), b.len());
    a.iter().zip(b).map(|(a, b)| (a - b).abs()).fold(0.0, f64::max)
}

/// Arguments of a run that answers questions about `file`, small enough for an emulated card.
fn bench<'a>(file: &'a str, dtype: &'a str, batch_tokens: &'a str) -> Vec<&'a str> {
    let device = ["bench", "--json", "--workloads", file, "--device", "cuda"];
    [&device[..], &["--dtype", dtype, "--max-batch-tokens", batch_tokens]].concat()
}

/// The processor's own logits in f32.
fn expected(file: &str) -> Vec<f64> {
    let mut child = rerankd();
    child.args(["bench", "--json", "--workloads", file, "--dtype", "f32"]);
    let mut child = child.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap();
    child.stdin.take().unwrap().write_all(ALL.as_bytes()).unwrap();
    logits(&child.wait_with_output().unwrap()).remove(0)
}

#[test]
fn logits_on_the_stand_in_are_those_of_the_processor() {
    let folder = tempfile::tempdir().unwrap();
    let file = workloads(folder.path());
    // What is multiplied is known to 2^-24, 2^-11, 2^-8 and 2^-4 of itself, and logits of a few units to as much of some of
    // the terms that they are sums of. On the stand-in: 2.4e-6, 2.6e-3, 3.8e-2 and 0.25.
    for (dtype, bound) in [("f32", 1e-4), ("f16", 0.02), ("bf16", 0.15), ("fp8", 0.75)] {
        // The same question thrice: kernel by kernel, while a graph is recorded, and from the graph.
        let Some(output) = on_standin(&bench(&file, dtype, "512"), &[], &ALL.repeat(5)) else { return };
        let ours = logits(&output);
        let difference = largest_difference(&ours[0], &expected(&file));
        eprintln!("{dtype}: largest difference of a logit {difference:.2e}");
        assert!(difference < bound, "{dtype}: {difference} from the processor's f32: {:?}", ours[0]);
        assert!(ours.iter().all(|again| *again == ours[0]), "{dtype}: a graph computes what its launches do");
    }
}

#[test]
fn operations_are_timed_by_the_card_s_own_clock() {
    let folder = tempfile::tempdir().unwrap();
    let file = workloads(folder.path());
    let arguments = ["bench", "--profile", "--runs", "2", "--workloads", &file, "--device", "cuda", "--dtype", "fp8"];
    let Some(output) = on_standin(&[&arguments[..], &["--max-batch-tokens", "64"]].concat(), &[], "") else { return };
    let table = String::from_utf8(output.stdout).unwrap();
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    assert!(table.starts_with("Measured peak of this device: ") && table.contains(" GB/s."), "{table}");
    // One batch, of three layers that attend and one that does for first tokens.
    let two = table.split("\ntwo: 2 pairs, 129 tokens").nth(1).unwrap();
    for (name, calls) in [("attention", 3), ("layer norm", 6), ("CLS: attention", 1), ("embeddings", 1)] {
        let row: Vec<&str> = two.lines().find_map(|line| line.strip_prefix(name)).unwrap().split_whitespace().collect();
        assert_eq!(row[0], calls.to_string(), "{table}");
        let [milliseconds, least] = [row[1], row[3]].map(|cell| cell.parse::<f64>().unwrap());
        assert!(milliseconds > 0.0 && least >= 0.0, "{table}");
    }
}

#[test]
fn several_cards_and_the_invariant_mode_give_the_same_scores() {
    let folder = tempfile::tempdir().unwrap();
    let file = workloads(folder.path());
    let Some(one) = on_standin(&bench(&file, "f16", "256"), &[], ALL) else { return };
    let mut two = bench(&file, "f16", "256");
    two[5] = "cuda:0,cuda:1";
    let two = on_standin(&two, &[("STANDIN_DEVICES", "2")], ALL).unwrap();
    assert_eq!(logits(&one), logits(&two));
    for dtype in ["f16", "fp8"] {
        let invariant = [&bench(&file, dtype, "256")[..], &["--batch-invariant"]].concat();
        let alone = "{\"workload\":\"two\",\"runs\":1}\n";
        let invariant = logits(&on_standin(&invariant, &[], &format!("{ALL}{alone}")).unwrap());
        assert_eq!(invariant[0][3..5], invariant[1], "{dtype}: a pair's score does not depend on its company");
    }
}

#[test]
fn a_card_with_little_memory_takes_smaller_batches() {
    let folder = tempfile::tempdir().unwrap();
    let file = workloads(folder.path());
    let Some(whole) = on_standin(&bench(&file, "f16", "4096"), &[], ALL) else { return };
    // Weights take 15 MiB, a lane 32 for its workspace and 38 for 4096 tokens: a second lane for fewer, and only one, for fewer.
    for memory in ["150", "75"] {
        let little = on_standin(&bench(&file, "f16", "4096"), &[("STANDIN_MEMORY_MIB", memory)], ALL).unwrap();
        assert_eq!(logits(&whole), logits(&little), "{memory} MiB");
        let log = String::from_utf8_lossy(&little.stderr);
        assert!(log.contains("tokens at a time"), "{memory} MiB, and start-up says so: {log}");
    }
}

#[test]
fn a_pair_that_no_memory_is_left_for_is_told_to_try_later_and_the_others_are_answered() {
    let Some(environment) = environment("cuda-cache") else { return };
    let mut environment: Vec<(&str, &str)> = environment.iter().map(|(name, value)| (*name, value.as_str())).collect();
    environment.push(("STANDIN_MEMORY_MIB", "50"));
    let server = Server::start_in(&["--device", "cuda", "--max-batch-tokens", "4096"], &environment);
    let ask = |document: &str| {
        server.rerank(&format!(r#"{{"model":"rerankd-mini","query":"Apple","documents":["{document}"]}}"#))
    };
    let long = ask(&"apple ".repeat(400));
    assert!(long.starts_with("HTTP/1.1 503") && long.contains("memory"), "{long}");
    let short = ask("apple");
    assert!(short.starts_with("HTTP/1.1 200"), "{short}");
}

#[test]
fn a_card_that_cannot_be_used_is_a_clear_error() {
    let run = |arguments: &[&str], faults: &[(&str, &str)]| {
        let output = on_standin(&[&["rank", "--query", "a"], arguments].concat(), faults, "b")?;
        Some((output.status.code(), String::from_utf8_lossy(&output.stderr).into_owned()))
    };
    for (arguments, faults, named) in [
        (&["--device", "cuda:1"][..], &[][..], "cuda:1"),
        (&["--device", "cuda"], &[("STANDIN_CAPABILITY", "7.5")], "8.0"),
        (&["--device", "cuda", "--dtype", "fp8"], &[("STANDIN_CAPABILITY", "8.6")], "--dtype f16"),
        (&["--device", "cuda"], &[("STANDIN_DRIVER_VERSION", "11080")], "11.8"),
        (&["--device", "cuda"], &[("STANDIN_DRIVER_VERSION", "12080")], "of CUDA 13, which it does not run"),
        (&["--device", "cuda"], &[("STANDIN_MEMORY_MIB", "8")], "memory"),
    ] {
        let Some((code, message)) = run(arguments, faults) else { return };
        assert_eq!(code, Some(78), "{arguments:?} {faults:?}: {message}");
        assert!(message.contains(named), "{arguments:?} {faults:?}: {message}");
    }
}

#[test]
fn a_poisoned_context_answers_and_ends_the_process() {
    let Some(environment) = environment("cuda-cache") else { return };
    let mut environment: Vec<(&str, &str)> = environment.iter().map(|(name, value)| (*name, value.as_str())).collect();
    environment.push(("STANDIN_FAIL", "launch:120"));
    let mut server = Server::start_in(&["--device", "cuda", "--max-batch-tokens", "256"], &environment);
    let ask = r#"{"model":"rerankd-mini","query":"Apple","documents":["apple","banana"]}"#;
    let last = (0..20).map(|_| server.rerank(ask)).find(|answer| !answer.starts_with("HTTP/1.1 200"));
    let last = last.expect("the launch that fails is among those of twenty requests");
    assert!(last.starts_with("HTTP/1.1 500"), "the request that met it is answered: {last}");
    assert_eq!(server.exit_code(), Some(70));
}

/// The driver's exit handlers may wait for a card that never answers.
#[test]
fn a_process_whose_end_hangs_is_ended() {
    let Some(environment) = environment("cuda-cache") else { return };
    let mut environment: Vec<(&str, &str)> = environment.iter().map(|(name, value)| (*name, value.as_str())).collect();
    environment.extend([("STANDIN_FAIL", "launch:120"), ("STANDIN_HANG_AT_EXIT", "1")]);
    let mut server = Server::start_in(&["--device", "cuda", "--max-batch-tokens", "256"], &environment);
    let ask = r#"{"model":"rerankd-mini","query":"Apple","documents":["apple","banana"]}"#;
    assert!((0..20).any(|_| server.rerank(ask).starts_with("HTTP/1.1 500")));
    assert_eq!(server.exit_code(), None, "by a signal, since it did not come to its exit code");
    assert!(server.rest_of_log().contains("ending with code 70"));
}

/// A host with a card and without CUDA's libraries (the image's `cpu` target, say), with an old card, or with libraries that its
/// driver does not run.
#[test]
fn auto_is_the_card_where_its_libraries_are_and_the_processor_elsewhere() {
    let Some([(_, whole), ..]) = environment("cuda-cache") else { return };
    let half = tempfile::tempdir().unwrap();
    std::fs::copy(Path::new(&whole).join("libcuda.so.1"), half.path().join("libcuda.so.1")).unwrap();
    let log = |libraries: &str, fault: &[(&str, &str)]| {
        let faults = [&[("LD_LIBRARY_PATH", libraries), ("RERANKD_LOG", "debug")], fault].concat();
        let arguments = ["rank", "--query", "a", "--device", "auto", "--max-batch-tokens", "64"];
        let output = on_standin(&arguments, &faults, "b").unwrap();
        assert!(output.status.success());
        String::from_utf8_lossy(&output.stderr).into_owned()
    };
    assert!(log(&whole, &[]).contains("CUDA, f16"));
    for (libraries, fault, reason) in [
        (half.path().to_str().unwrap(), ("", ""), "libnvrtc.so and libcublasLt.so"),
        (&whole, ("STANDIN_CAPABILITY", "7.5"), "compute capability 7.5"),
        (&whole, ("STANDIN_DRIVER_VERSION", "12080"), "of CUDA 13, which it does not run"),
    ] {
        let log = log(libraries, &[fault]);
        assert!(log.contains(reason) && log.contains("CPU, "), "{log}");
    }
}

#[test]
fn compiled_kernels_are_kept_for_the_next_start() {
    let Some(environment) = environment("cuda-cache-once") else { return };
    std::fs::remove_dir_all(&environment[1].1).ok();
    let start = || {
        let mut command = rerankd();
        command.args(["rank", "--query", "a", "--device", "cuda", "--max-batch-tokens", "64"]);
        command.envs(environment.clone()).stdin(Stdio::null());
        let output = command.arg(concat!(env!("CARGO_MANIFEST_DIR"), "/Dockerfile")).output().unwrap();
        assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
        String::from_utf8_lossy(&output.stderr).contains("compiled the CUDA kernels")
    };
    assert!(start());
    assert!(!start());
}

/// The shapes of the built-in model's products, and no others: what is timed is what batches launch.
#[test]
fn what_the_first_batch_launches_is_what_is_tuned() {
    let Some(mut environment) = environment("cuda-cache") else { return };
    let cache = tempfile::tempdir().unwrap();
    environment[1].1 = cache.path().display().to_string();
    let mut command = rerankd();
    command.args(["rank", "--query", "a", "--device", "cuda", "--max-batch-tokens", "160"]);
    command.envs(environment).stdin(Stdio::null()).arg(concat!(env!("CARGO_MANIFEST_DIR"), "/Dockerfile"));
    let output = command.output().unwrap();
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    let named = |path: &Path| path.file_name().unwrap().to_str().unwrap().starts_with("products-");
    let files = std::fs::read_dir(cache.path()).unwrap().map(|entry| entry.unwrap().path());
    let file = files.into_iter().find(|path| named(path)).unwrap();
    let tuned: serde_json::Map<String, Value> = serde_json::from_slice(&std::fs::read(file).unwrap()).unwrap();
    // Rows, outputs, inputs: Q K V, Q of first tokens, their K and V, what follows attention, and the two of the feed-forward.
    let shapes =
        ["768 x 256 Bias", "256 x 256 Bias", "512 x 256 Bias", "256 x 256 BiasResidual", "1024 x 256 BiasGelu"];
    let shapes = [&shapes[..], &["256 x 1024 BiasResidual"]].concat();
    let expected = [64, 128].iter().flat_map(|rows| shapes.iter().map(move |shape| format!("{rows} x {shape}")));
    let mut expected: Vec<String> = expected.collect();
    expected.sort();
    let tuned: Vec<String> = tuned.into_iter().map(|(key, _)| key).collect();
    assert_eq!(tuned, expected);
}

#[test]
fn attention_on_wgmma_is_chosen_where_it_agrees_and_is_faster() {
    let folder = tempfile::tempdir().unwrap();
    let file = workloads(folder.path());
    let expected = expected(&file);
    for (i, (fault, chosen, said)) in [
        (("", ""), "attention_wgmma", "attention runs on the kernel attention_wgmma"),
        (("STANDIN_CXXFLAGS", "-DEMULATED_WGMMA_WRONG"), "attention", "gives other results"),
        (("STANDIN_CXXFLAGS", "-DEMULATED_WGMMA_SLOW"), "attention", "attention runs on the kernel attention"),
        (("RERANKD_CUDA_ATTENTION", "mma"), "attention", ""),
        (("STANDIN_CAPABILITY", "8.0"), "attention", ""),
    ]
    .into_iter()
    .enumerate()
    {
        // A cache of its own: its key does not know the fault.
        let (cache, launches) = (folder.path().join(i.to_string()), folder.path().join(format!("{i}.log")));
        let mut faults =
            vec![("RERANKD_CUDA_CACHE", cache.to_str().unwrap()), ("STANDIN_LOG", launches.to_str().unwrap())];
        faults.extend(Some(fault).filter(|(name, _)| !name.is_empty()));
        let Some(output) = on_standin(&bench(&file, "f16", "1024"), &faults, ALL) else { return };
        let log = String::from_utf8_lossy(&output.stderr);
        assert!(log.contains(said), "{fault:?}: {log}");
        assert!(largest_difference(&logits(&output)[0], &expected) < 0.02, "{fault:?}");
        let launches = std::fs::read_to_string(launches).unwrap();
        let last = launches.lines().rfind(|line| line.starts_with("launch attention")).unwrap();
        assert_eq!(last.split(' ').nth(1), Some(chosen), "{fault:?}");
    }
}

#[test]
fn products_are_of_our_own_kernel_where_it_agrees_with_the_library() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("workloads.json");
    let pairs: Vec<Vec<u32>> = [40, 70].iter().map(|&tokens| (0..tokens).map(|i| 5 + i * 37 % 900).collect()).collect();
    std::fs::write(&path, json!({ "all": pairs }).to_string()).unwrap();
    let file = path.to_str().unwrap();
    let expected = expected(file);
    for (i, (wanted, fault, takes_ours, said)) in [
        ("custom", "", true, ""),
        ("custom", "-DEMULATED_WGMMA_WRONG", false, "gives other results than the library"),
        ("cublaslt", "", false, ""),
    ]
    .into_iter()
    .enumerate()
    {
        let (cache, launches) = (folder.path().join(i.to_string()), folder.path().join(format!("{i}.log")));
        let faults = [
            ("RERANKD_CUDA_CACHE", cache.to_str().unwrap()),
            ("STANDIN_LOG", launches.to_str().unwrap()),
            ("RERANKD_CUDA_GEMM", wanted),
            ("RERANKD_CUDA_ATTENTION", "mma"),
            ("STANDIN_CXXFLAGS", fault),
        ];
        let Some(output) = on_standin(&bench(file, "f16", "128"), &faults, ALL) else { return };
        let log = String::from_utf8_lossy(&output.stderr);
        assert!(log.contains(said), "{wanted} {fault}: {log}");
        assert!(largest_difference(&logits(&output)[0], &expected) < 0.02, "{wanted} {fault}");
        let launches = std::fs::read_to_string(launches).unwrap();
        let last_batch = &launches[launches.rfind("launch embed_norm").unwrap()..];
        assert_eq!(last_batch.contains("launch gemm_wgmma"), takes_ours, "{wanted} {fault}");
    }
}

/// Every kernel against its definition at awkward lengths. Without --quick the script takes more shapes, and plants bugs.
#[test]
fn kernels_agree_with_their_definitions() {
    let output = Command::new(Path::new(SOURCES).join("check.sh")).arg("--quick").output().unwrap();
    eprintln!("{}", String::from_utf8_lossy(&output.stdout));
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
}
