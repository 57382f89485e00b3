//! The built-in model, through the real binary.

use std::process::{Command, Stdio};

use serde_json::Value;

use crate::support;

/// Runs the binary with the built-in model and returns its standard output.
fn rerankd(arguments: &[&str], input: &str) -> String {
    let mut child = Command::new(env!("CARGO_BIN_EXE_rerankd"))
        .args(arguments)
        .env("HF_HUB_OFFLINE", "1")
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap();
    std::io::Write::write_all(&mut child.stdin.take().unwrap(), input.as_bytes()).ok(); // the command may not read it
    let output = child.wait_with_output().unwrap();
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    String::from_utf8(output.stdout).unwrap()
}

/// The documents in the order of their scores, with the scores.
fn ranked(query: &str, documents: &[&str]) -> Vec<(String, f64)> {
    let lines = rerankd(&["rank", "--json", "--query", query], &documents.join("\n"));
    let result = |line: &str| {
        let result: Value = serde_json::from_str(line).unwrap();
        (result["text"].as_str().unwrap().to_owned(), result["relevance_score"].as_f64().unwrap())
    };
    lines.lines().map(result).collect()
}

#[test]
fn the_built_in_model_ranks_apple_first_for_apple() {
    let order = ranked("Apple", &["banana", "vegetable", "apple", "fruit"]);
    assert_eq!(order[0].0, "apple", "{order:?}");
    assert!(order[0].1 > 2.0 * order[1].1, "apple is clearly first: {order:?}");
}

#[test]
fn the_built_in_model_ranks_the_answer_first() {
    for (query, best, others) in [
        (
            "What is the capital of France?",
            "Paris is the capital and largest city of France.",
            ["Bananas are rich in potassium.", "The committee meets every Tuesday.", "Berlin lies on the river Spree."],
        ),
        (
            "how to install a package with apt",
            "Use apt install followed by the name of the package to install it.",
            ["The river floods every spring.", "Painting in oil needs patience.", "A violin has four strings."],
        ),
        (
            "北京有多少人口",
            "北京市常住人口超过两千万人。",
            ["苹果是一种水果。", "这本书介绍了绘画的历史。", "他在河边钓鱼。"],
        ),
    ] {
        let documents = [others[0], others[1], best, others[2]];
        let order = ranked(query, &documents);
        assert_eq!(order[0].0, best, "{query}: {order:?}");
    }
}

/// recall@1 of 30 questions. models/mini has the full evaluation.
#[test]
fn xquad_recall_of_the_built_in_model_is_above_its_floor() {
    let test = "xquad_recall_of_the_built_in_model_is_above_its_floor";
    for (file, floor) in [("xquad/xquad.en.json", 0.8), ("xquad/xquad.zh.json", 0.7)] {
        let Some(path) = support::real(test, file) else { return };
        let table = rerankd(&["eval", path.to_str().unwrap(), "--limit", "30", "--recall-at", "1"], "");
        eprintln!("{file}\n{table}");
        let row = table.lines().find(|line| line.starts_with("rerankd-mini")).unwrap();
        let recall: f64 = row.split_whitespace().nth(3).unwrap().parse().unwrap();
        assert!(recall >= floor, "{file}: recall@1 {recall} of 30 questions");
    }
}
