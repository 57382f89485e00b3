//! Rust text to tokens: names and punctuation, without comments, literals and items under `#[cfg(test)]`.

/// A name, or one character of punctuation; `::` is one token.
#[derive(Debug, Clone)]
pub(crate) struct Token {
    pub(crate) text: String,
    /// From 1.
    pub(crate) line: usize,
}

impl Token {
    pub(crate) fn is_name(&self) -> bool {
        self.text.starts_with(|c: char| c.is_alphabetic() || c == '_')
    }
}

/// The tokens of a file.
pub(crate) struct Code {
    pub(crate) tokens: Vec<Token>,
}

impl Code {
    /// Reads a file. Also returns the names of its test modules that are in files of their own.
    pub(crate) fn parse(text: &str) -> (Self, Vec<String>) {
        let (tokens, test_modules) = without_tests(tokens(text));
        (Self { tokens }, test_modules)
    }

    /// The lines on which this sequence of tokens begins, such as `["env", "::", "var"]`.
    pub(crate) fn lines_of(&self, sequence: &[&str]) -> Vec<usize> {
        let is_here = |window: &&[Token]| window.iter().zip(sequence).all(|(token, text)| token.text == *text);
        self.tokens.windows(sequence.len()).filter(is_here).map(|window| window[0].line).collect()
    }
}

fn tokens(text: &str) -> Vec<Token> {
    let chars: Vec<char> = text.chars().collect();
    let at = |i: usize| chars.get(i).copied().unwrap_or('\0');
    let mut tokens = Vec::new();
    let (mut i, mut line) = (0, 1);
    while i < chars.len() {
        let start = i;
        match chars[i] {
            '/' if at(i + 1) == '/' => {
                while i < chars.len() && chars[i] != '\n' {
                    i += 1;
                }
            }
            '/' if at(i + 1) == '*' => {
                let mut depth = 0;
                loop {
                    match (at(i), at(i + 1)) {
                        ('/', '*') => (depth, i) = (depth + 1, i + 2),
                        ('*', '/') => (depth, i) = (depth - 1, i + 2),
                        _ => i += 1,
                    }
                    if depth == 0 || i >= chars.len() {
                        break;
                    }
                }
            }
            '"' => i = after_string(&chars, i),
            '\'' if at(i + 1) == '\\' => {
                i += 3; // the escaped character may be a quote
                while at(i) != '\'' && i < chars.len() {
                    i += 1;
                }
                i += 1;
            }
            '\'' if at(i + 2) == '\'' => i += 3,
            '\'' => i += 1, // a lifetime: its name follows
            c if c.is_alphanumeric() || c == '_' => {
                while at(i).is_alphanumeric() || at(i) == '_' {
                    i += 1;
                }
                let word: String = chars[start..i].iter().collect();
                let hashes = chars[i..].iter().take_while(|&&c| c == '#').count();
                if ["r", "br", "cr"].contains(&&*word) && at(i + hashes) == '"' {
                    let close: String = std::iter::once('"').chain(std::iter::repeat_n('#', hashes)).collect();
                    let close: Vec<char> = close.chars().collect();
                    i += hashes + 1;
                    while i < chars.len() && !chars[i..].starts_with(&close) {
                        i += 1;
                    }
                    i += close.len();
                } else if !(c.is_numeric() || ["b", "c"].contains(&&*word) && at(i) == '"') {
                    tokens.push(Token { text: word, line });
                }
            }
            ':' if at(i + 1) == ':' => {
                tokens.push(Token { text: "::".to_owned(), line });
                i += 2;
            }
            c => {
                if !c.is_whitespace() {
                    tokens.push(Token { text: c.to_string(), line });
                }
                i += 1;
            }
        }
        line += chars[start..i.min(chars.len())].iter().filter(|&&c| c == '\n').count();
    }
    tokens
}

/// The index after the string literal that starts at `start`.
fn after_string(chars: &[char], start: usize) -> usize {
    let mut i = start + 1;
    while i < chars.len() && chars[i] != '"' {
        i += if chars[i] == '\\' { 2 } else { 1 };
    }
    i + 1
}

/// Leaves out each item that has the attribute `#[cfg(test)]`. Also returns the names of those that are `mod name;`.
fn without_tests(tokens: Vec<Token>) -> (Vec<Token>, Vec<String>) {
    const ATTRIBUTE: [&str; 7] = ["#", "[", "cfg", "(", "test", ")", "]"];
    let (mut kept, mut modules) = (Vec::new(), Vec::new());
    let mut i = 0;
    while i < tokens.len() {
        if tokens.len() - i < ATTRIBUTE.len() || (0..ATTRIBUTE.len()).any(|k| tokens[i + k].text != ATTRIBUTE[k]) {
            kept.push(tokens[i].clone());
            i += 1;
            continue;
        }
        let start = i + ATTRIBUTE.len();
        // The item ends with its block, or with a semicolon outside of all brackets.
        let mut depth = 0;
        for (k, token) in tokens.iter().enumerate().skip(start) {
            i = k + 1;
            match &*token.text {
                "{" | "(" | "[" => depth += 1,
                "}" | ")" | "]" => depth -= 1,
                _ => {}
            }
            if depth == 0 && ["}", ";"].contains(&&*token.text) {
                break;
            }
        }
        let item = &tokens[start..i];
        if let Some(k) = item.windows(3).position(|w| w[0].text == "mod" && w[2].text == ";") {
            modules.push(item[k + 1].text.clone());
        }
    }
    (kept, modules)
}

#[test]
fn comments_and_literals_are_left_out() {
    let text = r##"a // b
        /* c /* d */ e */ f<'g>('h', '\'', "i \" j", r#"k " l"#, b"m") n::o 0xff"##;
    let words: Vec<String> = tokens(text).into_iter().filter(Token::is_name).map(|token| token.text).collect();
    assert_eq!(words, ["a", "f", "g", "n", "o"]);
    assert_eq!(tokens(text).last().unwrap().line, 2);
}

#[test]
fn items_for_tests_are_left_out() {
    let (code, modules) =
        Code::parse("fn a() {} #[cfg(test)] mod b { fn c() { [0; 2] } } #[cfg(test)] mod d; fn e() {}");
    assert!(code.lines_of(&["c"]).is_empty() && code.lines_of(&["d"]).is_empty());
    assert_eq!((code.lines_of(&["fn", "e"]), modules), (vec![1], vec!["d".to_owned()]));
}
