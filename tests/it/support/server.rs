//! The real binary as a server on a real socket.

use std::io::{BufRead, BufReader, Read, Write};
use std::net::TcpStream;
use std::process::{Child, ChildStderr, Command, Stdio};

use serde_json::Value;

/// The binary without `RERANKD_` settings of the environment, and with downloads off.
pub(crate) fn rerankd() -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_rerankd"));
    for (name, _) in std::env::vars().filter(|(name, _)| name.starts_with("RERANKD_")) {
        command.env_remove(name);
    }
    command.env("HF_HUB_OFFLINE", "1");
    command
}

/// A server process on a free port. Dropping it kills the process.
pub(crate) struct Server {
    pub(crate) child: Child,
    stderr: BufReader<ChildStderr>,
    address: String,
}

impl Server {
    pub(crate) fn start(arguments: &[&str]) -> Self {
        Self::start_in(arguments, &[])
    }

    /// [`Server::start`] with environment variables.
    pub(crate) fn start_in(arguments: &[&str], environment: &[(&str, &str)]) -> Self {
        let mut command = rerankd();
        command.args(["serve", "--port", "0"]).args(arguments).envs(environment.iter().copied());
        Self::start_command(command)
    }

    /// [`Server::start`] with at most `files` open files (`ulimit -n`).
    pub(crate) fn start_with_file_limit(files: usize, arguments: &[&str]) -> Self {
        let server = rerankd();
        let mut command = Command::new("sh");
        command.args(["-c", &format!("ulimit -n {files}; exec \"$0\" \"$@\"")]);
        command.arg(server.get_program()).args(["serve", "--port", "0"]).args(arguments);
        for (name, value) in server.get_envs() {
            match value {
                Some(value) => command.env(name, value),
                None => command.env_remove(name),
            };
        }
        Self::start_command(command)
    }

    fn start_command(mut command: Command) -> Self {
        let mut child = command.stderr(Stdio::piped()).spawn().unwrap();
        let mut stderr = BufReader::new(child.stderr.take().unwrap());
        let mut log = String::new();
        let address = loop {
            let mut line = String::new();
            assert!(stderr.read_line(&mut line).unwrap() > 0, "the server ended before it listened: {log}");
            if let Some((_, address)) = line.trim().split_once("listening on http://") {
                break address.chars().take_while(|c| c.is_ascii_digit() || matches!(c, '.' | ':')).collect();
            }
            log.push_str(&line);
        };
        Self { child, stderr, address }
    }

    /// IP address and port.
    pub(crate) fn address(&self) -> &str {
        &self.address
    }

    pub(crate) fn connect(&self) -> TcpStream {
        TcpStream::connect(&self.address).unwrap()
    }

    /// Sends a request on a new connection and reads until the server closes it.
    pub(crate) fn request(&self, text: &str) -> String {
        request(&self.address, text)
    }

    pub(crate) fn rerank(&self, body: &str) -> String {
        post(&self.address, body)
    }

    /// Sends a rerank request and returns the scores in the order of the request's documents.
    pub(crate) fn scores(&self, body: &str) -> Vec<f64> {
        scores_of(&self.rerank(body))
    }

    pub(crate) fn signal(&self, name: &str) {
        let status = Command::new("kill").args([name, &self.child.id().to_string()]).status().unwrap();
        assert!(status.success());
    }

    /// After a signal, returns when the server takes no new connection or reports that it is not ready.
    pub(crate) fn wait_until_it_drains(&self) {
        while let Ok(mut stream) = TcpStream::connect(&self.address) {
            let mut answer = String::new();
            let asked = stream.write_all(b"GET /ready HTTP/1.1\r\nhost: localhost\r\nconnection: close\r\n\r\n");
            if asked.and_then(|()| stream.read_to_string(&mut answer)).is_err() || !answer.starts_with("HTTP/1.1 200") {
                return;
            }
        }
    }

    pub(crate) fn exit_code(&mut self) -> Option<i32> {
        self.child.wait().unwrap().code()
    }

    /// Reads the log up to the first line that contains `text`, and returns these lines. Panics if the server ends before.
    pub(crate) fn log_until(&mut self, text: &str) -> String {
        let mut log = String::new();
        loop {
            let start = log.len();
            assert!(self.stderr.read_line(&mut log).unwrap() > 0, "the server ended before it logged {text:?}: {log}");
            if log[start..].contains(text) {
                return log;
            }
        }
    }

    /// Requests a path with GET.
    pub(crate) fn get(&self, path: &str) -> String {
        self.request(&format!("GET {path} HTTP/1.1\r\nhost: localhost\r\nconnection: close\r\n\r\n"))
    }

    pub(crate) fn rest_of_log(&mut self) -> String {
        let mut log = String::new();
        self.stderr.read_to_string(&mut log).unwrap();
        log
    }
}

/// Sends a request on a new connection and reads until the server closes it.
fn request(address: &str, text: &str) -> String {
    let mut stream = TcpStream::connect(address).unwrap();
    stream.write_all(text.as_bytes()).unwrap();
    let mut answer = String::new();
    stream.read_to_string(&mut answer).unwrap();
    answer
}

/// Sends a rerank request to the server at `address`.
pub(crate) fn post(address: &str, body: &str) -> String {
    let length = body.len();
    request(
        address,
        &format!(
            "POST /v1/rerank HTTP/1.1\r\nhost: localhost\r\nconnection: close\r\ncontent-length: {length}\r\n\r\n{body}"
        ),
    )
}

/// The scores of a rerank response, in the order of the request's documents.
pub(crate) fn scores_of(answer: &str) -> Vec<f64> {
    let json: Value = serde_json::from_str(answer.split_once("\r\n\r\n").unwrap().1).unwrap();
    let mut results: Vec<(u64, f64)> = json["results"]
        .as_array()
        .unwrap_or_else(|| panic!("{answer}"))
        .iter()
        .map(|result| (result["index"].as_u64().unwrap(), result["relevance_score"].as_f64().unwrap()))
        .collect();
    results.sort_by_key(|&(index, _)| index);
    results.into_iter().map(|(_, score)| score).collect()
}

impl Drop for Server {
    fn drop(&mut self) {
        self.child.kill().ok();
        self.child.wait().ok();
    }
}
