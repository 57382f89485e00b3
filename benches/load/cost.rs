//! Processor time and memory of the server for each byte of hostile requests (goal G5 of docs/reliability.md).

use std::path::PathBuf;
use std::time::{Duration, Instant};

use anyhow::Result;
use serde_json::json;
use tokio::io::{AsyncReadExt, AsyncWriteExt};

use super::client::{connect, post};
use super::report::append_json;
use super::server::{ServerArgs, ServerProcess, Watch};

const MODEL: &str = "rerankd-mini";
const MIB: usize = 1 << 20;
/// Processor time has a resolution of 10 ms, so each input is sent until the server has used this much time, but at most
/// [`MAX_TIMES`] times.
const ENOUGH_CPU_S: f64 = 0.5;
const MAX_TIMES: usize = 200;

#[derive(Debug, Clone, clap::Args)]
pub(crate) struct Args {
    #[command(flatten)]
    server: ServerArgs,
    /// Appends a line of JSON for every input
    #[arg(long)]
    json: Option<PathBuf>,
}

pub(crate) async fn run(args: Args) -> Result<()> {
    println!(
        "| input | MB | status | server CPU ms | us/KB | server CPU / client CPU | memory MiB | memory / byte sent |"
    );
    println!("|---|---|---|---|---|---|---|---|");
    for (name, wire) in inputs() {
        // A fresh server, so that memory of an earlier input does not hide that of this one.
        let server = args.server.start(&[])?;
        send(&server.address, &post("/v1/rerank", &request(json!(["a"])))).await;
        let row = measure(&server, &wire).await;
        let bytes = wire.len() as f64;
        println!(
            "| {name} | {:.2} | {} | {:.1} | {:.2} | {:.1} | {:.1} | {:.1} |",
            bytes / 1e6,
            row.status,
            1e3 * row.cpu_s,
            1e9 * row.cpu_s / bytes,
            row.cpu_s / row.client_cpu_s,
            row.memory_mib,
            row.memory_mib * MIB as f64 / bytes,
        );
        let line = json!({"command": "cost", "input": name, "bytes": wire.len(), "status": row.status, "server_cpu_s": row.cpu_s,
            "client_cpu_s": row.client_cpu_s, "memory_mib": row.memory_mib});
        append_json(args.json.as_deref(), &line)?;
    }
    Ok(())
}

struct Row {
    status: String,
    /// Processor time of the server for sending the input once.
    cpu_s: f64,
    /// The same of this process.
    client_cpu_s: f64,
    /// Highest resident memory while the input is first sent, less that before, in MiB.
    memory_mib: f64,
}

async fn measure(server: &ServerProcess, wire: &[u8]) -> Row {
    let (watch, own) = (server.watch, Watch::this_process());
    tokio::time::sleep(Duration::from_millis(200)).await;
    let base = watch.rss_mib();
    watch.reset_peak();
    let status = send(&server.address, wire).await;
    let memory_mib = watch.peak_mib() - base;
    let (cpu, client_cpu) = (watch.cpu_seconds(), own.cpu_seconds());
    let mut times = 0;
    while times < MAX_TIMES && watch.cpu_seconds() - cpu < ENOUGH_CPU_S {
        send(&server.address, wire).await;
        times += 1;
    }
    // At least one tick, so that the ratio is not infinite.
    let of = |now: f64, before: f64| (now - before).max(0.01) / times as f64;
    Row { status, cpu_s: of(watch.cpu_seconds(), cpu), client_cpu_s: of(own.cpu_seconds(), client_cpu), memory_mib }
}

/// Sends the bytes while reading, and returns the status of the first answer, or what happened instead. Reads one answer, or all
/// of them if a request asks for the connection to be closed.
async fn send(address: &str, wire: &[u8]) -> String {
    let Ok(stream) = connect(address).await else { return "no connection".to_owned() };
    let (mut reader, mut writer) = stream.into_split();
    let until_closed = wire.windows(17).any(|bytes| bytes == b"connection: close");
    let wire = wire.to_vec();
    let writing = tokio::spawn(async move {
        writer.write_all(&wire).await.ok();
        writer // dropped later: dropping it closes the sending side
    });
    let mut answer = Vec::new();
    let deadline = Instant::now() + Duration::from_secs(60);
    loop {
        let mut buffer = [0; 16 << 10];
        match tokio::time::timeout_at(deadline.into(), reader.read(&mut buffer)).await {
            Ok(Ok(0) | Err(_)) => break,
            Err(_) => return "timeout".to_owned(),
            Ok(Ok(n)) => answer.extend_from_slice(&buffer[..n]),
        }
        if !until_closed && is_complete(&answer) {
            break;
        }
    }
    writing.abort();
    let head = String::from_utf8_lossy(&answer[..answer.len().min(12)]).into_owned();
    head.split(' ').nth(1).map_or_else(|| "closed".to_owned(), str::to_owned)
}

/// Whether the first answer has arrived.
fn is_complete(answer: &[u8]) -> bool {
    let Some(end) = answer.windows(4).position(|bytes| bytes == b"\r\n\r\n") else { return false };
    let head = String::from_utf8_lossy(&answer[..end]).to_ascii_lowercase();
    let length = head.lines().find_map(|line| line.strip_prefix("content-length: ")?.parse::<usize>().ok());
    answer.len() >= end + 4 + length.unwrap_or(0)
}

fn request(documents: serde_json::Value) -> String {
    json!({"model": MODEL, "query": "q", "documents": documents}).to_string()
}

fn chunked(body: &[u8], chunk: usize) -> Vec<u8> {
    let mut wire = b"POST /v1/rerank HTTP/1.1\r\nhost: localhost\r\ntransfer-encoding: chunked\r\n\r\n".to_vec();
    for piece in body.chunks(chunk) {
        wire.extend_from_slice(format!("{:x}\r\n", piece.len()).as_bytes());
        wire.extend_from_slice(piece);
        wire.extend_from_slice(b"\r\n");
    }
    wire.extend_from_slice(b"0\r\n\r\n");
    wire
}

/// Names and bytes of the inputs. F and a number is a fault of docs/reliability.md.
fn inputs() -> Vec<(&'static str, Vec<u8>)> {
    let rerank = |body: &str| post("/v1/rerank", body);
    let raw = |documents: String| rerank(&format!(r#"{{"model":"{MODEL}","query":"q","documents":{documents}}}"#));
    let document = |text: String| rerank(&request(json!([text])));
    let get = |headers: String| format!("GET /v1/models HTTP/1.1\r\nhost: localhost\r\n{headers}\r\n\r\n").into_bytes();
    let names = |n: usize| (0..n).map(|i| format!("z{i}")).collect::<Vec<_>>();
    let fields: serde_json::Map<String, serde_json::Value> =
        (0..300_000).map(|i| (format!("f{i}"), json!(""))).collect();
    let random = &mut fastrand::Rng::with_seed(7);
    let query = super::client::text(random, 160_000);
    vec![
        ("F1 not JSON, 8 MiB", rerank(&"{\"a".repeat(8 * MIB / 3))),
        ("F2 numbers as documents", raw(format!("[{}1]", "1,".repeat(4 * MIB - 100)))),
        ("F3 unknown fields", rerank(&format!(r#"{{{}"query":"q","documents":["d"]}}"#, r#""x":0,"#.repeat(MIB)))),
        ("F6 array instead of the object", rerank(&format!("[{}1]", "1,".repeat(4 * MIB - 100)))),
        ("F7 nesting of 8 million levels", raw("[".repeat(8 * MIB - 200))),
        ("F7 nested arrays in documents", raw(format!("[{}[0]]", "[0,0,0],".repeat(MIB - 100)))),
        ("F8 lone surrogates", raw(format!("[\"{}\"]", r"\ud800".repeat(MIB)))),
        ("F12 2.7 million empty documents", raw(format!("[{}\"\"]", "\"\",".repeat(2_700_000)))),
        ("F12 99,000 empty documents", raw(format!("[{}\"\"]", "\"\",".repeat(99_000)))),
        ("F13 body of 50 MB, with a length", rerank(&" ".repeat(50_000_000))),
        ("F14 body of 50 MB, chunked", chunked(&vec![b' '; 50_000_000], 64 << 10)),
        ("F15 one word of a million letters", document("a".repeat(1_000_000))),
        ("F15 a million exclamation marks", document("!".repeat(1_000_000))),
        ("F15 500,000 emoji", document("\u{1f600}".repeat(500_000))),
        ("F15 U+FDFA, 8 MB in 11 documents", rerank(&request(json!(vec!["\u{fdfa}".repeat(250_000); 11])))),
        ("F15 spaces, 8 MB in 31 documents", rerank(&request(json!(vec![" ".repeat(262_000); 31])))),
        ("F15 exclamation marks, 8 MB in 31 documents", rerank(&request(json!(vec!["!".repeat(262_000); 31])))),
        ("F16 query of 1 MB", rerank(&json!({"model": MODEL, "query": query, "documents": ["d"]}).to_string())),
        (
            "F17 long query, overlap 80, long document",
            rerank(&json!({"model": MODEL, "query": "word ".repeat(500), "documents": ["word ".repeat(50_000)], "overlap_tokens": 80}).to_string()),
        ),
        ("F20 8 MB of text in 1,000 documents", super::attack::large_request()),
        ("F23 model name of 1 MB", rerank(&json!({"model": "/".repeat(MIB), "query": "q", "documents": ["d"]}).to_string())),
        ("F25 key of 1 MB", get(format!("authorization: Bearer {}", "k".repeat(MIB)))),
        ("F27 101 headers", get((0..101).map(|i| format!("x-{i}: 1\r\n")).collect::<String>().trim_end().to_owned())),
        ("F29 200,000 chunks of 1 byte", chunked(&vec![b' '; 200_000], 1)),
        (
            "F31 1,000 pipelined requests",
            [get("accept: */*".to_owned()).repeat(999), get("connection: close".to_owned())].concat(),
        ),
        (
            "rank_fields beside fields",
            rerank(&json!({"model": MODEL, "query": "q", "documents": [fields], "rank_fields": names(200_000)}).to_string()),
        ),
        ("unused fields of a document", raw(format!("[{{{}\"text\":\"d\"}}]", "\"a\":\"b\",".repeat(MIB - 100)))),
    ]
}
