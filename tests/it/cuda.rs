//! The CUDA backend without a GPU: the binary on a stand-in driver that runs the kernels of `src/backend/cuda/kernels` on the CPU
//! (tests/cuda/standin), and the kernels alone on an emulator (tests/cuda/check.sh). See tests/cuda/README.md.

use std::io::Write;
use std::path::{Path, PathBuf};
use std::process::{Command, Output, Stdio};
use std::time::{Duration, Instant};

use serde_json::{Value, json};

use crate::support::server::{Server, rerankd};
use crate::support::{fixture, skip};

const SOURCES: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/tests/cuda");

/// The folder of the stand-in's libraries. The first test builds them, and again when their sources change. `None` without g++.
fn standin() -> Option<PathBuf> {
    let folder = Path::new(env!("CARGO_TARGET_TMPDIR")).join("cuda-standin");
    std::fs::create_dir_all(&folder).unwrap();
    let lock = std::fs::File::create(folder.join("lock")).unwrap();
    lock.lock().unwrap(); // test runners may use a process per test
    let script = Path::new(SOURCES).join("standin/build.sh");
    let modified = |path: &Path| std::fs::metadata(path).and_then(|file| file.modified()).ok();
    let built = modified(&folder.join("libcublasLt.so.13"));
    let sources = std::fs::read_dir(script.parent().unwrap()).unwrap().map(|entry| entry.unwrap().path());
    if built.is_none() || sources.map(|source| modified(&source)).max().unwrap() > built {
        let output = Command::new(script).arg(&folder).output().unwrap();
        assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
        if String::from_utf8_lossy(&output.stdout).contains("SKIPPED") {
            skip("cuda_standin", "no g++, which builds the stand-in driver");
            return None;
        }
    }
    Some(folder)
}

/// Environment variables that make the binary load the stand-in. `cache` is the folder for compiled kernels. GEMMs use cuBLASLt,
/// as the custom kernel is slow on the emulator and has its own test.
fn environment(cache: &str) -> Option<[(&'static str, String); 3]> {
    let cache = Path::new(env!("CARGO_TARGET_TMPDIR")).join(cache);
    Some([
        ("LD_LIBRARY_PATH", standin()?.display().to_string()),
        ("RERANKD_CUDA_CACHE", cache.display().to_string()),
        ("RERANKD_CUDA_GEMM", "cublaslt".to_owned()),
    ])
}

/// Runs the binary on the stand-in. `None` if the stand-in cannot be built.
fn on_standin(arguments: &[&str], faults: &[(&str, &str)], input: &str) -> Option<Output> {
    let environment = environment("cuda-cache")?;
    let mut command = rerankd();
    command.args(arguments).envs(environment).envs(faults.iter().copied());
    let mut child = command.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap();
    child.stdin.take().unwrap().write_all(input.as_bytes()).ok(); // the process may exit before it reads
    Some(child.wait_with_output().unwrap())
}

/// Lengths of pairs: short ones, and around a step of 64 keys and tiles of 64 and 128 queries.
const LENGTHS: [usize; 9] = [1, 5, 63, 64, 65, 127, 128, 129, 200];

/// Writes a workload file for `rerankd bench` and returns its path.
fn workloads(folder: &Path) -> String {
    let pair = |(i, &n): (usize, &usize)| (0..n).map(|j| 5 + (i * 31 + j * 17) % 900).collect::<Vec<_>>();
    let pairs: Vec<Vec<usize>> = LENGTHS.iter().enumerate().map(pair).collect();
    let path = folder.join("workloads.json");
    std::fs::write(&path, json!({ "all": pairs, "two": &pairs[3..5] }).to_string()).unwrap();
    path.to_str().unwrap().to_owned()
}

/// The logits of each answer of `bench --json`. Its first line says only that the model has loaded.
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

/// Arguments of `bench --json` on the stand-in.
fn bench<'a>(file: &'a str, dtype: &'a str, batch_tokens: &'a str) -> Vec<&'a str> {
    let device = ["bench", "--json", "--workloads", file, "--device", "cuda"];
    [&device[..], &["--dtype", dtype, "--max-batch-tokens", batch_tokens]].concat()
}

/// Logits of the CPU backend in f32.
fn expected(file: &str) -> Vec<f64> {
    let mut child = rerankd();
    child.args(["bench", "--json", "--workloads", file, "--dtype", "f32"]);
    let mut child = child.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap();
    child.stdin.take().unwrap().write_all(ALL.as_bytes()).unwrap();
    logits(&child.wait_with_output().unwrap()).remove(0)
}

#[test]
fn logits_agree_with_the_cpu_backend() {
    let folder = tempfile::tempdir().unwrap();
    let file = workloads(folder.path());
    // GEMM operands have relative errors of 2^-24, 2^-11, 2^-8 and 2^-4. A logit is a sum of terms of magnitude 1 to 10, each with
    // such an error. Largest differences measured on the stand-in: 2.4e-6, 2.6e-3, 3.8e-2 and 0.25.
    for (dtype, bound) in [("f32", 1e-4), ("f16", 0.02), ("bf16", 0.15), ("fp8", 0.75)] {
        // Repeated: launched kernel by kernel, captured as a graph, and replayed.
        let Some(output) = on_standin(&bench(&file, dtype, "512"), &[], &ALL.repeat(5)) else { return };
        let answers = logits(&output);
        let difference = largest_difference(&answers[0], &expected(&file));
        eprintln!("{dtype}: largest difference of a logit {difference:.2e}");
        assert!(difference < bound, "{dtype}: {difference} from f32 on the CPU: {:?}", answers[0]);
        assert!(answers.iter().all(|answer| *answer == answers[0]), "{dtype}: a replayed graph gives the same bits");
    }
}

/// Rotary positions, windows, gated layers, pre-norms, mean pooling, and classification heads with norms. fp8 refuses gated layers.
#[test]
fn logits_of_newer_encoders_agree_with_the_cpu_backend() {
    let folder = tempfile::tempdir().unwrap();
    let pair = |(i, &n): (usize, &usize)| (0..n).map(|j| 5 + (i * 31 + j * 17) % 290).collect::<Vec<_>>();
    let pairs: Vec<Vec<usize>> = LENGTHS.iter().enumerate().map(pair).collect();
    let path = folder.path().join("workloads.json");
    std::fs::write(&path, json!({ "all": pairs }).to_string()).unwrap();
    let file = path.to_str().unwrap();
    for family in ["modernbert", "ettin", "new"] {
        let model = fixture(family).to_str().unwrap().to_owned();
        let with_model = |arguments: Vec<&str>| {
            let arguments: Vec<String> = arguments.into_iter().map(str::to_owned).collect();
            [arguments, vec!["--model".to_owned(), model.clone()]].concat()
        };
        let mut cpu = rerankd();
        cpu.args(with_model(vec!["bench", "--json", "--workloads", file, "--dtype", "f32"]));
        let mut cpu = cpu.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap();
        cpu.stdin.take().unwrap().write_all(ALL.as_bytes()).unwrap();
        let expected = logits(&cpu.wait_with_output().unwrap()).remove(0);
        // As above, for logits of about 1.
        for (dtype, bound) in [("f32", 1e-4), ("f16", 0.01), ("bf16", 0.06)] {
            let arguments = with_model(bench(file, dtype, "512"));
            let arguments: Vec<&str> = arguments.iter().map(String::as_str).collect();
            let Some(output) = on_standin(&arguments, &[], &ALL.repeat(2)) else { return };
            for answer in logits(&output) {
                let difference = largest_difference(&answer, &expected);
                eprintln!("{family}, {dtype}: largest difference from the CPU backend {difference:e}");
                assert!(difference < bound, "{family}, {dtype}: {difference}");
            }
        }
        let arguments = with_model(bench(file, "fp8", "512"));
        let arguments: Vec<&str> = arguments.iter().map(String::as_str).collect();
        let Some(output) = on_standin(&arguments, &[], ALL) else { return };
        let error = String::from_utf8_lossy(&output.stderr).into_owned();
        assert!(!output.status.success() && error.contains("gated") && error.contains("--dtype f16"), "{error}");
    }
}

#[test]
fn a_profile_lists_every_operation_with_its_time() {
    let folder = tempfile::tempdir().unwrap();
    let file = workloads(folder.path());
    let arguments = ["bench", "--profile", "--runs", "2", "--workloads", &file, "--device", "cuda", "--dtype", "fp8"];
    let Some(output) = on_standin(&[&arguments[..], &["--max-batch-tokens", "64"]].concat(), &[], "") else { return };
    let table = String::from_utf8(output.stdout).unwrap();
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    assert!(table.starts_with("Measured device maximum: ") && table.contains(" GB/s of memory bandwidth."), "{table}");
    // One batch: three layers with full attention, and a last layer that computes CLS tokens only.
    let two = table.split("\ntwo: 2 pairs, 129 tokens").nth(1).unwrap();
    for (name, calls) in [("attention", 3), ("layer norm", 6), ("CLS: attention", 1), ("embeddings", 1)] {
        let row: Vec<&str> = two.lines().find_map(|line| line.strip_prefix(name)).unwrap().split_whitespace().collect();
        assert_eq!(row[0], calls.to_string(), "{table}");
        let [milliseconds, least] = [row[1], row[3]].map(|cell| cell.parse::<f64>().unwrap());
        assert!(milliseconds >= 0.0 && least >= 0.0, "{table}");
    }
}

#[test]
fn two_devices_and_batch_invariant_mode_give_the_same_scores() {
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
        assert_eq!(invariant[0][3..5], invariant[1], "{dtype}: a pair has the same score in any batch");
    }
}

#[test]
fn a_device_with_little_memory_splits_batches() {
    let folder = tempfile::tempdir().unwrap();
    let file = workloads(folder.path());
    let Some(whole) = on_standin(&bench(&file, "f16", "4096"), &[], ALL) else { return };
    // The weights take 15 MiB, and a context for 4096 tokens 32 + 38 MiB. 150 MiB hold one such context and a smaller one; 75 MiB
    // hold only one smaller context.
    for memory in ["150", "75"] {
        let little = on_standin(&bench(&file, "f16", "4096"), &[("STANDIN_MEMORY_MIB", memory)], ALL).unwrap();
        assert_eq!(logits(&whole), logits(&little), "{memory} MiB");
        let log = String::from_utf8_lossy(&little.stderr);
        assert!(log.contains("tokens at a time"), "{memory} MiB: the log must mention it: {log}");
    }
}

#[test]
fn a_pair_that_does_not_fit_in_memory_gets_503_and_others_are_answered() {
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
    // The thread that reads the GPU's memory use from the driver may not have run yet.
    let deadline = Instant::now() + Duration::from_secs(60);
    let samples = loop {
        let answer = server.request("GET /metrics HTTP/1.1\r\nhost: localhost\r\nconnection: close\r\n\r\n");
        let gpu = answer.lines().filter(|line| line.starts_with("rerankd_gpu_memory_"));
        let samples: Vec<String> = gpu.map(str::to_owned).collect();
        if samples.len() == 2 {
            break samples;
        }
        assert!(Instant::now() < deadline, "no metrics of the GPU's memory: {answer}");
        std::thread::sleep(Duration::from_millis(50));
    };
    let total = format!("rerankd_gpu_memory_total_bytes{{gpu=\"0\"}} {}", 50 << 20);
    assert!(samples.contains(&total), "{samples:?}");
    let used = samples.iter().find_map(|line| line.strip_prefix("rerankd_gpu_memory_used_bytes{gpu=\"0\"} "));
    assert!(used.unwrap().parse::<u64>().unwrap() > 1 << 20, "{samples:?}");
}

#[test]
fn an_unusable_device_is_reported_with_the_reason() {
    let run = |arguments: &[&str], faults: &[(&str, &str)]| {
        let output = on_standin(&[&["rank", "--query", "a"], arguments].concat(), faults, "b")?;
        Some((output.status.code(), String::from_utf8_lossy(&output.stderr).into_owned()))
    };
    for (arguments, faults, named) in [
        (&["--device", "cuda:1"][..], &[][..], "cuda:1"),
        (&["--device", "cuda"], &[("STANDIN_CAPABILITY", "7.5")], "8.0"),
        (&["--device", "cuda", "--dtype", "fp8"], &[("STANDIN_CAPABILITY", "8.6")], "--dtype f16"),
        (&["--device", "cuda"], &[("STANDIN_DRIVER_VERSION", "11080")], "11.8"),
        (&["--device", "cuda"], &[("STANDIN_DRIVER_VERSION", "12080")], "but the installed libraries are of CUDA 13"),
        (&["--device", "cuda"], &[("STANDIN_MEMORY_MIB", "8")], "memory"),
    ] {
        let Some((code, message)) = run(arguments, faults) else { return };
        assert_eq!(code, Some(78), "{arguments:?} {faults:?}: {message}");
        assert!(message.contains(named), "{arguments:?} {faults:?}: {message}");
    }
}

#[test]
fn a_lost_device_answers_the_request_and_ends_the_process() {
    let Some(environment) = environment("cuda-cache") else { return };
    let mut environment: Vec<(&str, &str)> = environment.iter().map(|(name, value)| (*name, value.as_str())).collect();
    environment.push(("STANDIN_FAIL", "launch:120"));
    let mut server = Server::start_in(&["--device", "cuda", "--max-batch-tokens", "256"], &environment);
    let ask = r#"{"model":"rerankd-mini","query":"Apple","documents":["apple","banana"]}"#;
    let last = (0..20).map(|_| server.rerank(ask)).find(|answer| !answer.starts_with("HTTP/1.1 200"));
    let last = last.expect("launch 120 belongs to one of twenty requests");
    assert!(last.starts_with("HTTP/1.1 500"), "the failing request must be answered: {last}");
    assert_eq!(server.exit_code(), Some(70));
}

/// The driver's exit handlers may wait forever for a lost GPU.
#[test]
fn a_process_that_hangs_at_exit_ends_with_the_same_code() {
    let Some(environment) = environment("cuda-cache") else { return };
    let mut environment: Vec<(&str, &str)> = environment.iter().map(|(name, value)| (*name, value.as_str())).collect();
    environment.extend([("STANDIN_FAIL", "launch:120"), ("STANDIN_HANG_AT_EXIT", "1")]);
    let mut server = Server::start_in(&["--device", "cuda", "--max-batch-tokens", "256"], &environment);
    let ask = r#"{"model":"rerankd-mini","query":"Apple","documents":["apple","banana"]}"#;
    assert!((0..20).any(|_| server.rerank(ask).starts_with("HTTP/1.1 500")));
    assert_eq!(server.exit_code(), Some(70));
}

/// Hosts with a GPU but without CUDA libraries, with an old GPU, or with libraries that are newer than the driver.
#[test]
fn device_auto_falls_back_to_the_cpu_if_the_gpu_is_unusable() {
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
        (&whole, ("STANDIN_DRIVER_VERSION", "12080"), "but the installed libraries are of CUDA 13"),
    ] {
        let log = log(libraries, &[fault]);
        assert!(log.contains(reason) && log.contains("CPU, "), "{log}");
    }
}

#[test]
fn doctor_describes_the_gpu_and_why_it_cannot_be_used() {
    let doctor = |arguments: &[&str], faults: &[(&str, &str)]| {
        let arguments = [&["doctor", "--port", "0"], arguments].concat();
        let output = on_standin(&arguments, faults, "")?;
        Some((output.status.code(), String::from_utf8_lossy(&output.stdout).into_owned()))
    };
    let Some((code, text)) = doctor(&["--device", "auto"], &[]) else { return };
    assert_eq!(code, Some(0), "{text}");
    for named in ["NVRTC 13.0, cuBLASLt 13.0", "cuda:0: ", "device: cuda:0 (--device auto found a GPU); precision: f16"]
    {
        assert!(text.contains(named), "{named}: {text}");
    }
    let (code, text) = doctor(&[], &[]).unwrap();
    assert!(code == Some(0) && text.contains("fix: --device auto"), "{text}");
    for (arguments, fault, named) in [
        (&["--device", "auto"][..], ("STANDIN_CAPABILITY", "7.5"), "the kernels need 8.0"),
        (&["--device", "auto"], ("STANDIN_DRIVER_VERSION", "12080"), "install the libraries of CUDA 12"),
        (&["--device", "cuda", "--dtype", "fp8"], ("STANDIN_CAPABILITY", "8.6"), "fix: --dtype f16"),
        (&["--device", "cuda:1"], ("STANDIN_DEVICES", "1"), "there is no device cuda:1"),
        (&["--device", "cuda"], ("STANDIN_DEVICES", "0"), "nvidia-smi"),
        (&["--device", "cuda"], ("STANDIN_MEMORY_MIB", "500"), "memory of cuda:0"),
    ] {
        let (code, text) = doctor(arguments, &[fault]).unwrap();
        let words = text.split_whitespace().collect::<Vec<_>>().join(" ");
        assert!(code == Some(78) && words.contains(named), "{arguments:?} {fault:?}: {text}");
    }
}

/// Bytes of device memory that are allocated, by the log of the stand-in.
fn allocated_bytes(log: &Path) -> i64 {
    let bytes_of = |line: &str| -> Option<i64> {
        let field = |name: &str| line.split_whitespace().find_map(|word| word.strip_prefix(name));
        let bytes: i64 = field("bytes=")?.parse().ok()?;
        match line.split_whitespace().find(|word| matches!(*word, "malloc" | "free"))? {
            "malloc" if field("result=") == Some("0") => Some(bytes),
            "free" => Some(-bytes),
            _ => None,
        }
    };
    std::fs::read_to_string(log).unwrap().lines().filter_map(bytes_of).sum()
}

#[test]
fn a_model_that_is_replaced_at_sighup_gives_its_device_memory_back() {
    let Some(environment) = environment("cuda-cache") else { return };
    let folder = tempfile::tempdir().unwrap();
    let (config, log) = (folder.path().join("rerankd.toml"), folder.path().join("calls"));
    let mut environment: Vec<(&str, &str)> = environment.iter().map(|(name, value)| (*name, value.as_str())).collect();
    environment.push(("STANDIN_LOG", log.to_str().unwrap()));
    let write = |name: &str| {
        let settings = format!("device = \"cuda\"\nmax-batch-tokens = 256\nmodel = \"{name}=rerankd-mini\"\n");
        std::fs::write(&config, settings).unwrap();
    };
    let ask = |server: &Server, name: &str| {
        let answer = server.rerank(&json!({"model": name, "query": "a", "documents": ["b", "c"]}).to_string());
        assert!(answer.starts_with("HTTP/1.1 200"), "{answer}");
    };
    write("first");
    let mut server = Server::start_in(&["--config", config.to_str().unwrap()], &environment);
    ask(&server, "first");
    let one = allocated_bytes(&log);
    assert!(one > 0, "the log of the stand-in has no allocations");
    for i in 0..4 {
        let name = format!("model-{i}");
        write(&name);
        server.signal("-HUP");
        server.log_until("unloaded");
        ask(&server, &name);
        assert_eq!(allocated_bytes(&log), one, "after reload {i}");
    }
}

#[test]
fn compiled_kernels_are_cached_for_the_next_start() {
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

/// Exactly the GEMM shapes of the built-in model are tuned.
#[test]
fn gemms_of_the_first_batch_are_autotuned() {
    let Some(mut environment) = environment("cuda-cache") else { return };
    let cache = tempfile::tempdir().unwrap();
    environment[1].1 = cache.path().display().to_string();
    let mut command = rerankd();
    command.args(["rank", "--query", "a", "--device", "cuda", "--max-batch-tokens", "160"]);
    command.envs(environment).stdin(Stdio::null()).arg(concat!(env!("CARGO_MANIFEST_DIR"), "/Dockerfile"));
    let output = command.output().unwrap();
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    let named = |path: &Path| path.file_name().unwrap().to_str().unwrap().starts_with("gemms-");
    let files = std::fs::read_dir(cache.path()).unwrap().map(|entry| entry.unwrap().path());
    let file = files.into_iter().find(|path| named(path)).unwrap();
    let tuned: serde_json::Map<String, Value> = serde_json::from_slice(&std::fs::read(file).unwrap()).unwrap();
    // Rows x outputs x inputs: QKV; in the last layer Q of first tokens, and K and V of all; attention output; feed-forward.
    let shapes =
        ["768 x 256 Bias", "256 x 256 Bias", "512 x 256 Bias", "256 x 256 BiasResidual", "1024 x 256 BiasGelu"];
    let shapes = [&shapes[..], &["256 x 1024 BiasResidual"]].concat();
    let expected = [64, 128].iter().flat_map(|rows| shapes.iter().map(move |shape| format!("{rows} x {shape}")));
    let mut expected: Vec<String> = expected.collect();
    expected.sort();
    let tuned: Vec<String> = tuned.into_iter().map(|(key, _)| key).collect();
    assert_eq!(tuned, expected);
}

/// Which kernel is faster is not checked: the choice given two durations is unit-tested in `backend::cuda::attention`.
#[test]
fn wgmma_attention_is_left_out_if_wrong_disabled_or_not_available() {
    let folder = tempfile::tempdir().unwrap();
    let file = workloads(folder.path());
    let expected = expected(&file);
    for (i, (fault, trial, message)) in [
        (("", ""), true, "attention kernel: attention"),
        (("STANDIN_CXXFLAGS", "-DEMULATED_WGMMA_WRONG"), true, "failed the numerical cross-check"),
        (("RERANKD_CUDA_ATTENTION", "mma"), false, ""),
        (("STANDIN_CAPABILITY", "8.0"), false, ""),
    ]
    .into_iter()
    .enumerate()
    {
        // A cache folder each: cache keys do not include the fault.
        let (cache, launches) = (folder.path().join(i.to_string()), folder.path().join(format!("{i}.log")));
        let mut faults =
            vec![("RERANKD_CUDA_CACHE", cache.to_str().unwrap()), ("STANDIN_LOG", launches.to_str().unwrap())];
        faults.extend(Some(fault).filter(|(name, _)| !name.is_empty()));
        let Some(output) = on_standin(&bench(&file, "f16", "1024"), &faults, ALL) else { return };
        let log = String::from_utf8_lossy(&output.stderr);
        assert!(log.contains(message), "{fault:?}: {log}");
        assert!(largest_difference(&logits(&output)[0], &expected) < 0.02, "{fault:?}");

        let launches = std::fs::read_to_string(launches).unwrap();
        let kernel = |line: &str| line.split(' ').nth(1).map(str::to_owned);
        assert_eq!(launches.lines().any(|line| kernel(line).as_deref() == Some("attention_wgmma")), trial, "{fault:?}");
        let last = launches.lines().rfind(|line| line.starts_with("launch attention")).and_then(kernel);
        if i > 0 {
            assert_eq!(last.as_deref(), Some("attention"), "{fault:?}");
        }
    }
}

#[test]
fn the_custom_gemm_runs_only_if_it_passes_the_cross_check() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("workloads.json");
    let pairs: Vec<Vec<u32>> = [40, 70].iter().map(|&tokens| (0..tokens).map(|i| 5 + i * 37 % 900).collect()).collect();
    std::fs::write(&path, json!({ "all": pairs }).to_string()).unwrap();
    let file = path.to_str().unwrap();
    let expected = expected(file);
    for (i, (choice, fault, runs_custom, message)) in [
        ("custom", "", true, ""),
        ("custom", "-DEMULATED_WGMMA_WRONG", false, "did not pass the cross-check"),
        ("cublaslt", "", false, ""),
    ]
    .into_iter()
    .enumerate()
    {
        let (cache, launches) = (folder.path().join(i.to_string()), folder.path().join(format!("{i}.log")));
        let faults = [
            ("RERANKD_CUDA_CACHE", cache.to_str().unwrap()),
            ("STANDIN_LOG", launches.to_str().unwrap()),
            ("RERANKD_CUDA_GEMM", choice),
            ("RERANKD_CUDA_ATTENTION", "mma"),
            ("STANDIN_CXXFLAGS", fault),
        ];
        let Some(output) = on_standin(&bench(file, "f16", "128"), &faults, ALL) else { return };
        let log = String::from_utf8_lossy(&output.stderr);
        assert!(log.contains(message), "{choice} {fault}: {log}");
        assert!(largest_difference(&logits(&output)[0], &expected) < 0.02, "{choice} {fault}");
        let launches = std::fs::read_to_string(launches).unwrap();
        let last_batch = &launches[launches.rfind("launch embed_norm").unwrap()..];
        assert_eq!(last_batch.contains("launch gemm_wgmma"), runs_custom, "{choice} {fault}");
    }
}

/// Every kernel against a double-precision reference. Without --quick the script checks more shapes, and plants bugs.
#[test]
fn kernels_agree_with_the_reference() {
    let output = Command::new(Path::new(SOURCES).join("check.sh")).arg("--quick").output().unwrap();
    let report = String::from_utf8_lossy(&output.stdout);
    eprintln!("{report}");
    if report.starts_with("SKIPPED") {
        skip("cuda_kernels", "no g++, which compiles the kernels");
    }
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
}
