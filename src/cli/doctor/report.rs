//! The findings of `rerankd doctor`, as text for people and as JSON.

use serde_json::{Value, json};

/// Column of the text after a finding's severity, and of the fix below it.
const INDENT: usize = 10;
/// Lines of text are at most this long.
const WIDTH: usize = 100;

/// What a finding means for a server on this machine.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Severity {
    Ok,
    /// Works, but could be better, or is not what one might expect.
    Note,
    /// The server would not start, or would not use what it was told to use.
    Problem,
}

/// One fact about the machine or the settings.
#[derive(Debug)]
struct Finding {
    section: &'static str,
    severity: Severity,
    text: String,
    /// What to type or change; may be empty.
    fix: String,
}

/// All findings, in sections.
#[derive(Debug, Default)]
pub(super) struct Report {
    section: &'static str,
    findings: Vec<Finding>,
}

impl Severity {
    fn name(self) -> &'static str {
        match self {
            Self::Ok => "ok",
            Self::Note => "note",
            Self::Problem => "problem",
        }
    }

    /// The escape sequence of the color: green, yellow or red.
    fn color(self) -> &'static str {
        match self {
            Self::Ok => "\x1b[32m",
            Self::Note => "\x1b[33m",
            Self::Problem => "\x1b[31m",
        }
    }
}

impl Report {
    /// Starts a section, to which the following findings belong.
    pub(super) fn section(&mut self, name: &'static str) {
        self.section = name;
    }

    pub(super) fn ok(&mut self, text: impl Into<String>) {
        self.add(Severity::Ok, text, "");
    }

    pub(super) fn note(&mut self, text: impl Into<String>, fix: impl Into<String>) {
        self.add(Severity::Note, text, fix);
    }

    pub(super) fn problem(&mut self, text: impl Into<String>, fix: impl Into<String>) {
        self.add(Severity::Problem, text, fix);
    }

    pub(super) fn add(&mut self, severity: Severity, text: impl Into<String>, fix: impl Into<String>) {
        self.findings.push(Finding { section: self.section, severity, text: text.into(), fix: fix.into() });
    }

    /// Number of problems.
    pub(super) fn problems(&self) -> usize {
        self.findings.iter().filter(|finding| finding.severity == Severity::Problem).count()
    }

    pub(super) fn text(&self, colors: bool) -> String {
        let mut text = String::new();
        let mut section = "";
        for finding in &self.findings {
            if finding.section != section {
                section = finding.section;
                text += &format!("{}{section}\n", if text.is_empty() { "" } else { "\n" });
            }
            let name = format!("{:<width$}", finding.severity.name(), width = INDENT - 2);
            let name = if colors { format!("{}{name}\x1b[0m", finding.severity.color()) } else { name };
            let mut lines = wrap(&finding.text, WIDTH - INDENT);
            if !finding.fix.is_empty() {
                lines.extend(wrap(&format!("fix: {}", finding.fix), WIDTH - INDENT));
            }
            text += &format!("  {name}{}\n", lines.join(&format!("\n{:INDENT$}", "")));
        }
        text
    }

    pub(super) fn json(&self) -> Value {
        let findings: Vec<Value> = self
            .findings
            .iter()
            .map(|finding| {
                let fix = Some(&finding.fix).filter(|fix| !fix.is_empty());
                json!({
                    "section": finding.section, "severity": finding.severity.name(), "text": finding.text, "fix": fix,
                })
            })
            .collect();
        json!({"version": env!("CARGO_PKG_VERSION"), "problems": self.problems(), "findings": findings})
    }
}

/// Splits text at spaces into lines of at most `width` characters; a longer word is a line of its own.
fn wrap(text: &str, width: usize) -> Vec<String> {
    let mut lines = vec![String::new()];
    for word in text.split_whitespace() {
        let line = lines.last_mut().expect("there is at least one line");
        if !line.is_empty() && line.chars().count() + 1 + word.chars().count() > width {
            lines.push(word.to_owned());
        } else {
            if !line.is_empty() {
                line.push(' ');
            }
            line.push_str(word);
        }
    }
    lines
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn findings_are_aligned_in_sections_with_their_fixes() {
        let mut report = Report::default();
        report.section("One");
        report.ok("fine");
        report.problem("word ".repeat(30), "type this");
        report.section("Two");
        report.note("hm", "");
        assert_eq!(
            report.text(false),
            format!(
                "One\n  ok      fine\n  problem {}\n          {}\n          fix: type this\n\nTwo\n  note    hm\n",
                ["word"; 18].join(" "),
                ["word"; 12].join(" ")
            )
        );
        assert_eq!((report.problems(), report.json()["findings"][1]["fix"].as_str()), (1, Some("type this")));
        assert!(report.text(true).contains("\x1b[31mproblem \x1b[0m"));
    }
}
