//! The real binary: commands, exit codes, signals, and a server on a real socket.

use std::io::{BufRead, BufReader, ErrorKind, Read, Write};
use std::net::TcpListener;
use std::process::{Output, Stdio};
use std::time::Duration;

use serde_json::Value;

use crate::support::server::{Server, rerankd};
use crate::support::{self, random, skip};

fn model() -> String {
    support::fixture("xlmr").display().to_string()
}

fn run(arguments: &[&str], input: &str) -> Output {
    let mut child =
        rerankd().args(arguments).stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap();
    child.stdin.take().unwrap().write_all(input.as_bytes()).ok(); // the process may have ended without reading
    child.wait_with_output().unwrap()
}

fn stdout(output: &Output) -> String {
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    String::from_utf8(output.stdout.clone()).unwrap()
}

#[test]
fn rank_prints_a_table_and_json() {
    let table = stdout(&run(&["rank", "--query", "a", "--model", &model(), "-n", "2"], "one\ntwo\nthree\n"));
    let lines: Vec<&str> = table.lines().collect();
    assert!(lines.len() == 3 && lines[0].starts_with("rank") && lines[1].starts_with("1 "), "{table}");
    let json = stdout(&run(&["rank", "--query", "a", "--model", &model(), "--json"], "one\ntwo\nthree\n"));
    let results: Vec<Value> = json.lines().map(|line| serde_json::from_str(line).unwrap()).collect();
    assert_eq!(results.len(), 3);
    let scores: Vec<f64> = results.iter().map(|r| r["relevance_score"].as_f64().unwrap()).collect();
    assert!(scores.is_sorted_by(|a, b| a >= b));
    assert!(lines[1].contains(results[0]["text"].as_str().unwrap()));
}

#[test]
fn rank_reads_documents_from_files() {
    let folder = tempfile::tempdir().unwrap();
    let files: Vec<String> = ["first", "second"]
        .iter()
        .map(|name| {
            let path = folder.path().join(name);
            std::fs::write(&path, format!("the {name} document")).unwrap();
            path.display().to_string()
        })
        .collect();
    let table = stdout(&run(&["rank", "--query", "a", "--model", &model(), &files[0], &files[1]], ""));
    assert!(files.iter().all(|file| table.contains(file)), "{table}");
}

#[test]
fn rank_reads_folders_patterns_and_lines() {
    let folder = tempfile::tempdir().unwrap();
    let write = |name: &str, content: &[u8]| {
        let path = folder.path().join(name);
        std::fs::create_dir_all(path.parent().unwrap()).unwrap();
        std::fs::write(path, content).unwrap();
    };
    write("b.md", b"second");
    write("deep/er/a.md", b"third");
    write("page.html", b"<!doctype html><p>fourth</p>");
    write("logo.png", b"\x89PNG\r\n\x1a\n\0\xff");
    write(".hidden.md", b"hidden");
    let path = |name: &str| folder.path().join(name).display().to_string();
    let run = |files: &[String]| {
        let model = model();
        let start = ["rank", "--query", "a", "--json", "--model", &model];
        let output = run(&[&start[..], &files.iter().map(String::as_str).collect::<Vec<_>>()].concat(), "one\ntwo\n");
        let mut names: Vec<String> = stdout(&output)
            .lines()
            .map(|line| serde_json::from_str::<Value>(line).unwrap()["name"].as_str().unwrap().to_owned())
            .collect();
        names.sort_unstable();
        (names, String::from_utf8_lossy(&output.stderr).into_owned())
    };
    let (names, log) = run(&[path("")]);
    assert_eq!(names, [path("b.md"), path("deep/er/a.md"), path("page.html")]);
    assert!(log.contains("logo.png") && log.contains("1 of 3 documents are HTML"), "{log}");
    assert_eq!(run(&[path("**/*.md")]).0, [path("b.md"), path("deep/er/a.md")]);
    assert_eq!(run(&[path("b.md"), "-".to_owned()]).0, [path("b.md"), "line 1".to_owned(), "line 2".to_owned()]);
}

#[test]
fn rank_says_how_to_convert_what_is_not_text() {
    let folder = tempfile::tempdir().unwrap();
    let path = |name: &str| folder.path().join(name).display().to_string();
    std::fs::write(path("paper.pdf"), b"%PDF-1.7\n\xe2\xe3").unwrap();
    std::fs::write(path("old.txt"), b"caf\xe9").unwrap();
    for (file, named) in [
        ("paper.pdf", "pdftotext"),
        ("old.txt", "iconv"),
        ("missing.txt", "no such file"),
        ("*.rst", "no file matches"),
        ("[", "not a valid pattern"),
    ] {
        let output = run(&["rank", "--query", "a", "--model", &model(), &path(file)], "");
        let message = String::from_utf8_lossy(&output.stderr);
        assert_eq!(output.status.code(), Some(1), "{message}");
        assert!(message.contains(named) && message.contains(file), "{file}: {message}");
    }
}

#[test]
fn models_lists_the_catalogue() {
    let table = stdout(&run(&["models"], ""));
    assert!(table.contains("BAAI/bge-reranker-v2-m3") && table.contains("1024 to 8192 tokens"));
    assert!(table.lines().all(|line| line.chars().count() <= 100 || line.starts_with("Cache folder")), "{table}");
    let json: Value = serde_json::from_str(&stdout(&run(&["models", "--json"], ""))).unwrap();
    let models = json.as_array().unwrap();
    assert!(models.len() >= 7);
    let named = |name: &str| models.iter().find(|model| model["name"] == name).unwrap();
    assert_eq!(named("rerankd-mini")["cached"], true);
    // Gated feed-forward layers are not computed in int8.
    assert!(named("cross-encoder/ettin-reranker-17m-v1")["memory_bytes"]["int8"].is_null());
    for model in models {
        for field in ["languages", "licence", "choose_when"] {
            assert!(!model[field].as_str().unwrap().is_empty(), "{model}");
        }
        let memory = |dtype: &str| model["memory_bytes"][dtype].as_u64().unwrap();
        assert!(memory("f32") > memory("bf16") && memory("bf16") > model["parameters"].as_u64().unwrap(), "{model}");
    }
}

/// `rerankd models` estimates memory. A factor of two leaves room for another allocator.
#[test]
fn a_server_takes_about_the_memory_that_models_shows() {
    let json: Value = serde_json::from_str(&stdout(&run(&["models", "--json"], ""))).unwrap();
    let estimates = json.as_array().unwrap().iter().find(|model| model["name"] == "rerankd-mini").unwrap();
    for dtype in ["f32", "bf16", "int8"] {
        let server = Server::start(&["--model", "rerankd-mini", "--dtype", dtype, "--threads", "2"]);
        let status = std::fs::read_to_string(format!("/proc/{}/status", server.child.id())).unwrap();
        let line = status.lines().find(|line| line.starts_with("VmRSS:")).unwrap();
        let resident = 1024.0 * line.split_whitespace().nth(1).unwrap().parse::<f64>().unwrap();
        let ratio = estimates["memory_bytes"][dtype].as_f64().unwrap() / resident;
        assert!((0.5..2.0).contains(&ratio), "{dtype}: {line}, estimate over measurement {ratio}");
    }
}

#[test]
fn completions_and_manual_pages_name_every_command() {
    let commands = ["serve", "rank", "eval", "bench", "models", "download", "doctor", "health", "completions", "man"];
    for shell in ["bash", "zsh", "fish", "elvish", "powershell"] {
        let script = stdout(&run(&["completions", shell], ""));
        assert!(commands.iter().all(|command| script.contains(command)) && script.contains("device"), "{shell}");
    }
    let page = stdout(&run(&["man"], ""));
    assert!(page.contains(".TH rerankd 1") && commands.iter().all(|command| page.contains(command)), "{page}");
    let folder = tempfile::tempdir().unwrap();
    stdout(&run(&["man", folder.path().join("man1").to_str().unwrap()], ""));
    for command in commands {
        let page = std::fs::read_to_string(folder.path().join(format!("man1/rerankd-{command}.1"))).unwrap();
        assert!(page.contains(".TH rerankd\\-") || page.contains(".TH rerankd-"), "{command}: {page}");
    }
}

#[test]
fn eval_of_the_built_in_model_alone_names_models_for_real_use() {
    let folder = tempfile::tempdir().unwrap();
    let topics = folder.path().join("topics.jsonl").display().to_string();
    std::fs::write(&topics, r#"{"query":"capital of France","positive":["Paris"],"negative":["Berlin"]}"#).unwrap();
    let log = |models: &[&str]| {
        let output = run(&[&["eval", &topics], models].concat(), "");
        assert!(output.status.success(), "{output:?}");
        String::from_utf8(output.stderr).unwrap()
    };
    let pointer = "built-in demonstration model; for real use take --model";
    assert!(log(&["--model", "rerankd-mini"]).contains(pointer));
    assert!(!log(&["--model", "rerankd-mini", "--model", &model()]).contains(pointer));
}

#[test]
fn eval_and_bench_draw_pictures() {
    let folder = tempfile::tempdir().unwrap();
    let path = |name: &str| folder.path().join(name).display().to_string();
    let topic = r#"{"query":"capital of France","positive":["Paris"],"negative":["Berlin","Rome"]}"#;
    std::fs::write(path("topics.jsonl"), format!("{topic}\n{topic}\n")).unwrap();
    let (tiny, picture) = (format!("tiny={}", model()), path("picture.svg"));
    let models = ["--model", &tiny, "--model", "rerankd-mini"];
    let table = stdout(&run(&[&["eval", &path("topics.jsonl"), "--svg", &picture], &models[..]].concat(), ""));
    assert!(table.contains("ms/query"), "{table}");
    let svg = std::fs::read_to_string(&picture).unwrap();
    assert!(svg.starts_with("<svg") && svg.ends_with("</svg>\n"), "{svg}");
    assert_eq!(svg.matches("<circle").count(), 3, "{svg}");
    assert!(["BM25", "tiny", "rerankd-mini", "topics.jsonl, 2 queries"].iter().all(|text| svg.contains(text)), "{svg}");

    let arguments = ["bench", "--runs", "1", "--max-batch-tokens", "256", "--svg", &picture];
    let table = stdout(&run(&[&arguments[..], &models[..2]].concat(), ""));
    let svg = std::fs::read_to_string(&picture).unwrap();
    let measured = table.lines().filter(|line| line.starts_with("tiny with pairs")).count();
    assert!(measured >= 3 && svg.matches("<circle").count() == measured, "{table}\n{svg}");

    let unwritable = path("none/picture.svg");
    for arguments in [&["eval", &path("topics.jsonl")][..], &["bench", "--runs", "1"]] {
        let output = run(&[arguments, &["--svg", &unwritable]].concat(), "");
        assert_eq!(output.status.code(), Some(78));
        assert!(String::from_utf8_lossy(&output.stderr).contains("picture.svg: cannot be written"));
    }
}

#[test]
fn logs_have_colors_only_where_they_are_wanted() {
    let log = |environment: &[(&str, &str)]| {
        let model = model();
        let mut command = rerankd();
        command.args(["rank", "--query", "a", "--log", "debug", "--model", &model]).arg(support::fixture("README.md"));
        String::from_utf8_lossy(&command.envs(environment.iter().copied()).output().unwrap().stderr).into_owned()
    };
    let (plain, colored) = (log(&[]), log(&[("CLICOLOR_FORCE", "1")]));
    assert!(plain.contains("hidden size") && !plain.contains('\x1b'), "{plain}");
    assert!(
        colored.contains('\x1b') && !log(&[("CLICOLOR_FORCE", "1"), ("NO_COLOR", "1")]).contains('\x1b'),
        "{colored}"
    );
}

/// The protocol that benches/peers uses: for each line of JSON on standard input, one line of JSON on standard output. `mode` is
/// for other engines and is ignored.
#[test]
fn bench_answers_each_request_with_the_times_and_logits_of_its_workload() {
    let folder = tempfile::tempdir().unwrap();
    let workloads = folder.path().join("workloads.json");
    std::fs::write(&workloads, r#"{"x": [[2, 7, 3], [2, 9, 9, 3]], "y": [[5]]}"#).unwrap();
    let workloads = workloads.display().to_string();
    for dtype in ["f32", "bf16", "int8"] {
        let model = model();
        let arguments = ["bench", "--json", "--model", &model, "--workloads", &workloads, "--dtype", dtype];
        let lines = stdout(&run(&arguments, "{\"workload\": \"x\", \"mode\": \"packed\", \"runs\": 3}\n"));
        let lines: Vec<Value> = lines.lines().map(|line| serde_json::from_str(line).unwrap()).collect();
        assert_eq!((&lines[0]["ready"], lines.len()), (&Value::Bool(true), 2));
        assert_eq!(
            (lines[1]["tokens"].as_u64(), lines[1]["engine"].as_str()),
            (Some(7), Some(&*format!("rerankd-{dtype}")))
        );
        assert_eq!(
            (lines[1]["seconds"].as_array().unwrap().len(), lines[1]["logits"].as_array().unwrap().len()),
            (3, 2)
        );
    }
    let table = stdout(&run(&["bench", "--model", &model(), "--runs", "1", "--workloads", &workloads], ""));
    assert!(table.lines().count() == 3 && table.contains("tokens/s"), "{table}");
}

#[test]
fn usage_errors_exit_with_their_code_and_name_the_cause() {
    let taken = TcpListener::bind("127.0.0.1:0").unwrap();
    let port = taken.local_addr().unwrap().port().to_string();
    let model = model();
    for (arguments, code, named) in [
        (&["serve", "--prot", "1"][..], 2, "--prot"),
        (&["serve", "--port", "x"], 2, "--port"),
        (&["serve", "--model", "nothing"], 78, "`rerankd models`"),
        (&["serve", "--model", "bge-reranker-v2"], 78, "Did you mean BAAI/bge-reranker-v2-m3?"),
        (&["serve", "--model", "."], 78, "no checkpoint in this folder"),
        (&["serve", "--model", &model, "--window", "9999"], 78, "window"),
        (&["serve", "--model", &model, "--window", "3"], 78, "window"),
        (&["serve", "--model", &model, "--device", "abacus"], 78, "abacus"),
        (&["serve", "--model", &model, "--device", "candle", "--dtype", "int8"], 78, "--dtype"),
        #[cfg(feature = "cuda")]
        (&["serve", "--model", &model, "--device", "cuda:x"], 78, "cuda:0,cuda:1"),
        #[cfg(feature = "cuda")]
        (&["serve", "--model", &model, "--device", "cuda:1,cuda:1"], 78, "twice"),
        #[cfg(feature = "cuda")]
        (&["serve", "--model", &model, "--device", "cuda", "--dtype", "int8"], 78, "f16"),
        #[cfg(not(feature = "cuda"))]
        (&["serve", "--model", &model, "--device", "cuda"], 78, "not supported by this build"),
        (&["serve", "--model", &model, "--dtype", "f16"], 78, "bf16"),
        (&["serve", "--model", &model, "--dtype", "f8"], 2, "--dtype"),
        (&["bench", "--model", &model, "--workloads", "/nowhere.json"], 78, "/nowhere.json"),
        (&["serve", "--model", &model, "--max-batch-tokens", "0"], 78, "--max-batch-tokens"),
        (&["serve", "--model", &model, "--port", &port], 78, "--port"),
        (&["serve", "--model", &model, "--api-key-file", "/dev/null"], 78, "--api-key-file"),
        (&["serve", "--config", "/nowhere.toml"], 78, "/nowhere.toml"),
        (&["serve", "--model", &model, "--model", &model], 78, "two models"),
        (&["serve", "--api-key", ""], 78, "--api-key"),
        (&["serve", "--request-timeout", "18446744073709551615"], 2, "--request-timeout"),
        (&["serve", "--request-timeout", "0"], 2, "--request-timeout"),
        (&["serve", "--max-connections", "0"], 2, "--max-connections"),
        (&["rank", "--query", " ", "--model", &model], 1, "--query"),
        (&["rank", "--query", "a", "--model", &model], 1, "nothing to rank"),
    ] {
        let output = run(arguments, "");
        let message = String::from_utf8_lossy(&output.stderr);
        assert_eq!(output.status.code(), Some(code), "{arguments:?}: {message}");
        assert!(message.contains(named), "{arguments:?}: {message}");
    }
}

#[test]
fn unknown_values_are_refused_from_the_flag_the_environment_and_the_config_file() {
    let folder = tempfile::tempdir().unwrap();
    let config = folder.path().join("rerankd.toml");
    let refused = |command: &mut std::process::Command, code: i32, named: &str| {
        let output = command.stdin(Stdio::null()).output().unwrap();
        let message = String::from_utf8_lossy(&output.stderr).into_owned();
        assert_eq!(output.status.code(), Some(code), "{command:?}: {message}");
        assert!(message.contains(named), "{command:?}: {message}");
    };
    for (flag, value) in [("--log", "nonsense"), ("--log", "rerankd=loud"), ("--log", ""), ("--dtype", "f64")] {
        refused(rerankd().args(["serve", flag, value]), 2, flag);
        let variable = format!("RERANKD_{}", flag.trim_start_matches('-').to_uppercase());
        refused(rerankd().arg("serve").env(variable, value), 2, flag);
        std::fs::write(&config, format!("{} = {value:?}\n", flag.trim_start_matches('-'))).unwrap();
        refused(rerankd().arg("serve").arg("--config").arg(&config), 2, flag);
    }
    refused(rerankd().arg("serve").env("RERANKD_PIN_THREADS", "maybe"), 2, "--pin-threads");
    for command in [&["models"][..], &["download", "rerankd-mini"], &["rank", "-q", "a", "/dev/null"]] {
        refused(rerankd().args(command).env("HF_HUB_OFFLINE", "maybe"), 78, "HF_HUB_OFFLINE");
    }
}

/// One binary serves hosts with and without a GPU. Without a driver `cuda` is an error and `auto` falls back to the CPU.
#[cfg(feature = "cuda")]
#[test]
fn cuda_is_rejected_without_a_driver_and_auto_uses_the_cpu() {
    let model = model();
    let output = run(&["rank", "--query", "a", "--model", &model, "--device", "cuda"], "b");
    let message = String::from_utf8_lossy(&output.stderr);
    if output.status.success() {
        skip("cuda_is_rejected_without_a_driver_and_auto_uses_the_cpu", "this machine has a CUDA driver");
        return;
    }
    assert_eq!(output.status.code(), Some(78), "{message}");
    assert!(message.contains("--device cpu"), "{message}");
    let output = run(&["rank", "--query", "a", "--model", &model, "--device", "auto"], "b");
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
}

#[test]
fn sigterm_ends_an_idle_server_with_exit_code_zero() {
    let mut server = Server::start(&["--model", &format!("tiny={}", model()), "--log-format", "json"]);
    let answer = server.rerank(r#"{"model":"tiny","query":"secret words","documents":["a","b"]}"#);
    assert!(answer.starts_with("HTTP/1.1 200") && answer.contains("relevance_score"), "{answer}");
    // An idle keep-alive connection does not delay the exit.
    let mut idle = server.connect();
    idle.write_all(b"GET /ready HTTP/1.1\r\nhost: localhost\r\n\r\n").unwrap();
    idle.read_exact(&mut [0; 15]).unwrap();
    server.signal("-TERM");
    assert_eq!(server.exit_code(), Some(0));
    let log = server.rest_of_log();
    assert!(!log.contains("secret words"), "the log contains text of a request");
    let lines: Vec<Value> = log.lines().filter_map(|line| serde_json::from_str(line).ok()).collect();
    assert!(
        lines.iter().any(|line| line["status"] == 200 && line["route"] == "/v1/rerank" && line["documents"] == 2),
        "{log}"
    );
}

#[test]
fn a_request_in_progress_at_sigterm_is_answered() {
    let mut server = Server::start(&["--model", &format!("tiny={}", model())]);
    let body = r#"{"model":"tiny","query":"a","documents":["b"]}"#;
    let mut stream = server.connect();
    write!(
        stream,
        "POST /v1/rerank HTTP/1.1\r\nhost: localhost\r\nexpect: 100-continue\r\ncontent-length: {}\r\n\r\n",
        body.len()
    )
    .unwrap();
    // The server asks for the body, so the request is in progress.
    let mut interim = [0; b"HTTP/1.1 100 Continue\r\n\r\n".len()];
    stream.read_exact(&mut interim).unwrap();
    assert_eq!(std::str::from_utf8(&interim).unwrap(), "HTTP/1.1 100 Continue\r\n\r\n");
    server.signal("-TERM");
    server.wait_until_it_drains();
    stream.write_all(body.as_bytes()).unwrap();
    let mut answer = String::new();
    stream.read_to_string(&mut answer).unwrap();
    assert!(answer.starts_with("HTTP/1.1 200"), "{answer}");
    assert_eq!(server.exit_code(), Some(0));
}

#[test]
fn a_connection_without_a_complete_header_is_closed() {
    let server = Server::start(&["--model", &format!("tiny={}", model()), "--header-timeout", "1"]);
    let mut slow = server.connect();
    slow.write_all(b"POST /v1/rerank HTTP/1.1\r\nhost:").unwrap();
    // The read timeout only keeps a failing test from hanging.
    slow.set_read_timeout(Some(Duration::from_secs(300))).unwrap();
    let closed = slow.read_to_end(&mut Vec::new());
    let still_open =
        closed.as_ref().is_err_and(|error| matches!(error.kind(), ErrorKind::WouldBlock | ErrorKind::TimedOut));
    assert!(!still_open, "the connection is still open");
    assert!(server.request("GET /ready HTTP/1.1\r\nhost: localhost\r\nconnection: close\r\n\r\n").contains("ready"));
}

#[test]
fn settings_come_from_the_environment_and_the_config_file() {
    let folder = tempfile::tempdir().unwrap();
    let config = folder.path().join("rerankd.toml");
    std::fs::write(&config, format!("model = [\"one={0}\", \"two={0}\"]\nmax-documents = 1\nport = 0\n", model()))
        .unwrap();
    let mut child = rerankd()
        .arg("serve")
        .env("RERANKD_CONFIG", &config)
        .env("RERANKD_HOST", "0.0.0.0")
        .stderr(Stdio::piped())
        .spawn()
        .unwrap();
    let mut log = String::new();
    for line in BufReader::new(child.stderr.take().unwrap()).lines() {
        let line = line.unwrap();
        log.push_str(&line);
        if line.contains("curl") {
            break;
        }
    }
    child.kill().unwrap();
    child.wait().unwrap();
    assert!(log.contains("listening on http://0.0.0.0:") && log.contains("max_documents=1"), "{log}");
    assert!(log.contains("\"one\"") && log.contains("\"two\""), "the log does not name both models: {log}");
    assert!(log.contains("no --api-key is set"), "no warning for a server without keys beyond loopback: {log}");
}

/// The real shape, tokenizer and config of bge-reranker-v2-m3 with random weights: 1.1 GB on disk, 2.3 GB in memory.
#[test]
fn bge_shape_with_random_weights_starts_and_answers() {
    let test = "bge_shape_with_random_weights_starts_and_answers";
    if std::env::var_os("RERANKD_SLOW_TESTS").is_none() {
        skip(test, "set RERANKD_SLOW_TESTS=1 to run it; it writes 1.1 GB");
        return;
    }
    let Some(real) = support::real(test, "bge-reranker-v2-m3") else { return };
    let folder = tempfile::tempdir().unwrap();
    for file in ["config.json", "tokenizer.json"] {
        std::fs::copy(real.join(file), folder.path().join(file)).unwrap();
    }
    let config = std::fs::read_to_string(real.join("config.json")).unwrap();
    let config = rerankd::checkpoint::config::ModelConfig::parse(&config).unwrap();
    random::write_checkpoint(&config, &folder.path().join("model.safetensors")).unwrap();
    let model = format!("BAAI/bge-reranker-v2-m3={}", folder.path().display());
    for dtype in ["f32", "bf16", "int8"] {
        let server = Server::start(&["--model", &model, "--dtype", dtype]);
        let answer = server.rerank(
            r#"{"model":"BAAI/bge-reranker-v2-m3","query":"苹果","documents":["apple","香蕉","fruit","vegetable"],"top_n":4}"#,
        );
        assert!(answer.starts_with("HTTP/1.1 200"), "{answer}");
        let body: Value = serde_json::from_str(answer.split_once("\r\n\r\n").unwrap().1).unwrap();
        assert_eq!(body["results"].as_array().unwrap().len(), 4);
        let memory = std::fs::read_to_string(format!("/proc/{}/status", server.child.id())).unwrap_or_default();
        let line = |name: &str| memory.lines().find(|line| line.starts_with(name)).unwrap_or("unknown").to_owned();
        eprintln!("{dtype}: {} {}", line("VmRSS"), line("VmHWM"));
    }
}

#[test]
fn two_models_in_one_server_score_as_each_does_alone() {
    let tiny = format!("tiny={}", model());
    let ask = |model: &str| format!(r#"{{"model":"{model}","query":"Apple","documents":["apple","banana"]}}"#);
    let alone = |argument: &str, name: &str| Server::start(&["--model", argument]).scores(&ask(name));
    let both = Server::start(&["--model", &tiny, "--model", "rerankd-mini"]);
    let (first, second) = (both.scores(&ask("tiny")), both.scores(&ask("rerankd-mini")));
    assert_ne!(first, second);
    assert_eq!((first, second), (alone(&tiny, "tiny"), alone("rerankd-mini", "rerankd-mini")));
    let twice = Server::start(&["--model", "old=rerankd-mini", "--model", "new=rerankd-mini", "--alias", "best=new"]);
    assert_eq!(twice.scores(&ask("old")), twice.scores(&ask("new")));
    assert_eq!(twice.scores(&ask("old")), twice.scores(&ask("best")));
    let unknown = both.rerank(&ask("neither"));
    assert!(unknown.starts_with("HTTP/1.1 400") && unknown.contains("20012"), "{unknown}");
}
