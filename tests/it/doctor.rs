//! `rerankd doctor`: what it finds, its exit codes, and its colors.

use std::net::TcpListener;
use std::process::Output;

use serde_json::Value;

use crate::support::server::rerankd;
use crate::support::{fixture, skip};

/// Runs `doctor` on a free port, unless `arguments` name another.
fn doctor(arguments: &[&str], environment: &[(&str, &str)]) -> Output {
    let mut command = rerankd();
    command.arg("doctor").env("RERANKD_PORT", "0").args(arguments).env_remove("HF_TOKEN");
    command.envs(environment.iter().copied()).output().unwrap()
}

fn stdout(output: &Output) -> String {
    String::from_utf8_lossy(&output.stdout).into_owned()
}

/// The findings as (severity, text, fix), after a check of the exit code.
fn findings(arguments: &[&str], environment: &[(&str, &str)]) -> Vec<(String, String, String)> {
    let output = doctor(&[&["--json"], arguments].concat(), environment);
    let report: Value = serde_json::from_str(&stdout(&output)).unwrap();
    let text = |finding: &Value, field: &str| finding[field].as_str().unwrap_or_default().to_owned();
    let findings: Vec<_> = report["findings"]
        .as_array()
        .unwrap()
        .iter()
        .map(|finding| (text(finding, "severity"), text(finding, "text"), text(finding, "fix")))
        .collect();
    let problems = findings.iter().filter(|(severity, ..)| severity == "problem").count();
    assert_eq!(report["problems"], problems);
    let code = if problems == 0 { 0 } else { 78 };
    assert_eq!(output.status.code(), Some(code), "{}", String::from_utf8_lossy(&output.stderr));
    findings
}

#[test]
fn the_built_in_model_runs_on_every_machine() {
    let findings = findings(&[], &[]);
    let texts: Vec<&str> = findings.iter().map(|(_, text, _)| text.as_str()).collect();
    for named in ["instruction set", "billion operations", "free of", "open files", "cache folder", "built in"] {
        assert!(texts.iter().any(|text| text.contains(named)), "{named}: {texts:?}");
    }
    assert!(findings.iter().all(|(severity, ..)| severity != "problem"), "{findings:?}");
}

#[test]
fn the_device_and_the_precision_are_those_of_serve() {
    for dtype in ["auto", "f32", "int8"] {
        let flags = ["--dtype", dtype, "--threads", "1"];
        let log = log_of_rank(&flags);
        let findings = findings(&flags, &[]);
        let (_, device, _) = findings.iter().find(|(_, text, _)| text.starts_with("device: ")).unwrap();
        let precision = device.split("precision: ").nth(1).unwrap().split(' ').next().unwrap();
        assert!(device.contains("CPU, 1 threads"), "{device}");
        assert!(log.contains(&format!("CPU, {precision}, ")), "{device}: {log}");
    }
}

/// What a command that loads the built-in model logs.
fn log_of_rank(flags: &[&str]) -> String {
    let mut command = rerankd();
    let output =
        command.args(["rank", "--query", "a", "--log", "debug"]).args(flags).arg(fixture("README.md")).output();
    String::from_utf8_lossy(&output.unwrap().stderr).into_owned()
}

#[test]
fn problems_say_what_to_type() {
    let taken = TcpListener::bind("127.0.0.1:0").unwrap();
    let port = taken.local_addr().unwrap().port().to_string();
    let folder = tempfile::tempdir().unwrap();
    let empty = folder.path().display().to_string();
    let no_cache = [("HF_HUB_OFFLINE", "0"), ("HF_HUB_CACHE", "/proc/none")];
    for (arguments, environment, named, way_out) in [
        (&["--port", &port][..], &[][..], "cannot listen", "--port 0"),
        (&["--model", "bge-reranker-v2-m4"], &[], "Did you mean BAAI/bge-reranker-v2-m3?", ""),
        (&["--model", &empty], &[], "no checkpoint in this folder", ""),
        (&["--model", "bge-reranker-v2-m3"], &[("HF_HUB_CACHE", &*empty)], "not in the cache", "rerankd download BAAI"),
        (&["--model", "bge-reranker-v2-m3"], &no_cache, "2.3 GB", "HF_HOME"),
        (&["--dtype", "f16"], &[], "--dtype f16 needs a GPU", ""),
        (&[], &[("HF_HUB_OFFLINE", "perhaps")], "HF_HUB_OFFLINE", ""),
    ] {
        let findings = findings(arguments, environment);
        let found = findings
            .iter()
            .any(|(severity, text, fix)| severity == "problem" && text.contains(named) && fix.contains(way_out));
        assert!(found, "{arguments:?} {environment:?}: {findings:?}");
    }
}

#[test]
fn notes_are_not_problems() {
    let model = fixture("ettin").display().to_string();
    for (arguments, environment, named) in [
        (&["--threads", "4096"][..], &[][..], "more than the"),
        (&["--host", "0.0.0.0"], &[], "no API key"),
        (&["--model", &model, "--dtype", "int8"], &[], "computed in bf16"),
        (&["--model", "bge-reranker-v2-m3"], &[("HF_HUB_OFFLINE", "0"), ("HF_HUB_CACHE", "/tmp/none")], "downloads it"),
    ] {
        let findings = findings(arguments, environment);
        let found = findings.iter().any(|(severity, text, _)| severity == "note" && text.contains(named));
        assert!(found, "{arguments:?}: {findings:?}");
        assert!(findings.iter().all(|(severity, ..)| severity != "problem"), "{arguments:?}: {findings:?}");
    }
}

#[cfg(feature = "cuda")]
#[test]
fn a_gpu_that_is_asked_for_and_absent_is_a_problem() {
    let findings = findings(&["--device", "cuda"], &[]);
    let gpu = findings.iter().find(|(_, text, _)| text.contains("NVIDIA")).unwrap();
    if gpu.0 != "problem" {
        skip("cuda_is_rejected_without_a_driver_by_doctor", "this machine has a CUDA driver");
        return;
    }
    assert!(gpu.2.contains("--device cpu") || gpu.2.contains("install the NVIDIA driver"), "{gpu:?}");
}

#[test]
fn the_token_is_mentioned_and_not_printed() {
    let output = doctor(&[], &[("HF_TOKEN", "hf_secret")]);
    assert!(stdout(&output).contains("an access token is set"));
    assert!(!stdout(&output).contains("hf_secret") && !String::from_utf8_lossy(&output.stderr).contains("hf_secret"));
}

#[test]
fn colors_are_for_terminals_unless_they_are_forced_or_forbidden() {
    let colored = |environment: &[(&str, &str)]| stdout(&doctor(&[], environment)).contains('\x1b');
    assert!(!colored(&[]), "a pipe is not a terminal");
    assert!(colored(&[("CLICOLOR_FORCE", "1")]));
    assert!(!colored(&[("CLICOLOR_FORCE", "1"), ("NO_COLOR", "1")]));
}

#[test]
fn lines_fit_into_a_terminal() {
    let text = stdout(&doctor(&["--model", "bge-reranker-v2-m3", "--host", "0.0.0.0"], &[]));
    assert!(text.lines().count() > 15);
    // A line may be longer for a path.
    assert!(text.lines().all(|line| line.chars().count() <= 100 || line.contains('/')), "{text}");
}
