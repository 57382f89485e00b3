//! `rerankd rank` from file to file: resumption, shards, bad queries, servers, TREC runs, pipes.

use std::fs;
use std::io::{BufRead, BufReader, Read, Write};
use std::net::{TcpListener, TcpStream};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Output, Stdio};
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

use serde_json::{Value, json};
use tempfile::TempDir;

use crate::support;
use crate::support::server::{Server, rerankd};
use crate::support::tls::TlsProxy;

/// `rerankd rank` with the tiny model.
fn rank(arguments: &[&str]) -> Command {
    let mut command = rerankd();
    command.args(["rank", "--model"]).arg(support::fixture("xlmr")).args(arguments);
    command
}

fn succeeds(arguments: &[&str]) -> Output {
    let output = rank(arguments).output().unwrap();
    assert!(output.status.success(), "{arguments:?}: {}", String::from_utf8_lossy(&output.stderr));
    output
}

/// Expects a failure with this exit code, and returns the error message.
fn fails(arguments: &[&str], code: i32) -> String {
    let output = rank(arguments).output().unwrap();
    let message = String::from_utf8(output.stderr).unwrap();
    assert_eq!(output.status.code(), Some(code), "{arguments:?}: {message}");
    message
}

struct Folder(TempDir);

impl Folder {
    fn new() -> Self {
        Self(tempfile::tempdir().unwrap())
    }

    fn path(&self, name: &str) -> String {
        self.0.path().join(name).display().to_string()
    }

    fn write(&self, name: &str, text: &str) -> String {
        fs::write(self.0.path().join(name), text).unwrap();
        self.path(name)
    }

    fn read(&self, name: &str) -> String {
        fs::read_to_string(self.0.path().join(name)).unwrap()
    }
}

/// A line of input with 1 to 4 documents.
fn query(i: usize) -> String {
    let documents: Vec<Value> = (0..=i % 4)
        .map(|d| match d {
            1 => json!({"id": format!("d{i}-{d}"), "text": format!("the second text of {i}")}),
            _ => json!(format!("text {d} about number {}", i * d)),
        })
        .collect();
    format!("{}\n", json!({"id": format!("q{i}"), "query": format!("question {i}"), "documents": documents}))
}

fn queries(count: usize) -> String {
    (0..count).map(query).collect()
}

/// The results of an input, by an uninterrupted run.
fn expected(input: &str, more: &[&str]) -> String {
    let folder = Folder::new();
    let output = folder.path("out");
    succeeds(&[&["--input", input, "--output", &output], more].concat());
    folder.read("out")
}

#[test]
fn each_line_gets_its_ranking_in_the_order_of_the_input() {
    let folder = Folder::new();
    let input = folder.write("in", &format!("{}\n{{\"query\":\"q\",\"documents\":[]}}\r\n", queries(9)));
    let text = expected(&input, &["-n", "2"]);
    let unended = folder.write("unended", queries(2).trim_end());
    assert_eq!(expected(&unended, &["-n", "2"]).lines().count(), 2, "the last line needs no line break");
    let lines: Vec<Value> = text.lines().map(|line| serde_json::from_str(line).unwrap()).collect();
    assert_eq!(lines.len(), 10, "a blank line has no answer");
    for (i, line) in lines[..9].iter().enumerate() {
        assert_eq!(line["id"], format!("q{i}"));
        let results = line["results"].as_array().unwrap();
        assert_eq!(results.len(), (i % 4 + 1).min(2));
        assert!(results.is_sorted_by(|a, b| a["relevance_score"].as_f64() >= b["relevance_score"].as_f64()));
        assert!(results.iter().all(|r| r.get("id").is_some() == (r["index"] == 1)), "{line}");
    }
    assert_eq!(lines[9], json!({"results": []}));
}

/// Waits until the output has more than `bytes`, kills the process, and returns whether it was still running.
fn kill_after(mut child: Child, partial: &Path, bytes: u64) -> bool {
    loop {
        if child.try_wait().unwrap().is_some() {
            return false;
        }
        if partial.metadata().is_ok_and(|metadata| metadata.len() > bytes) {
            child.kill().unwrap();
            return !child.wait().unwrap().success();
        }
        std::thread::yield_now();
    }
}

#[test]
fn a_killed_run_goes_on_without_loss_or_repeats() {
    let folder = Folder::new();
    let input = folder.write("in", &queries(400));
    let whole = expected(&input, &[]);
    let (output, partial) = (folder.path("out"), PathBuf::from(folder.path("out.partial")));
    let arguments = ["--input", &input, "--output", &output, "--save-every", "0"];
    let mut random = fastrand::Rng::with_seed(7);
    let (mut kills, mut bytes) = (0, 0);
    while kills < 6 {
        bytes += random.u64(..whole.len() as u64 / 6);
        let child = rank(&arguments).stderr(Stdio::null()).spawn().unwrap();
        if !kill_after(child, &partial, bytes) {
            break;
        }
        kills += 1;
        // What was written after the last save, for example half a line, is cut off.
        fs::OpenOptions::new().append(true).open(&partial).unwrap().write_all(b"{\"id\":\"q").unwrap();
        assert!(!Path::new(&output).exists(), "an output has its name only when it is complete");
    }
    assert!(kills > 0, "no run was killed");
    succeeds(&arguments);
    assert_eq!(folder.read("out"), whole);
    let state: Value = serde_json::from_str(&folder.read("out.state.json")).unwrap();
    assert_eq!((&state["queries"], &state["pairs"], &state["failed"]), (&json!(400), &json!(1000), &json!(0)));
}

#[test]
fn joined_shards_are_the_whole_output() {
    let folder = Folder::new();
    let text: String =
        (0..50).map(|i| if i % 9 == 4 { format!("{{\"id\":{i},\"query\":\"q\"}}\n") } else { query(i) }).collect();
    let input = folder.write("in", &text);
    let whole = expected(&input, &["--on-error", "skip"]);
    assert_eq!(whole.matches("\"error\":\"line ").count(), 6);
    assert!(whole.contains("{\"id\":13,\"error\":\"line 14: missing field `documents`"), "{whole}");
    for count in [2, 4, 7] {
        let shard = |i| expected(&input, &["--on-error", "skip", "--shard", &format!("{i}/{count}")]);
        let joined: String = (0..count).map(shard).collect();
        assert_eq!(joined, whole, "{count} shards");
    }
}

#[test]
fn a_bad_line_stops_the_run_or_has_an_error_as_its_answer() {
    let folder = Folder::new();
    let input = folder.write("in", &format!("{}{{\"id\":\"bad\",\"query\":\" \"}}\n{}", queries(3), query(3)));
    let output = folder.path("out");
    let message = fails(&["--input", &input, "--output", &output], 1);
    assert!(message.contains(&format!("{input}: line 4: ")) && message.contains("--on-error skip"), "{message}");
    assert_eq!(folder.read("out.partial").lines().count(), 3, "what was ranked before is kept");
    succeeds(&["--input", &input, "--output", &output, "--on-error", "skip"]);
    let text = folder.read("out");
    assert_eq!(text.lines().count(), 5);
    let bad: Value = serde_json::from_str(text.lines().nth(3).unwrap()).unwrap();
    assert_eq!(bad["id"], "bad");
    assert!(bad["error"].as_str().unwrap().starts_with("line 4: ") && bad.get("results").is_none(), "{bad}");
    let state: Value = serde_json::from_str(&folder.read("out.state.json")).unwrap();
    assert_eq!((&state["queries"], &state["failed"]), (&json!(4), &json!(1)));
}

#[test]
fn an_output_is_never_overwritten() {
    let folder = Folder::new();
    let input = folder.write("in", &queries(3));
    let mine = folder.write("mine", "mine");
    assert!(fails(&["--input", &input, "--output", &mine], 1).contains("mine exists"));
    assert_eq!(folder.read("mine"), "mine");
    let output = folder.path("out");
    succeeds(&["--input", &input, "--output", &output]);
    let before = folder.read("out");
    let again = succeeds(&["--input", &input, "--output", &output]);
    assert!(String::from_utf8_lossy(&again.stderr).contains("complete already"));
    let message = fails(&["--input", &input, "--output", &output, "-n", "1"], 1);
    assert!(message.contains("top_n was null and is now 1"), "{message}");
    folder.write("in", &queries(4));
    assert!(fails(&["--input", &input, "--output", &output], 1).contains("input was"));
    assert_eq!(folder.read("out"), before);
}

#[test]
fn mistakes_on_the_command_line_are_named() {
    let folder = Folder::new();
    let (input, output) = (folder.write("in", &queries(1)), folder.path("out"));
    for (arguments, code, named) in [
        (&["--input", &input][..], 2, "--output"),
        (&["--output", &output], 2, "--query"),
        (&["--query", "q", "--output", &output], 2, "--query"),
        (&["--query", "q", "--input", &input, "--output", &output], 2, "--query"),
        (&["--run", &input, "--output", &output], 2, "--collection"),
        (&["--input", &input, "--output", &output, "--shard", "4/4"], 2, "0 to N - 1"),
        (&["--input", "/nowhere", "--output", &output], 1, "/nowhere"),
        (&["--input", &input, "--output", "/nowhere/out"], 1, "/nowhere/out"),
        (&["--input", "-", "--output", &output, "--shard", "0/2"], 1, "--shard"),
        (&["--input", &input, "--output", &output, "--server", "host:80"], 1, "--server"),
    ] {
        let message = fails(arguments, code);
        assert!(message.contains(named), "{arguments:?}: {message}");
    }
}

#[test]
fn a_query_through_pipes_is_answered_at_once() {
    let mut child = rank(&["--input", "-", "--output", "-", "--on-error", "skip"])
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::null())
        .spawn()
        .unwrap();
    let (mut input, mut output) = (child.stdin.take().unwrap(), BufReader::new(child.stdout.take().unwrap()));
    for line in [query(1), "{}\n".to_owned(), query(2)] {
        input.write_all(line.as_bytes()).unwrap();
        let mut answer = String::new();
        output.read_line(&mut answer).unwrap();
        let answer: Value = serde_json::from_str(&answer).unwrap();
        assert_eq!(answer.get("error").is_some(), line == "{}\n", "{answer}");
    }
    drop(input);
    assert!(child.wait().unwrap().success());
}

/// Reads an HTTP request from a connection.
fn request(stream: &TcpStream) -> Option<Vec<u8>> {
    let mut reader = BufReader::new(stream);
    let (mut head, mut length) = (String::new(), 0);
    loop {
        let start = head.len();
        if reader.read_line(&mut head).ok()? == 0 {
            return None;
        }
        let line = head[start..].to_lowercase();
        if let Some(value) = line.strip_prefix("content-length:") {
            length = value.trim().parse().unwrap();
        }
        if line == "\r\n" {
            break;
        }
    }
    let mut body = vec![0; length];
    reader.read_exact(&mut body).ok()?;
    Some([head.replacen("\r\n", "\r\nconnection: close\r\n", 1).into_bytes(), body].concat())
}

/// A proxy that refuses every second request, in turn with 503, 429 and by closing the connection. Returns its URL and how many it
/// refused.
fn flaky_proxy(server: &Server) -> (String, Arc<AtomicUsize>) {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let url = format!("http://{}", listener.local_addr().unwrap());
    let (refused, backend) = (Arc::new(AtomicUsize::new(0)), server.address().to_owned());
    let counter = Arc::clone(&refused);
    std::thread::spawn(move || {
        for (i, stream) in listener.incoming().enumerate() {
            let Ok(mut stream) = stream else { return };
            let Some(request) = request(&stream) else { continue };
            if i % 2 == 0 {
                let status = ["503 Service Unavailable", "429 Too Many Requests"].get(i / 2 % 3);
                counter.fetch_add(1, Ordering::SeqCst);
                if let Some(status) = status {
                    let head = format!(
                        "HTTP/1.1 {status}\r\nretry-after: 0\r\ncontent-length: 0\r\nconnection: close\r\n\r\n"
                    );
                    stream.write_all(head.as_bytes()).ok();
                }
                continue;
            }
            let mut backend = TcpStream::connect(&backend).unwrap();
            backend.write_all(&request).unwrap();
            let mut answer = Vec::new();
            backend.read_to_end(&mut answer).unwrap();
            stream.write_all(&answer).ok();
        }
    });
    (url, refused)
}

fn start_server(more: &[&str]) -> Server {
    let model = support::fixture("xlmr").display().to_string();
    Server::start(&[&["--model", &model], more].concat())
}

/// `rerankd rank` with servers; the process loads no model.
fn rank_by_servers(arguments: &[&str]) -> Output {
    rerankd().arg("rank").args(arguments).env("RERANKD_API_KEY", "secret").output().unwrap()
}

#[test]
fn servers_give_the_same_bytes_though_they_refuse_requests() {
    let folder = Folder::new();
    let input = folder.write("in", &queries(40));
    let server = start_server(&["--api-key", "secret"]);
    let (flaky, refused) = flaky_proxy(&server);
    let closed = format!("http://{}", TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap());
    let output = folder.path("out");
    let ranked = rank_by_servers(&["--input", &input, "--output", &output, "--server", &closed, "--server", &flaky]);
    assert!(ranked.status.success(), "{}", String::from_utf8_lossy(&ranked.stderr));
    assert_eq!(folder.read("out"), expected(&input, &[]));
    assert!(refused.load(Ordering::SeqCst) > 3);
}

#[test]
fn a_server_with_a_certificate_of_a_private_authority_is_trusted_if_ssl_cert_file_names_it() {
    let folder = Folder::new();
    let input = folder.write("in", &queries(3));
    let server = start_server(&[]);
    let proxy = TlsProxy::to(server.address());
    let rank = |output: &str, authority: &Path| {
        let arguments = ["--input", &input, "--output", output, "--server", &proxy.url, "--patience", "0"];
        let mut command = rerankd();
        command.arg("rank").args(arguments).env_remove("SSL_CERT_DIR").env("SSL_CERT_FILE", authority).output().unwrap()
    };
    let ranked = rank(&folder.path("out"), &proxy.authority());
    assert!(ranked.status.success(), "{}", String::from_utf8_lossy(&ranked.stderr));
    assert_eq!(folder.read("out"), expected(&input, &[]));
    let refused = rank(&folder.path("out2"), &TlsProxy::to("127.0.0.1:1").authority());
    let message = String::from_utf8_lossy(&refused.stderr);
    assert!(refused.status.code() == Some(69) && message.contains("SSL_CERT_FILE"), "{message}");
}

#[test]
fn without_a_server_the_command_ends_with_the_code_for_another_try() {
    let folder = Folder::new();
    let input = folder.write("in", &queries(2));
    let closed = format!("http://{}", TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap());
    let output = folder.path("out");
    let ranked = rank_by_servers(&["--input", &input, "--output", &output, "--server", &closed, "--patience", "0"]);
    let message = String::from_utf8_lossy(&ranked.stderr);
    assert_eq!(ranked.status.code(), Some(69), "{message}");
    assert!(message.contains(&closed), "{message}");
}

#[test]
fn a_servers_refusals_of_a_query_and_of_a_key_are_told_apart() {
    let folder = Folder::new();
    let many: Vec<String> = (0..20).map(|i| i.to_string()).collect();
    let many = format!("{}\n", json!({"id": "many", "query": "q", "documents": many}));
    let input = folder.write("in", &format!("{}{many}{}", query(0), query(1)));
    let server = start_server(&["--max-documents", "10"]);
    let url = format!("http://{}", server.address());
    let output = folder.path("out");
    let arguments = ["--input", &input, "--output", &output, "--server", &url, "--on-error", "skip"];
    let ranked = rank_by_servers(&arguments);
    assert!(ranked.status.success(), "{}", String::from_utf8_lossy(&ranked.stderr));
    let text = folder.read("out");
    assert!(text.lines().nth(1).unwrap().starts_with("{\"id\":\"many\",\"error\":\"line 2: documents: "), "{text}");
    assert_eq!(text.lines().count(), 3);

    let server = start_server(&["--api-key", "another"]);
    let url = format!("http://{}", server.address());
    let ranked = rank_by_servers(&["--input", &input, "--output", &folder.path("out2"), "--server", &url]);
    let message = String::from_utf8_lossy(&ranked.stderr);
    assert_eq!(ranked.status.code(), Some(1), "{message}");
    assert!(message.contains("401"), "{message}");
}

#[test]
fn a_trec_run_is_ranked_again_with_the_texts_of_its_collection() {
    let folder = Folder::new();
    let mut run = String::new();
    for query in 0..12 {
        for rank in 0..=query % 5 {
            run.push_str(&format!("t{query} Q0 d{} {} {} bm25\n", (query * 7 + rank) % 10, rank + 1, 9 - rank));
        }
    }
    let run = folder.write("run", &run);
    let topics = folder.write("q.tsv", &(0..12).map(|i| format!("t{i}\tquestion {i}\n")).collect::<String>());
    let texts =
        (0..10).map(|i| format!("{}\n", json!({"_id": format!("d{i}"), "title": "T", "text": format!("text {i}")})));
    let collection = folder.write("c.jsonl", &texts.collect::<String>());
    let ranked = |more: &[&str]| {
        let folder = Folder::new();
        let files = ["--run", &run, "--queries", &topics, "--collection", &collection, "--output", &folder.path("out")];
        let output = rank(&[&files, more].concat()).output().unwrap();
        assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
        folder.read("out")
    };
    let whole = ranked(&[]);
    assert_eq!(whole.lines().count(), (0..12).map(|query| query % 5 + 1).sum::<usize>());
    let rows: Vec<Vec<&str>> = whole.lines().map(|line| line.split(' ').collect()).collect();
    assert!(rows.iter().all(|row| row.len() == 6 && row[1] == "Q0" && row[5] == "rerankd"), "{whole}");
    for pair in rows.windows(2) {
        let score = |row: &[&str]| row[4].parse::<f32>().unwrap();
        let starts = pair[0][0] != pair[1][0];
        let rank = if starts { 1 } else { pair[0][3].parse::<usize>().unwrap() + 1 };
        assert_eq!(pair[1][3], rank.to_string());
        assert!(starts || score(&pair[0]) >= score(&pair[1]), "{whole}");
    }
    let joined: String = (0..3).map(|i| ranked(&["--shard", &format!("{i}/3")])).collect();
    assert_eq!(joined, whole);
    let json = ranked(&["--output-format", "jsonl", "-n", "1"]);
    let first: Value = serde_json::from_str(json.lines().nth(4).unwrap()).unwrap();
    let best = rows.iter().find(|row| row[0] == "t4").unwrap();
    assert_eq!((first["id"].as_str(), first["results"][0]["id"].as_str()), (Some("t4"), Some(best[2])));

    let server = start_server(&[]);
    let url = format!("http://{}", server.address());
    let name = support::fixture("xlmr").file_name().unwrap().to_str().unwrap().to_owned();
    let by_server = {
        let files = ["rank", "--run", &run, "--queries", &topics, "--collection", &collection];
        let output =
            rerankd().args(files).args(["--output", "-", "--server", &url, "--model", &name]).output().unwrap();
        String::from_utf8(output.stdout).unwrap()
    };
    assert_eq!(by_server, whole);
}
