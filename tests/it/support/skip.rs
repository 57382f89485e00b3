//! Tests that this machine cannot run are reported, counted and, in CI, checked against a list.

use std::fs::OpenOptions;
use std::io::Write;
use std::path::Path;

/// The skips that CI accepts; the file explains its format.
const ALLOWED: &str = include_str!("../../allowed_skips.txt");

/// Reports that `test` does not run on this machine, and why. The caller returns afterwards.
///
/// The line goes to standard error past libtest's capture, and to `target/tmp/skipped.txt`, which `.ci/run` prints and counts.
///
/// # Panics
/// If the environment has `CI=true` and tests/allowed_skips.txt does not list the test.
pub(crate) fn skip(test: &str, reason: &str) {
    let line = format!("SKIPPED {test}: {reason}\n");
    // Unlike `eprintln!`, a write to the handle is not captured when the test passes.
    std::io::stderr().write_all(line.as_bytes()).expect("standard error is open");
    let report = Path::new(env!("CARGO_TARGET_TMPDIR")).join("skipped.txt");
    // One write in append mode: tests of other threads and processes do not interleave.
    let mut report = OpenOptions::new().create(true).append(true).open(report).expect("target/tmp is writable");
    report.write_all(line.as_bytes()).expect("target/tmp is writable");
    let in_ci = std::env::var("CI").is_ok_and(|value| value == "true");
    assert!(
        !in_ci || is_allowed(test, ALLOWED),
        "{test} was skipped ({reason}), and tests/allowed_skips.txt does not list it"
    );
}

/// Whether the test's name starts with a name in `list`.
fn is_allowed(test: &str, list: &str) -> bool {
    list.lines()
        .filter(|line| !line.starts_with('#'))
        .filter_map(|line| line.split_once(": "))
        .any(|(prefix, _reason)| !prefix.is_empty() && test.starts_with(prefix))
}

#[test]
fn a_skip_is_allowed_by_the_name_of_the_test_or_its_start() {
    let list = "# a comment: with a colon\nreal_: no weights here\nslow_test: takes minutes\n: no name\n\n";
    for (test, allowed) in
        [("real_rows", true), ("slow_test", true), ("slow", false), ("a comment", false), ("x", false)]
    {
        assert_eq!(is_allowed(test, list), allowed, "{test}");
    }
    assert!(!is_allowed("anything", ""));
}
