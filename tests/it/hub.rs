//! Downloads from a model hub. A stand-in on loopback plays the hub, with faults; the client is the library or the binary.
//! docs/reliability.md lists the findings that the comments name.

use std::collections::{HashMap, VecDeque};
use std::io::{BufRead, BufReader, Read, Write};
use std::net::{TcpListener, TcpStream};
use std::os::unix::fs::symlink;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Output, Stdio};
use std::sync::mpsc::{Receiver, Sender, channel};
use std::sync::{Arc, Condvar, Mutex};
use std::time::Duration;

use rerankd::loading::download::{HubError, HubOptions, NetworkPolicy, Revision};
use rerankd::secret::Secret;
use sha1::Sha1;
use sha2::{Digest, Sha256};

use crate::support::fixture;
use crate::support::server::{Server, rerankd};
use crate::support::tls::TlsProxy;

const COMMIT: &str = "0123456789abcdef0123456789abcdef01234567";
const OTHER_COMMIT: &str = "89abcdef0123456789abcdef0123456789abcdef";
const REPOSITORY: &str = "org/small";
const WEIGHTS: &str = "model.safetensors";

// The stand-in.

/// How the stand-in answers one request instead of the right way.
#[derive(Clone)]
enum Fault {
    /// Only this status line and these headers, each ended by `\r\n`.
    Status(&'static str, String),
    /// The connection ends after this many bytes of the body.
    CutAfter(usize),
    /// Nothing more follows after this many bytes of the body; the connection stays open.
    HoldAfter(usize),
    /// No answer at all; the connection stays open.
    Silent,
    /// One byte every 10 ms.
    Trickle,
    /// 200 and the whole file, whatever range was asked for.
    IgnoreRange,
    /// 206 with the bytes from the start, whatever range was asked for.
    WrongRange,
    /// 206 with another entity tag than before.
    ChangedTag,
    /// The right headers, with other bytes.
    WrongBytes,
    /// A page of 20 bytes as the content.
    OtherPage,
    /// The right answer, after this many metadata requests for the file have come.
    AfterMetadataRequests(usize),
}

/// One file of the stand-in.
#[derive(Clone)]
struct HubFile {
    content: Vec<u8>,
    etag: String,
    commit: String,
    /// What the next content requests meet, in order.
    faults: VecDeque<Fault>,
    /// What the next metadata requests meet, in order.
    metadata_faults: VecDeque<Fault>,
}

impl HubFile {
    /// A large file, whose entity tag is its SHA-256.
    fn large(content: Vec<u8>) -> Self {
        let etag = format!("{:x}", Sha256::digest(&content));
        Self { content, etag, commit: COMMIT.to_owned(), faults: VecDeque::new(), metadata_faults: VecDeque::new() }
    }

    /// A small file, whose entity tag is the hash that git gives it.
    fn small(content: Vec<u8>) -> Self {
        let mut sha1 = Sha1::new();
        sha1.update(format!("blob {}\0", content.len()));
        sha1.update(&content);
        Self { etag: format!("{:x}", sha1.finalize()), ..Self::large(content) }
    }
}

/// A request as the stand-in saw it.
#[derive(Debug, Clone)]
struct SeenRequest {
    is_metadata: bool,
    path: String,
    token: Option<String>,
    range_start: usize,
    if_range: Option<String>,
}

struct HubState {
    prefix: String,
    files: Mutex<HashMap<String, HubFile>>,
    requests: Mutex<Vec<SeenRequest>>,
    request_came: Condvar,
    /// Told whenever [`Fault::HoldAfter`] has sent its bytes, and when a body is complete.
    sent: Mutex<Option<Sender<()>>>,
}

/// Answers `/{repository}/resolve/{revision}/{file}` as a model hub does, and records the requests.
struct StandIn {
    address: String,
    state: Arc<HubState>,
}

impl StandIn {
    fn serve(files: HashMap<String, HubFile>) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let address = format!("http://{}", listener.local_addr().unwrap());
        let state = Arc::new(HubState {
            prefix: format!("/{REPOSITORY}/resolve/"),
            files: Mutex::new(files),
            requests: Mutex::new(Vec::new()),
            request_came: Condvar::new(),
            sent: Mutex::new(None),
        });
        let shared = Arc::clone(&state);
        std::thread::spawn(move || {
            for stream in listener.incoming() {
                let state = Arc::clone(&shared);
                std::thread::spawn(move || answer(stream.unwrap(), &state).ok());
            }
        });
        Self { address, state }
    }

    /// A hub with one large file of `length` bytes and the given faults.
    fn with_weights(length: usize, faults: impl IntoIterator<Item = Fault>) -> Self {
        let file = HubFile { faults: faults.into_iter().collect(), ..HubFile::large(random_bytes(length)) };
        Self::serve(HashMap::from([(WEIGHTS.to_owned(), file)]))
    }

    fn edit(&self, file: &str, change: impl FnOnce(&mut HubFile)) {
        change(self.state.files.lock().unwrap().get_mut(file).unwrap());
    }

    fn content(&self, file: &str) -> Vec<u8> {
        self.state.files.lock().unwrap()[file].content.clone()
    }

    fn requests(&self) -> Vec<SeenRequest> {
        self.state.requests.lock().unwrap().clone()
    }

    fn content_requests(&self) -> Vec<SeenRequest> {
        self.requests().into_iter().filter(|request| !request.is_metadata).collect()
    }

    fn notify_when_sent(&self) -> Receiver<()> {
        let (sender, receiver) = channel();
        *self.state.sent.lock().unwrap() = Some(sender);
        receiver
    }

    /// The library's client of this hub, with timeouts and delays that suit tests.
    fn client(&self, cache: &Path, token: Option<&str>) -> rerankd::loading::download::Hub {
        client_of(&self.address, cache, token)
    }
}

fn client_of(endpoint: &str, cache: &Path, token: Option<&str>) -> rerankd::loading::download::Hub {
    let options = HubOptions {
        cache: cache.to_owned(),
        endpoint: endpoint.to_owned(),
        token: token.map(Secret::new),
        offline: false,
    };
    let policy = NetworkPolicy {
        connect_timeout: Duration::from_secs(5),
        read_timeout: Duration::from_millis(500),
        min_bytes_per_second: 10_000,
        first_delay: Duration::from_millis(1),
        max_delay: Duration::from_millis(10),
        ..NetworkPolicy::default()
    };
    rerankd::loading::download::Hub::with_policy(options, policy)
}

fn read_request(stream: &TcpStream) -> std::io::Result<SeenRequest> {
    let mut lines = BufReader::new(stream.try_clone()?).lines();
    let start = lines.next().ok_or(std::io::ErrorKind::UnexpectedEof)??;
    let mut words = start.split(' ');
    let mut request = SeenRequest {
        is_metadata: words.next() == Some("HEAD"),
        path: words.next().unwrap_or_default().to_owned(),
        token: None,
        range_start: 0,
        if_range: None,
    };
    for line in lines {
        let line = line?;
        let Some((name, value)) = line.split_once(": ") else { break };
        match name.to_ascii_lowercase().as_str() {
            "range" => {
                let start = value.strip_prefix("bytes=").and_then(|range| range.strip_suffix('-'));
                request.range_start = start.unwrap().parse().unwrap();
            }
            "if-range" => request.if_range = Some(value.to_owned()),
            "authorization" => request.token = Some(value.to_owned()),
            _ => {}
        }
    }
    Ok(request)
}

fn answer(mut stream: TcpStream, state: &HubState) -> std::io::Result<()> {
    let request = read_request(&stream)?;
    state.requests.lock().unwrap().push(request.clone());
    state.request_came.notify_all();
    let name = request.path.strip_prefix(&state.prefix).and_then(|rest| rest.split_once('/')).map(|(_, file)| file);
    let found = name.and_then(|name| {
        let mut files = state.files.lock().unwrap();
        let file = files.get_mut(name)?;
        let faults = if request.is_metadata { &mut file.metadata_faults } else { &mut file.faults };
        Some((faults.pop_front(), file.clone()))
    });
    let Some((fault, file)) = found else {
        return write!(stream, "HTTP/1.1 404 Not Found\r\ncontent-length: 0\r\nconnection: close\r\n\r\n");
    };
    let length = file.content.len();
    let mut start = request.range_start;
    let mut is_partial = start > 0 && request.if_range.as_ref().is_none_or(|tag| *tag == format!("\"{}\"", file.etag));
    let mut etag = file.etag.clone();
    match &fault {
        Some(Fault::Status(status, headers)) => {
            return write!(stream, "HTTP/1.1 {status}\r\n{headers}content-length: 0\r\nconnection: close\r\n\r\n");
        }
        Some(Fault::Silent) => return wait_for_close(&mut stream),
        Some(Fault::OtherPage) => {
            return write!(
                stream,
                "HTTP/1.1 200 OK\r\ncontent-length: 20\r\nconnection: close\r\n\r\n<html>sorry</html>\r\n"
            );
        }
        Some(Fault::IgnoreRange) => is_partial = false,
        Some(Fault::WrongRange) => start = 0,
        Some(Fault::ChangedTag) => {
            etag = "another".to_owned();
            is_partial = true;
        }
        Some(Fault::AfterMetadataRequests(count)) => {
            let file_name = name.unwrap_or_default();
            let too_few = |requests: &mut Vec<SeenRequest>| {
                requests.iter().filter(|seen| seen.is_metadata && seen.path.ends_with(file_name)).count() < *count
            };
            drop(state.request_came.wait_while(state.requests.lock().unwrap(), too_few).unwrap());
        }
        _ => {}
    }
    if !is_partial {
        start = 0;
    }
    let status = if is_partial { "206 Partial Content" } else { "200 OK" };
    write!(stream, "HTTP/1.1 {status}\r\nx-repo-commit: {}\r\netag: \"{etag}\"\r\n", file.commit)?;
    if is_partial {
        write!(stream, "content-range: bytes {start}-{}/{length}\r\n", length - 1)?;
    }
    write!(stream, "content-length: {}\r\nconnection: close\r\n\r\n", length - start)?;
    if request.is_metadata {
        return Ok(());
    }
    let body = &file.content[start..];
    let notify = || state.sent.lock().unwrap().as_ref().map(|sender| sender.send(()).ok());
    match fault {
        Some(Fault::CutAfter(count)) => stream.write_all(&body[..count.min(body.len())]),
        Some(Fault::HoldAfter(count)) => {
            stream.write_all(&body[..count.min(body.len())])?;
            notify();
            wait_for_close(&mut stream)
        }
        Some(Fault::Trickle) => body.chunks(1).try_for_each(|byte| {
            std::thread::sleep(Duration::from_millis(10)); // paces the sender; nothing waits for it
            stream.write_all(byte)
        }),
        Some(Fault::WrongBytes) => stream.write_all(&vec![7; body.len()]),
        _ => {
            stream.write_all(body)?;
            notify();
            Ok(())
        }
    }
}

fn wait_for_close(stream: &mut TcpStream) -> std::io::Result<()> {
    stream.read(&mut [0]).map(|_| ())
}

// What the tests share.

fn random_bytes(length: usize) -> Vec<u8> {
    let mut generator = fastrand::Rng::with_seed(length as u64);
    std::iter::repeat_with(|| generator.u8(..)).take(length).collect()
}

fn main_revision() -> Revision {
    Revision { repository: REPOSITORY.to_owned(), revision: "main".to_owned() }
}

fn hub_error(error: &anyhow::Error) -> &HubError {
    error.downcast_ref::<HubError>().unwrap_or_else(|| panic!("no HubError in {error:#}"))
}

/// All files below a folder, links not followed.
fn all_files(folder: &Path) -> Vec<PathBuf> {
    let mut files = Vec::new();
    for entry in std::fs::read_dir(folder).into_iter().flatten() {
        let entry = entry.unwrap();
        if entry.file_type().unwrap().is_dir() {
            files.extend(all_files(&entry.path()));
        } else {
            files.push(entry.path());
        }
    }
    files
}

fn repository_folder(cache: &Path) -> PathBuf {
    cache.join("models--org--small")
}

fn incomplete_files(cache: &Path) -> Vec<PathBuf> {
    all_files(cache).into_iter().filter(|path| path.extension().is_some_and(|end| end == "incomplete")).collect()
}

/// The files of a fixture: JSON as small files, the rest as large ones.
fn fixture_files(name: &str) -> HashMap<String, HubFile> {
    let folder = fixture(name);
    let serve = |path: PathBuf| {
        let content = std::fs::read(&path).unwrap();
        let file = path.strip_prefix(&folder).unwrap().to_string_lossy().into_owned();
        let served = if file.ends_with(".json") { HubFile::small(content) } else { HubFile::large(content) };
        (file, served)
    };
    all_files(&folder).into_iter().map(serve).collect()
}

/// The binary with its own hub and cache folder.
fn binary(hub: &str, home: &Path) -> Command {
    let mut command = rerankd();
    command.env("HF_ENDPOINT", hub).env("HF_HOME", home);
    for name in ["HF_TOKEN", "HF_TOKEN_PATH", "HF_HUB_OFFLINE", "HF_HUB_CACHE"] {
        command.env_remove(name);
    }
    command
}

/// Runs `rerankd rank` on a model by name.
fn rank(model: &str, hub: &str, home: &Path, environment: &[(&str, &str)]) -> Output {
    binary(hub, home)
        .args(["rank", "--json", "--query", "a query", "--model", model])
        .arg(fixture("README.md"))
        .envs(environment.iter().copied())
        .output()
        .unwrap()
}

fn spawn_download(hub: &str, home: &Path) -> Child {
    binary(hub, home).args(["download", REPOSITORY]).stdout(Stdio::null()).stderr(Stdio::piped()).spawn().unwrap()
}

fn stderr(output: &Output) -> String {
    String::from_utf8_lossy(&output.stderr).into_owned()
}

// The binary.

#[test]
fn a_model_is_downloaded_once_and_then_loads_offline() {
    let hub = StandIn::serve(fixture_files("xlmr"));
    let home = tempfile::tempdir().unwrap();
    let first = rank(REPOSITORY, &hub.address, home.path(), &[("HF_TOKEN", "hf_secret")]);
    assert!(first.status.success(), "{}", stderr(&first));
    let requests = hub.requests();
    assert!(!requests.is_empty());
    assert!(requests.iter().all(|request| request.token.as_deref() == Some("Bearer hf_secret")), "{requests:?}");
    for environment in [&[("HF_HUB_OFFLINE", "1")][..], &[]] {
        let again = rank(REPOSITORY, &hub.address, home.path(), environment);
        assert!(again.status.success(), "{}", stderr(&again));
        assert_eq!(again.stdout, first.stdout);
    }
    assert_eq!(hub.requests().len(), requests.len(), "a cached model needs no request");
    let folder = rank(fixture("xlmr").to_str().unwrap(), &hub.address, home.path(), &[]);
    assert_eq!(folder.stdout, first.stdout, "the same files from their folder");
}

/// `command` without the certificates that this machine's environment names.
fn with_certificates(command: &mut Command, file: &Path) -> Output {
    command.env_remove("SSL_CERT_DIR").env("SSL_CERT_FILE", file).output().unwrap()
}

#[test]
fn a_mirror_with_a_certificate_of_a_private_authority_is_trusted_if_ssl_cert_file_names_it() {
    let hub = StandIn::serve(fixture_files("xlmr"));
    let proxy = TlsProxy::to(hub.address.strip_prefix("http://").unwrap());
    let home = tempfile::tempdir().unwrap();
    let mut command = binary(&proxy.url, home.path());
    let output = with_certificates(command.args(["download", REPOSITORY]), &proxy.authority());
    assert!(output.status.success(), "{}", stderr(&output));
    assert!(!hub.content_requests().is_empty());
}

#[test]
fn a_private_authority_that_is_not_trusted_is_named_with_the_way_out() {
    let hub = StandIn::serve(fixture_files("xlmr"));
    let proxy = TlsProxy::to(hub.address.strip_prefix("http://").unwrap());
    let home = tempfile::tempdir().unwrap();
    let other = TlsProxy::to("127.0.0.1:1");
    // Without any certificate the built-in list is used, which does not have this authority either.
    let empty = home.path().join("empty.pem");
    std::fs::write(&empty, "").unwrap();
    for file in [other.authority(), empty] {
        let mut command = binary(&proxy.url, home.path());
        let output =
            with_certificates(command.args(["doctor", "--port", "0", "--online", "--model", REPOSITORY]), &file);
        let text = String::from_utf8_lossy(&output.stdout);
        assert!(output.status.code() == Some(78) && text.contains("SSL_CERT_FILE"), "{text}{}", stderr(&output));
    }
    assert!(hub.requests().is_empty());
}

#[test]
fn doctor_asks_the_hub_only_if_told_and_downloads_nothing() {
    let hub = StandIn::serve(fixture_files("xlmr"));
    let home = tempfile::tempdir().unwrap();
    let doctor = |hub: &str, arguments: &[&str]| {
        let mut command = binary(hub, home.path());
        command.args(["doctor", "--port", "0", "--model", REPOSITORY]).args(arguments);
        let output = command.output().unwrap();
        (output.status.code(), String::from_utf8_lossy(&output.stdout).into_owned())
    };
    assert_eq!(doctor(&hub.address, &[]).0, Some(0));
    assert_eq!(hub.requests().len(), 0);
    let (code, text) = doctor(&hub.address, &["--online"]);
    assert!(code == Some(0) && text.contains(&format!("has {REPOSITORY} at main")), "{text}");
    assert!(hub.requests().len() == 1 && hub.content_requests().is_empty());
    hub.edit("config.json", |file| {
        file.metadata_faults.push_back(Fault::Status("403 Forbidden", String::new()));
    });
    let (code, text) = doctor(&hub.address, &["--online"]);
    assert!(code == Some(78) && text.contains("accept its terms"), "{text}");
    let (code, text) = doctor("http://127.0.0.1:1", &["--online"]);
    assert!(code == Some(78) && text.contains("cannot be reached") && text.contains("HF_ENDPOINT"), "{text}");
    assert_eq!(all_files(home.path()), Vec::<PathBuf>::new());
}

#[test]
fn a_chain_of_modules_is_downloaded_with_its_folders() {
    let hub = StandIn::serve(fixture_files("ettin"));
    let home = tempfile::tempdir().unwrap();
    let first = rank(REPOSITORY, &hub.address, home.path(), &[]);
    assert!(first.status.success(), "{}", stderr(&first));
    let requests = hub.requests().len();
    let offline = rank(REPOSITORY, &hub.address, home.path(), &[("HF_HUB_OFFLINE", "1")]);
    assert!(offline.status.success(), "{}", stderr(&offline));
    assert_eq!(hub.requests().len(), requests);
    let folder = rank(fixture("ettin").to_str().unwrap(), &hub.address, home.path(), &[]);
    assert_eq!((&offline.stdout, &folder.stdout), (&first.stdout, &first.stdout));
}

#[test]
fn a_missing_file_of_a_module_is_named_in_the_error() {
    let mut files = fixture_files("ettin");
    files.remove("3_LayerNorm/config.json");
    let hub = StandIn::serve(files);
    let home = tempfile::tempdir().unwrap();
    let output = rank(REPOSITORY, &hub.address, home.path(), &[]);
    assert!(!output.status.success() && stderr(&output).contains("3_LayerNorm/config.json"), "{}", stderr(&output));
}

#[test]
fn a_server_downloads_its_model_and_then_starts_offline() {
    let hub = StandIn::serve(fixture_files("xlmr"));
    let home = tempfile::tempdir().unwrap();
    let home = home.path().to_str().unwrap();
    let body = r#"{"model":"org/small","query":"a query","documents":["one","two"]}"#;
    let start = |offline: &str| {
        let environment = [("HF_ENDPOINT", hub.address.as_str()), ("HF_HOME", home), ("HF_HUB_OFFLINE", offline)];
        Server::start_in(&["--model", REPOSITORY], &environment).scores(body)
    };
    let online = start("0");
    let requests = hub.requests().len();
    assert_eq!(start("1"), online);
    assert_eq!(hub.requests().len(), requests);
}

#[test]
fn sharded_and_pickled_checkpoints_are_found_without_a_file_name() {
    for fixture in ["xlmr-shards", "xlmr-pickle"] {
        let hub = StandIn::serve(fixture_files(fixture));
        let home = tempfile::tempdir().unwrap();
        let output = rank("org/small@v1.0", &hub.address, home.path(), &[]);
        assert!(output.status.success(), "{fixture}: {}", stderr(&output));
    }
}

// Finding D: names from an index file become paths, so they are checked before they are requested.
#[test]
fn a_shard_name_that_leaves_the_folder_is_refused() {
    for shard in ["../outside.safetensors", "a/b.safetensors", "/etc/passwd", ".hidden"] {
        let mut files = fixture_files("xlmr");
        files.remove(WEIGHTS);
        let index = format!(r#"{{"metadata":{{}},"weight_map":{{"a":"{shard}"}}}}"#);
        files.insert("model.safetensors.index.json".to_owned(), HubFile::small(index.into_bytes()));
        let hub = StandIn::serve(files);
        let home = tempfile::tempdir().unwrap();
        let output = rank(REPOSITORY, &hub.address, home.path(), &[]);
        assert!(!output.status.success(), "{shard}");
        assert!(stderr(&output).contains(shard), "{shard}: {}", stderr(&output));
        assert!(hub.requests().iter().all(|request| !request.path.contains(shard)), "{shard} was requested");
    }
}

#[test]
fn damaged_weights_are_neither_loaded_nor_kept() {
    let mut files = fixture_files("xlmr");
    let weights = files.get_mut(WEIGHTS).unwrap();
    let last = weights.content.len() - 1;
    weights.content[last] ^= 1;
    let blob = weights.etag.clone();
    let hub = StandIn::serve(files);
    let home = tempfile::tempdir().unwrap();
    let output = rank(REPOSITORY, &hub.address, home.path(), &[]);
    assert!(!output.status.success());
    let message = stderr(&output);
    assert!(message.contains(WEIGHTS) && message.contains("SHA-256"), "{message}");
    let blobs: Vec<PathBuf> = all_files(&repository_folder(&home.path().join("hub")).join("blobs"));
    assert_eq!(blobs.len(), 2, "config.json and tokenizer.json: {blobs:?}");
    assert!(blobs.iter().all(|path| !path.to_string_lossy().contains(&blob)), "{blobs:?}");
}

#[test]
fn missing_files_are_named() {
    let mut files = fixture_files("xlmr");
    files.remove(WEIGHTS);
    let hub = StandIn::serve(files);
    let home = tempfile::tempdir().unwrap();
    for (model, environment, named) in [
        (REPOSITORY, &[][..], "model.safetensors, model.safetensors.index.json, pytorch_model.bin"),
        ("org/other", &[], "config.json"),
        ("org/never-seen", &[("HF_HUB_OFFLINE", "1")], "HF_HUB_OFFLINE"),
    ] {
        let output = rank(model, &hub.address, home.path(), environment);
        assert!(!output.status.success(), "{model}");
        assert!(stderr(&output).contains(named), "{model}: {}", stderr(&output));
    }
}

// Finding M: the second of two processes gave up on the lock after 5 s.
#[test]
fn two_processes_with_one_cache_download_each_file_once() {
    let mut files = fixture_files("xlmr");
    files.get_mut(WEIGHTS).unwrap().faults.push_back(Fault::AfterMetadataRequests(2));
    let hub = StandIn::serve(files);
    let home = tempfile::tempdir().unwrap();
    let children = [(); 2].map(|()| spawn_download(&hub.address, home.path()));
    for child in children {
        let output = child.wait_with_output().unwrap();
        assert!(output.status.success(), "{}", stderr(&output));
    }
    let weights = |request: &SeenRequest| request.path.ends_with(WEIGHTS);
    assert_eq!(hub.content_requests().into_iter().filter(weights).count(), 1);
    assert_eq!(incomplete_files(home.path()), Vec::<PathBuf>::new());
}

// Goal G9 and finding N: a killed process left an unverified file under its final name.
#[test]
fn a_download_killed_100_times_loses_and_damages_nothing() {
    const KILLS_IN_BODY: usize = 80;
    const KILLS_AT_END: usize = 20;
    const STEP: usize = 30_000;
    let mut files = fixture_files("xlmr");
    files.insert(WEIGHTS.to_owned(), HubFile::large(random_bytes(3_000_000)));
    let hub = StandIn::serve(files);
    let content = hub.content(WEIGHTS);
    let home = tempfile::tempdir().unwrap();
    let cache = home.path().join("hub");
    let snapshot = repository_folder(&cache).join("snapshots").join(COMMIT).join(WEIGHTS);
    // The kills are for the weights; the small files are cached before.
    for file in ["config.json", "tokenizer.json"] {
        hub.client(&cache, None).fetch(&main_revision(), file).unwrap();
    }

    for kill in 0..KILLS_IN_BODY + KILLS_AT_END {
        if snapshot.exists() {
            std::fs::remove_file(snapshot.canonicalize().unwrap()).unwrap();
            std::fs::remove_file(&snapshot).unwrap();
        }
        let fault = (kill < KILLS_IN_BODY).then_some(Fault::HoldAfter(STEP));
        hub.edit(WEIGHTS, |file| file.faults = fault.into_iter().collect());
        let before = incomplete_files(&cache).first().map_or(0, |path| path.metadata().unwrap().len() as usize);
        let requests = hub.content_requests().len();
        let sent = hub.notify_when_sent();
        let mut child = spawn_download(&hub.address, home.path());
        // If the body was complete before, the process verifies and publishes it without a request.
        if before < content.len() && !is_published(&cache, &content) {
            sent.recv_timeout(Duration::from_secs(60)).expect("the process requests the weights");
            assert_eq!(hub.content_requests()[requests].range_start, before, "kill {kill}: every byte is kept");
        }
        child.kill().unwrap();
        child.wait().unwrap();
        for path in incomplete_files(&cache) {
            assert!(content.starts_with(&std::fs::read(path).unwrap()), "kill {kill}: the file is damaged");
        }
        if snapshot.exists() {
            assert!(std::fs::read(&snapshot).unwrap() == content, "kill {kill}: a damaged file was published");
        }
    }
    hub.edit(WEIGHTS, |file| file.faults.clear());
    let output = spawn_download(&hub.address, home.path()).wait_with_output().unwrap();
    assert!(output.status.success(), "{}", stderr(&output));
    assert!(std::fs::read(snapshot).unwrap() == content);
    assert_eq!(incomplete_files(&cache), Vec::<PathBuf>::new());
}

fn is_published(cache: &Path, content: &[u8]) -> bool {
    repository_folder(cache).join("blobs").join(format!("{:x}", Sha256::digest(content))).exists()
}

#[test]
fn a_signal_while_a_model_is_downloaded_stops_the_server() {
    let silent = TcpListener::bind("127.0.0.1:0").unwrap();
    let home = tempfile::tempdir().unwrap();
    let mut child = rerankd()
        .args(["serve", "--port", "0", "--model", "org/small"])
        .env("HF_ENDPOINT", format!("http://{}", silent.local_addr().unwrap()))
        .env("HF_HOME", home.path())
        .env("HF_HUB_OFFLINE", "0")
        .stderr(std::process::Stdio::null())
        .spawn()
        .unwrap();
    let _asked = silent.accept().unwrap();
    assert!(Command::new("kill").args(["-TERM", &child.id().to_string()]).status().unwrap().success());
    assert_eq!(child.wait().unwrap().code(), Some(0), "stopped on request");
}

// The library: faults that a download survives.

// Finding M: faults before the body were not retried. Finding L10 and fault F53: the server did not start.
#[test]
fn recoverable_faults_end_with_the_right_content() {
    use Fault::{ChangedTag, CutAfter, HoldAfter, IgnoreRange, Silent, Status, Trickle, WrongBytes, WrongRange};
    let status = |line| Status(line, String::new());
    let cases: [(&str, Vec<Fault>); 14] = [
        ("cut once", vec![CutAfter(1000)]),
        ("cut before the first byte", vec![CutAfter(0)]),
        ("cut three times", vec![CutAfter(1000), CutAfter(1), CutAfter(50_000)]),
        ("range ignored", vec![CutAfter(1000), IgnoreRange]),
        ("wrong range", vec![CutAfter(1000), WrongRange]),
        ("wrong bytes in the range", vec![CutAfter(1000), WrongBytes]),
        ("range refused", vec![CutAfter(1000), status("416 Range Not Satisfiable")]),
        ("entity tag changed", vec![CutAfter(1000), ChangedTag]),
        ("too many requests", vec![Status("429 Too Many Requests", "retry-after: 3600\r\n".to_owned())]),
        ("unavailable three times", vec![status("503 Service Unavailable"); 3]),
        ("no answer", vec![Silent]),
        ("silent in the body", vec![HoldAfter(1000)]),
        ("slow body", vec![Trickle]),
        ("all at once", vec![status("500 Internal Server Error"), CutAfter(1000), HoldAfter(1000)]),
    ];
    for (name, faults) in cases {
        let hub = StandIn::with_weights(100_000, faults);
        let cache = tempfile::tempdir().unwrap();
        let path = hub
            .client(cache.path(), None)
            .fetch(&main_revision(), WEIGHTS)
            .unwrap_or_else(|error| panic!("{name}: {error:#}"));
        assert!(std::fs::read(path).unwrap() == hub.content(WEIGHTS), "{name}");
        assert_eq!(incomplete_files(cache.path()), Vec::<PathBuf>::new(), "{name}");
        assert!(hub.state.files.lock().unwrap()[WEIGHTS].faults.is_empty(), "{name}: all faults were met");
    }
}

#[test]
fn metadata_requests_are_retried() {
    let hub = StandIn::with_weights(1000, []);
    let unavailable = Fault::Status("503 Service Unavailable", "retry-after: 0\r\n".to_owned());
    hub.edit(WEIGHTS, |file| file.metadata_faults = [unavailable.clone(), Fault::Silent, unavailable].into());
    let cache = tempfile::tempdir().unwrap();
    hub.client(cache.path(), None).fetch(&main_revision(), WEIGHTS).unwrap();
}

#[test]
fn a_broken_download_continues_under_the_same_entity_tag() {
    let hub = StandIn::with_weights(100_000, [Fault::CutAfter(1000)]);
    let cache = tempfile::tempdir().unwrap();
    hub.client(cache.path(), None).fetch(&main_revision(), WEIGHTS).unwrap();
    let requests = hub.content_requests();
    let etag = hub.state.files.lock().unwrap()[WEIGHTS].etag.clone();
    assert_eq!(requests.iter().map(|request| request.range_start).collect::<Vec<_>>(), [0, 1000]);
    assert_eq!(requests[1].if_range, Some(format!("\"{etag}\"")));
}

#[test]
fn damaged_bytes_of_an_earlier_process_are_downloaded_again() {
    let hub = StandIn::with_weights(100_000, []);
    let cache = tempfile::tempdir().unwrap();
    let etag = hub.state.files.lock().unwrap()[WEIGHTS].etag.clone();
    let blobs = repository_folder(cache.path()).join("blobs");
    std::fs::create_dir_all(&blobs).unwrap();
    for length in [1000, 100_000, 200_000] {
        std::fs::remove_dir_all(repository_folder(cache.path()).join("snapshots")).ok();
        std::fs::remove_file(blobs.join(&etag)).ok();
        std::fs::write(blobs.join(format!("{etag}.incomplete")), vec![7; length]).unwrap();
        let path = hub.client(cache.path(), None).fetch(&main_revision(), WEIGHTS).unwrap();
        assert!(std::fs::read(path).unwrap() == hub.content(WEIGHTS), "{length} bytes");
    }
}

// Finding N: a blob that an older version left unverified was trusted.
#[test]
fn an_unverified_blob_without_a_snapshot_is_replaced() {
    let hub = StandIn::with_weights(100_000, []);
    let cache = tempfile::tempdir().unwrap();
    let blobs = repository_folder(cache.path()).join("blobs");
    std::fs::create_dir_all(&blobs).unwrap();
    std::fs::write(blobs.join(&hub.state.files.lock().unwrap()[WEIGHTS].etag), vec![7; 100_000]).unwrap();
    let path = hub.client(cache.path(), None).fetch(&main_revision(), WEIGHTS).unwrap();
    assert!(std::fs::read(path).unwrap() == hub.content(WEIGHTS));
}

// The library: faults that end a download.

// Finding M: an unreachable hub, a busy hub and a wrong file all looked the same.
#[test]
fn a_hub_that_stays_unavailable_is_a_temporary_error() {
    let unavailable = Fault::Status("503 Service Unavailable", String::new());
    let hub = StandIn::with_weights(1000, vec![unavailable; 100]);
    let cache = tempfile::tempdir().unwrap();
    let error = hub.client(cache.path(), None).fetch(&main_revision(), WEIGHTS).unwrap_err();
    assert!(hub_error(&error).is_temporary(), "{error:#}");
    assert_eq!(hub.content_requests().len(), 5);
    let silent = TcpListener::bind("127.0.0.1:0").unwrap();
    let closed = TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap();
    for address in [silent.local_addr().unwrap(), closed] {
        let client = client_of(&format!("http://{address}"), cache.path(), None);
        let error = client.fetch(&main_revision(), WEIGHTS).unwrap_err();
        assert!(hub_error(&error).is_temporary(), "{error:#}");
        assert!(format!("{error:#}").contains("HF_ENDPOINT"), "{error:#}");
    }
}

#[test]
fn lasting_faults_are_reported_and_leave_no_file() {
    let status = |line| Fault::Status(line, String::new());
    let wrong_content = |file: &mut HubFile| file.content[5] ^= 1;
    type Case = (&'static str, &'static str, Box<dyn Fn(&mut HubFile)>);
    let metadata = |fault: Fault| move |file: &mut HubFile| file.metadata_faults = vec![fault.clone(); 10].into();
    let cases: [Case; 7] = [
        ("another page", "announced", Box::new(|file| file.faults.push_back(Fault::OtherPage))),
        ("wrong SHA-256", "SHA-256", Box::new(wrong_content)),
        (
            "wrong git hash",
            "git blob hash",
            Box::new(move |file| {
                *file = HubFile::small(file.content.clone());
                wrong_content(file);
            }),
        ),
        ("unauthorized", "HF_TOKEN", Box::new(metadata(status("401 Unauthorized")))),
        ("forbidden", "HF_TOKEN", Box::new(metadata(status("403 Forbidden")))),
        // Finding L11: the client panicked.
        ("no location", "location", Box::new(metadata(status("302 Found")))),
        (
            "redirect loop",
            "redirects",
            Box::new(|file| {
                let location = format!("location: /{REPOSITORY}/resolve/main/{WEIGHTS}\r\n");
                file.metadata_faults = vec![Fault::Status("302 Found", location); 20].into();
            }),
        ),
    ];
    for (name, expected, prepare) in cases {
        let hub = StandIn::with_weights(100_000, []);
        hub.edit(WEIGHTS, prepare);
        let cache = tempfile::tempdir().unwrap();
        let error = hub.client(cache.path(), None).fetch(&main_revision(), WEIGHTS).unwrap_err();
        assert!(!hub_error(&error).is_temporary(), "{name}: {error:#}");
        assert!(format!("{error:#}").contains(expected), "{name}: {error:#}");
        let blobs = all_files(&repository_folder(cache.path()).join("blobs"));
        assert!(blobs.iter().all(|blob| blob.metadata().unwrap().len() == 0), "{name}: {blobs:?}");
        assert!(!repository_folder(cache.path()).join("snapshots").exists(), "{name}");
    }
}

#[test]
fn a_cache_that_cannot_be_written_is_named() {
    let hub = StandIn::with_weights(1000, []);
    let folder = tempfile::tempdir().unwrap();
    let cache = folder.path().join("a file");
    std::fs::write(&cache, "").unwrap();
    let error = hub.client(&cache, None).fetch(&main_revision(), WEIGHTS).unwrap_err();
    assert!(format!("{error:#}").contains(cache.to_str().unwrap()), "{error:#}");
}

// The library: a hostile hub.

// Finding D: a commit or entity tag with a path in it wrote outside the cache.
#[test]
fn a_hostile_commit_or_entity_tag_writes_nothing_outside_the_cache() {
    let folder = tempfile::tempdir().unwrap();
    let victim = folder.path().join("victim");
    std::fs::write(&victim, "precious").unwrap();
    for hostile in [victim.to_str().unwrap(), "../../../../victim", "..", ""] {
        let cache = folder.path().join("cache");
        std::fs::remove_dir_all(&cache).ok();
        let hub = StandIn::with_weights(1000, []);
        hub.edit(WEIGHTS, |file| file.commit = hostile.to_owned());
        let error = hub.client(&cache, None).fetch(&main_revision(), WEIGHTS).unwrap_err();
        assert!(format!("{error:#}").contains("x-repo-commit"), "{hostile}: {error:#}");
        assert_eq!(all_files(&cache), Vec::<PathBuf>::new(), "{hostile}");

        let hub = StandIn::with_weights(1000, []);
        hub.edit(WEIGHTS, |file| file.etag = hostile.to_owned());
        let path = hub.client(&cache, None).fetch(&main_revision(), WEIGHTS).unwrap();
        let content = hub.content(WEIGHTS);
        assert!(std::fs::read(&path).unwrap() == content, "{hostile}");
        let blob = repository_folder(&cache).join("blobs").join(format!("{:x}", Sha256::digest(&content)));
        assert_eq!(path.canonicalize().unwrap(), blob.canonicalize().unwrap(), "the blob has the name of its content");
        assert_eq!(std::fs::read_to_string(&victim).unwrap(), "precious", "{hostile}");
        assert_eq!(std::fs::read_dir(folder.path()).unwrap().count(), 2, "{hostile}");
    }
}

#[test]
fn file_and_revision_names_that_leave_the_cache_are_refused() {
    let hub = StandIn::with_weights(1000, []);
    let cache = tempfile::tempdir().unwrap();
    let client = hub.client(cache.path(), None);
    for file in ["../x", "/etc/passwd", "a/b/c", "..", ""] {
        let error = client.fetch(&main_revision(), file).unwrap_err();
        assert!(matches!(hub_error(&error), HubError::UnsafeName(_)), "{file}: {error:#}");
    }
    let at = Revision { revision: "../../../x".to_owned(), ..main_revision() };
    let error = client.fetch(&at, WEIGHTS).unwrap_err();
    assert!(matches!(hub_error(&error), HubError::UnsafeName(_)), "{error:#}");
    assert!(hub.requests().is_empty());
}

// Finding D: files are not written through links that wait in the cache.
#[test]
fn a_link_in_the_place_of_the_incomplete_file_is_not_followed() {
    let hub = StandIn::with_weights(1000, []);
    let folder = tempfile::tempdir().unwrap();
    let victim = folder.path().join("victim");
    std::fs::write(&victim, "precious").unwrap();
    let blobs = repository_folder(folder.path()).join("blobs");
    std::fs::create_dir_all(&blobs).unwrap();
    let etag = hub.state.files.lock().unwrap()[WEIGHTS].etag.clone();
    symlink(&victim, blobs.join(format!("{etag}.incomplete"))).unwrap();
    let path = hub.client(folder.path(), None).fetch(&main_revision(), WEIGHTS).unwrap();
    assert!(std::fs::read(path).unwrap() == hub.content(WEIGHTS));
    assert_eq!(std::fs::read_to_string(victim).unwrap(), "precious");
}

// Finding J: the token was sent to every host that the hub redirected to.
#[test]
fn the_token_stays_with_the_hub_when_it_redirects() {
    let storage = StandIn::with_weights(1000, []);
    let port = storage.address.rsplit(':').next().unwrap().to_owned();
    let path = format!("/{REPOSITORY}/resolve/main/{WEIGHTS}");
    for host in ["localhost", "127.0.0.1"] {
        let elsewhere = format!("location: http://{host}:{port}{path}\r\n");
        let relative = format!("location: {path}\r\n");
        for (metadata, content) in [(&relative, &elsewhere), (&elsewhere, &relative), (&elsewhere, &elsewhere)] {
            let hub = StandIn::with_weights(1000, []);
            hub.edit(WEIGHTS, |file| {
                file.metadata_faults = [Fault::Status("307 Temporary Redirect", metadata.clone())].into();
                file.faults = [Fault::Status("302 Found", content.clone())].into();
            });
            let cache = tempfile::tempdir().unwrap();
            hub.client(cache.path(), Some("hf_secret")).fetch(&main_revision(), WEIGHTS).unwrap();
            let requests = hub.requests();
            assert!(
                requests.iter().all(|request| request.token.as_deref() == Some("Bearer hf_secret")),
                "{requests:?}"
            );
        }
    }
    let requests = storage.requests();
    assert!(!requests.is_empty());
    assert!(requests.iter().all(|request| request.token.is_none()), "{requests:?}");
}

// The cache.

#[test]
fn the_cache_has_the_layout_of_huggingface_hub() {
    let hub = StandIn::with_weights(1000, []);
    let cache = tempfile::tempdir().unwrap();
    let path = hub.client(cache.path(), None).fetch(&main_revision(), WEIGHTS).unwrap();
    let repository = repository_folder(cache.path());
    let etag = hub.state.files.lock().unwrap()[WEIGHTS].etag.clone();
    assert_eq!(path, repository.join("snapshots").join(COMMIT).join(WEIGHTS));
    assert_eq!(std::fs::read_link(&path).unwrap(), Path::new("../../blobs").join(&etag));
    assert_eq!(std::fs::read_to_string(repository.join("refs/main")).unwrap(), COMMIT);
    assert!(cache.path().join(".locks/models--org--small").join(format!("{etag}.lock")).exists());
}

#[test]
fn all_files_come_from_the_commit_of_the_first_one() {
    let files = HashMap::from([
        ("config.json".to_owned(), HubFile::small(b"{}".to_vec())),
        (WEIGHTS.to_owned(), HubFile::large(random_bytes(1000))),
    ]);
    let hub = StandIn::serve(files);
    let cache = tempfile::tempdir().unwrap();
    let client = hub.client(cache.path(), None);
    client.fetch(&main_revision(), "config.json").unwrap();
    client.fetch(&main_revision(), WEIGHTS).unwrap();
    let requests = hub.requests();
    assert!(requests[0].path.contains("/main/"));
    assert!(requests[1..].iter().all(|request| request.path.contains(COMMIT)), "{requests:?}");

    hub.edit(WEIGHTS, |file| file.commit = OTHER_COMMIT.to_owned());
    let pinned = Revision { revision: COMMIT.to_owned(), ..main_revision() };
    let fresh = tempfile::tempdir().unwrap();
    let error = hub.client(fresh.path(), None).fetch(&pinned, WEIGHTS).unwrap_err();
    assert!(format!("{error:#}").contains(OTHER_COMMIT), "another commit than the pinned one: {error:#}");
}

#[test]
fn an_optional_file_that_does_not_exist_is_no_error() {
    let hub = StandIn::with_weights(1000, []);
    let cache = tempfile::tempdir().unwrap();
    let client = hub.client(cache.path(), None);
    assert_eq!(client.fetch_optional(&main_revision(), "added_tokens.json").unwrap(), None);
    assert!(client.fetch(&main_revision(), "added_tokens.json").unwrap_err().to_string().contains("added_tokens.json"));
    assert_eq!(hub.requests().len(), 2, "404 is not retried");
}

#[cfg(feature = "failpoints")]
mod failpoints {
    use super::*;

    #[test]
    fn a_full_disk_is_named_damages_nothing_and_the_next_start_continues() {
        let mut files = fixture_files("xlmr");
        files.insert(WEIGHTS.to_owned(), HubFile::large(random_bytes(1_000_000)));
        for (fault, transfers_more) in
            [("download-write=3*off->return", true), ("download-sync=return", false), ("download-rename=return", false)]
        {
            let hub = StandIn::serve(files.clone());
            let content = hub.content(WEIGHTS);
            let home = tempfile::tempdir().unwrap();
            let cache = home.path().join("hub");
            // The fault is for the weights; the small files are cached before.
            for file in ["config.json", "tokenizer.json"] {
                hub.client(&cache, None).fetch(&main_revision(), file).unwrap();
            }
            let requests = hub.content_requests().len();

            let mut command = binary(&hub.address, home.path());
            let output = command.args(["download", REPOSITORY]).env("FAILPOINTS", fault).output().unwrap();
            let message = stderr(&output);
            assert_eq!(output.status.code(), Some(78), "{fault}: {message}");
            let blobs = repository_folder(&cache).join("blobs").display().to_string();
            assert!(message.contains(&blobs) && message.contains("free some space"), "{fault}: {message}");
            assert!(!is_published(&cache, &content), "{fault}");
            let [incomplete] = &incomplete_files(&cache)[..] else { panic!("{fault}: no incomplete file") };
            let kept = std::fs::read(incomplete).unwrap();
            assert!(!kept.is_empty() && content.starts_with(&kept), "{fault}: the file is damaged");
            assert_eq!(kept.len() < content.len(), transfers_more, "{fault}");

            let output = spawn_download(&hub.address, home.path()).wait_with_output().unwrap();
            assert!(output.status.success(), "{fault}: {}", stderr(&output));
            let snapshot = repository_folder(&cache).join("snapshots").join(COMMIT).join(WEIGHTS);
            assert!(std::fs::read(snapshot).unwrap() == content, "{fault}");
            assert_eq!(incomplete_files(&cache), Vec::<PathBuf>::new(), "{fault}");
            let starts: Vec<usize> = hub.content_requests()[requests..].iter().map(|seen| seen.range_start).collect();
            let expected = if transfers_more { vec![0, kept.len()] } else { vec![0] };
            assert_eq!(starts, expected, "{fault}: every byte is transferred once");
        }
    }
}
