//! Downloads: a fake model hub on loopback, and the real binary that loads models from it by name.

use std::collections::HashMap;
use std::io::{BufRead, BufReader, Write};
use std::net::{TcpListener, TcpStream};
use std::path::{Path, PathBuf};
use std::process::{Command, Output};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};

use sha2::{Digest, Sha256};

use crate::support::{self, server};

/// A file of the fake hub.
#[derive(Clone)]
struct Served {
    content: Vec<u8>,
    etag: String,
    /// The first response with the content breaks off after this many bytes.
    cut_after: Option<usize>,
}

/// Answers `/{repository}/resolve/{revision}/{file}` with the headers that hub clients need, and records the requests.
struct Hub {
    address: String,
    requests: Arc<AtomicUsize>,
    tokens: Arc<Mutex<Vec<String>>>,
    /// The first byte of each request for content.
    starts: Arc<Mutex<Vec<usize>>>,
}

const COMMIT: &str = "0123456789abcdef0123456789abcdef01234567";

impl Hub {
    fn serve(repository: &str, files: HashMap<String, Served>) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let address = format!("http://{}", listener.local_addr().unwrap());
        let (requests, tokens) = (Arc::new(AtomicUsize::new(0)), Arc::new(Mutex::new(Vec::new())));
        let starts = Arc::new(Mutex::new(Vec::new()));
        let (count, seen, ranges) = (Arc::clone(&requests), Arc::clone(&tokens), Arc::clone(&starts));
        let prefix = format!("/{repository}/resolve/");
        let files = Mutex::new(files);
        std::thread::spawn(move || {
            for stream in listener.incoming() {
                count.fetch_add(1, Ordering::SeqCst);
                answer(stream.unwrap(), &prefix, &files, &seen, &ranges).ok();
            }
        });
        Self { address, requests, tokens, starts }
    }
}

fn answer(
    mut stream: TcpStream,
    prefix: &str,
    files: &Mutex<HashMap<String, Served>>,
    seen: &Mutex<Vec<String>>,
    ranges: &Mutex<Vec<usize>>,
) -> std::io::Result<()> {
    let mut lines = BufReader::new(stream.try_clone()?).lines();
    let path = lines.next().unwrap()?.split(' ').nth(1).unwrap().to_owned();
    let mut range_start = None;
    let mut range_end = None;
    for line in lines {
        let line = line?.to_ascii_lowercase();
        if line.is_empty() {
            break;
        }
        if let Some(range) = line.strip_prefix("range: bytes=") {
            let (start, end) = range.split_once('-').unwrap();
            (range_start, range_end) = (start.parse::<usize>().ok(), end.parse::<usize>().ok());
        }
        if let Some(token) = line.strip_prefix("authorization: ") {
            seen.lock().unwrap().push(token.to_owned());
        }
    }
    let mut files = files.lock().unwrap();
    let name = path.strip_prefix(prefix).and_then(|rest| rest.split_once('/')).map(|(_, file)| file.to_owned());
    let Some(file) = name.and_then(|name| files.get_mut(&name)) else {
        return write!(stream, "HTTP/1.1 404 Not Found\r\ncontent-length: 0\r\nconnection: close\r\n\r\n");
    };
    let all = file.content.len();
    let start = range_start.unwrap_or(0).min(all);
    let end = range_end.map_or(all, |end| (end + 1).min(all));
    write!(
        stream,
        "HTTP/1.1 206 Partial Content\r\nx-repo-commit: {COMMIT}\r\netag: \"{}\"\r\ncontent-range: bytes {start}-{}/{all}\r\ncontent-length: {}\r\nconnection: close\r\n\r\n",
        file.etag,
        end.saturating_sub(1),
        end - start
    )?;
    let whole = range_end.is_none();
    if whole {
        ranges.lock().unwrap().push(start);
    }
    let sent = if whole { file.cut_after.take().map_or(end, |cut| (start + cut).min(end)) } else { end };
    stream.write_all(&file.content[start..sent])
}

/// The files of a fixture, as a hub would serve them: large ones under their SHA-256.
fn fixture_files(name: &str) -> HashMap<String, Served> {
    let serve = |entry: std::io::Result<std::fs::DirEntry>| {
        let path = entry.unwrap().path();
        let content = std::fs::read(&path).unwrap();
        let file = path.file_name().unwrap().to_string_lossy().into_owned();
        let etag = if file.ends_with(".json") {
            format!("{:040x}", content.len())
        } else {
            format!("{:x}", Sha256::digest(&content))
        };
        (file, Served { content, etag, cut_after: None })
    };
    std::fs::read_dir(support::fixture(name)).unwrap().map(serve).collect()
}

/// Runs `rerankd rank` on a model by name, with its own cache.
fn rank(model: &str, hub: &str, cache: &Path, environment: &[(&str, &str)]) -> Output {
    let document = support::fixture("README.md");
    Command::new(env!("CARGO_BIN_EXE_rerankd"))
        .args(["rank", "--json", "--query", "a query", "--model", model])
        .arg(document)
        .env("HF_ENDPOINT", hub)
        .env("HF_HOME", cache)
        .env_remove("HF_TOKEN")
        .env_remove("HF_HUB_OFFLINE")
        .env_remove("HF_HUB_CACHE")
        .envs(environment.iter().copied())
        .output()
        .unwrap()
}

fn stderr(output: &Output) -> String {
    String::from_utf8_lossy(&output.stderr).into_owned()
}

/// All files below a folder.
fn files_below(folder: &Path) -> Vec<PathBuf> {
    let mut files = Vec::new();
    for entry in std::fs::read_dir(folder).unwrap() {
        let path = entry.unwrap().path();
        if path.is_dir() { files.extend(files_below(&path)) } else { files.push(path) }
    }
    files
}

#[test]
fn a_model_is_downloaded_once_and_then_loads_offline() {
    let hub = Hub::serve("org/small", fixture_files("xlmr"));
    let cache = tempfile::tempdir().unwrap();
    let first = rank("org/small", &hub.address, cache.path(), &[("HF_TOKEN", "hf_secret")]);
    assert!(first.status.success(), "{}", stderr(&first));
    assert!(
        hub.tokens.lock().unwrap().iter().all(|token| token == "bearer hf_secret")
            && !hub.tokens.lock().unwrap().is_empty()
    );
    let requests = hub.requests.load(Ordering::SeqCst);
    for environment in [&[("HF_HUB_OFFLINE", "1")][..], &[]] {
        let again = rank("org/small", &hub.address, cache.path(), environment);
        assert!(again.status.success(), "{}", stderr(&again));
        assert_eq!(again.stdout, first.stdout);
    }
    assert_eq!(hub.requests.load(Ordering::SeqCst), requests, "a cached model was requested again");
    let folder = rank(support::fixture("xlmr").to_str().unwrap(), &hub.address, cache.path(), &[]);
    assert_eq!(folder.stdout, first.stdout, "the same files scored differently from a folder");
}

#[test]
fn a_server_downloads_its_model_once_and_then_starts_offline() {
    let hub = Hub::serve("org/small", fixture_files("xlmr"));
    let cache = tempfile::tempdir().unwrap();
    let home = cache.path().to_str().unwrap();
    let body = r#"{"model":"org/small","query":"a query","documents":["one","two"]}"#;
    let start = |offline: &str| {
        let environment = [("HF_ENDPOINT", hub.address.as_str()), ("HF_HOME", home), ("HF_HUB_OFFLINE", offline)];
        server::Server::start_in(&["--model", "org/small"], &environment).scores(body)
    };
    let online = start("0");
    let requests = hub.requests.load(Ordering::SeqCst);
    assert_eq!(start("1"), online);
    assert_eq!(hub.requests.load(Ordering::SeqCst), requests);
}

#[test]
fn shards_and_pickles_are_found_without_options() {
    for fixture in ["xlmr-shards", "xlmr-pickle"] {
        let hub = Hub::serve("org/small", fixture_files(fixture));
        let cache = tempfile::tempdir().unwrap();
        let output = rank("org/small@v1.0", &hub.address, cache.path(), &[]);
        assert!(output.status.success(), "{fixture}: {}", stderr(&output));
    }
}

#[test]
fn an_interrupted_download_is_resumed() {
    let mut files = fixture_files("xlmr");
    files.get_mut("model.safetensors").unwrap().cut_after = Some(1000);
    let hub = Hub::serve("org/small", files);
    let cache = tempfile::tempdir().unwrap();
    let output = rank("org/small", &hub.address, cache.path(), &[]);
    assert!(output.status.success(), "{}", stderr(&output));
    assert!(hub.starts.lock().unwrap().contains(&1000), "the second request does not start at byte 1000");
}

#[test]
fn a_corrupt_download_is_neither_loaded_nor_kept() {
    let mut files = fixture_files("xlmr");
    let weights = files.get_mut("model.safetensors").unwrap();
    let last = weights.content.len() - 1;
    weights.content[last] ^= 1;
    let hub = Hub::serve("org/small", files);
    let cache = tempfile::tempdir().unwrap();
    let output = rank("org/small", &hub.address, cache.path(), &[]);
    assert_eq!(output.status.code(), Some(78));
    let message = stderr(&output);
    assert!(message.contains("model.safetensors") && message.contains("SHA-256"), "{message}");
    let cached = files_below(cache.path());
    let holds = |file: &PathBuf, text: &[u8]| std::fs::read(file).unwrap().windows(text.len()).any(|w| w == text);
    // The intact files were cached, so this test looks where downloads are kept.
    assert!(cached.iter().any(|file| holds(file, b"\"model_type\"")), "config.json is not in the cache: {cached:?}");
    let corrupt: Vec<&PathBuf> = cached.iter().filter(|file| holds(file, b"encoder.layer.0.")).collect();
    assert!(corrupt.is_empty(), "the corrupt download was kept: {corrupt:?}");
}

#[test]
fn a_missing_model_or_file_is_named_in_the_error() {
    let mut files = fixture_files("xlmr");
    files.remove("model.safetensors");
    let hub = Hub::serve("org/small", files);
    let cache = tempfile::tempdir().unwrap();
    for (model, environment, named) in [
        ("org/small", &[][..], "model.safetensors, model.safetensors.index.json, pytorch_model.bin"),
        ("org/other", &[], "config.json"),
        ("org/never-seen", &[("HF_HUB_OFFLINE", "1")], "HF_HUB_OFFLINE"),
    ] {
        let output = rank(model, &hub.address, cache.path(), environment);
        assert_eq!(output.status.code(), Some(78), "{model}");
        assert!(stderr(&output).contains(named), "{model}: {}", stderr(&output));
    }
    let output = rank("org/small", "http://127.0.0.1:9", tempfile::tempdir().unwrap().path(), &[]);
    assert!(stderr(&output).contains("HF_ENDPOINT"), "{}", stderr(&output));
}

#[test]
fn sigterm_during_a_download_ends_the_process() {
    let silent = TcpListener::bind("127.0.0.1:0").unwrap();
    let cache = tempfile::tempdir().unwrap();
    let mut child = server::rerankd()
        .args(["serve", "--port", "0", "--model", "org/small"])
        .env("HF_ENDPOINT", format!("http://{}", silent.local_addr().unwrap()))
        .env("HF_HOME", cache.path())
        .env("HF_HUB_OFFLINE", "0")
        .stderr(std::process::Stdio::null())
        .spawn()
        .unwrap();
    let _asked = silent.accept().unwrap();
    assert!(Command::new("kill").args(["-TERM", &child.id().to_string()]).status().unwrap().success());
    assert_eq!(child.wait().unwrap().code(), Some(130));
}
