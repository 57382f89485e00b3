//! `rerankd health` against servers and stand-ins.

use std::io::{Read, Write};
use std::net::{TcpListener, TcpStream};
use std::process::Output;

use crate::support::fixture;
use crate::support::server::{Server, rerankd};

fn health(port: &str, arguments: &[&str], environment: &[(&str, &str)]) -> Output {
    rerankd()
        .arg("health")
        .args(arguments)
        .env("RERANKD_PORT", port)
        .envs(environment.iter().copied())
        .output()
        .unwrap()
}

fn start(arguments: &[&str]) -> (Server, String) {
    let model = fixture("xlmr").display().to_string();
    let server = Server::start(&[&["--model", &model], arguments].concat());
    let port = server.address().rsplit_once(':').unwrap().1.to_owned();
    (server, port)
}

/// Exit code, and the only line of standard output and standard error together.
fn line(output: &Output) -> (Option<i32>, String) {
    let text = String::from_utf8([output.stdout.as_slice(), &output.stderr].concat()).unwrap();
    assert_eq!(text.lines().count(), 1, "{text}");
    (output.status.code(), text.trim_end().to_owned())
}

/// Accepts one connection and answers with `answer`. Returns the port.
fn stand_in(answer: impl FnOnce(&mut TcpStream) + Send + 'static) -> String {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let port = listener.local_addr().unwrap().port().to_string();
    std::thread::spawn(move || answer(&mut listener.accept().unwrap().0));
    port
}

#[test]
fn a_healthy_server_is_one_line_and_exit_code_zero() {
    let (_server, port) = start(&["--api-key", "a-key-that-the-check-does-not-have"]);
    for (arguments, path) in [(&[][..], "health"), (&["--ready"], "ready"), (&["--host", "0.0.0.0"], "health")] {
        let expected = format!("http://127.0.0.1:{port}/{path} answered 200");
        assert_eq!(line(&health(&port, arguments, &[])), (Some(0), expected));
    }
}

#[test]
fn proxies_of_the_environment_are_not_asked() {
    let (_server, port) = start(&[]);
    let proxy = "http://127.0.0.1:1";
    let environment = ["http_proxy", "HTTP_PROXY", "all_proxy", "ALL_PROXY"].map(|name| (name, proxy));
    assert_eq!(line(&health(&port, &[], &environment)).0, Some(0));
}

#[test]
fn the_port_comes_from_the_config_file_as_for_serve() {
    let (_server, port) = start(&[]);
    let folder = tempfile::tempdir().unwrap();
    let file = folder.path().join("rerankd.toml");
    std::fs::write(&file, format!("port = {port}\nmax-documents = 10\n")).unwrap();
    let output = rerankd().arg("health").env("RERANKD_CONFIG", &file).output().unwrap();
    assert_eq!(line(&output).0, Some(0));
}

#[test]
fn a_server_that_is_not_healthy_is_reported_with_its_reason() {
    let port = stand_in(|stream| {
        assert!(stream.read(&mut [0; 1024]).unwrap() > 0);
        let body = r#"{"message":"the models are loading"}"#;
        write!(stream, "HTTP/1.1 503 x\r\ncontent-length: {}\r\n\r\n{body}", body.len()).unwrap();
    });
    let expected = format!("rerankd: http://127.0.0.1:{port}/health answered 503: the models are loading");
    assert_eq!(line(&health(&port, &[], &[])), (Some(1), expected));
}

#[test]
fn no_server_and_no_answer_are_failures() {
    let closed = TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().port().to_string();
    let (code, text) = line(&health(&closed, &[], &[]));
    assert!(code == Some(1) && text.contains(&closed), "{text}");

    let silent = stand_in(|stream| while stream.read(&mut [0; 1024]).is_ok_and(|count| count > 0) {});
    let (code, text) = line(&health(&silent, &["--timeout", "0.2"], &[]));
    assert!(code == Some(1) && text.contains("timeout"), "{text}");

    let (code, text) = line(&health("0", &[], &[]));
    assert!(code == Some(78) && text.contains("RERANKD_PORT"), "{text}");
}
