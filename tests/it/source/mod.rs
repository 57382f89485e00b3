//! The source text of `src/`, reduced to what the architecture tests ask about: modules, definitions and imports.
//!
//! The reader knows the Rust that this crate is written in, not the whole language: modules are files, and macros define no
//! items that other files import.

mod lexer;

use std::collections::{BTreeMap, BTreeSet};
use std::path::{Path, PathBuf};

use lexer::{Code, Token};

/// A module path from the crate root: `["backend", "cpu"]`; `["main"]` is the binary's root.
type ModulePath = Vec<String>;

/// A file of `src/` without comments, literals and test code.
pub(crate) struct File {
    /// Relative to the repository: `src/backend/cpu/mod.rs`.
    pub(crate) name: String,
    pub(crate) code: Code,
    module: ModulePath,
    imports: Vec<Import>,
    /// Structs, enums, traits, functions and other items at the top level, with the keyword and the line of each.
    definitions: BTreeMap<String, (String, usize)>,
}

/// A name that a `use` brings into a file.
struct Import {
    /// As the file writes it: `["super", "Batch"]`.
    path: Vec<String>,
    /// The name in this file; `*` for a glob.
    alias: String,
    is_public: bool,
    line: usize,
}

/// An import: the file `from` names an item of the file `to`.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) struct Edge {
    pub(crate) from: String,
    pub(crate) to: String,
    pub(crate) line: usize,
    pub(crate) path: String,
}

impl Edge {
    /// `from -> to`, without the line, which moves with every change.
    pub(crate) fn key(&self) -> String {
        format!("{} -> {}", self.from, self.to)
    }

    pub(crate) fn describe(&self) -> String {
        format!("{}:{} names {}, which is in {}", self.from, self.line, self.path, self.to)
    }
}

/// All files of `src/`, except those that are compiled for tests only.
pub(crate) struct Source {
    pub(crate) files: Vec<File>,
    by_module: BTreeMap<ModulePath, usize>,
}

/// What a path leads to.
enum Target {
    /// A module. The items that the file uses through it are resolved as separate paths.
    Module,
    File(usize),
    /// Another crate, or the standard library.
    Elsewhere,
}

impl Source {
    /// Reads `src/` of this repository.
    pub(crate) fn read() -> Self {
        let root = Path::new(env!("CARGO_MANIFEST_DIR"));
        let mut paths = Vec::new();
        rust_files(&root.join("src"), &mut paths);
        paths.sort();
        let read = |path: PathBuf| {
            let text = std::fs::read_to_string(&path).unwrap();
            (path.strip_prefix(root).unwrap().to_str().unwrap().to_owned(), text)
        };
        Self::parse(paths.into_iter().map(read))
    }

    fn parse(texts: impl Iterator<Item = (String, String)>) -> Self {
        let mut files = Vec::new();
        let mut test_modules = BTreeSet::new();
        for (name, text) in texts {
            let module = module_path(&name);
            let (code, tests) = Code::parse(&text);
            test_modules.extend(tests.into_iter().map(|test| [&module[..], &[test]].concat()));
            files.push(File {
                imports: imports(&code.tokens),
                definitions: definitions(&code.tokens),
                name,
                code,
                module,
            });
        }
        files.retain(|file| !test_modules.iter().any(|test| file.module.starts_with(test)));
        let by_module = files.iter().enumerate().map(|(i, file)| (file.module.clone(), i)).collect();
        Self { files, by_module }
    }

    /// Every import of one file from another, by `use` or by a path in the code. A `mod` declaration and a `pub use` from a child
    /// module do not count as imports.
    pub(crate) fn edges(&self) -> BTreeSet<Edge> {
        let mut edges = BTreeSet::new();
        for (i, file) in self.files.iter().enumerate() {
            let mut add = |path: &[String], line: usize| {
                if let Target::File(to) = self.resolve(i, path, 0)
                    && to != i
                {
                    let (from, to) = (file.name.clone(), self.files[to].name.clone());
                    edges.insert(Edge { from, to, line, path: path.join("::") });
                }
            };
            for import in &file.imports {
                let is_of_child = self.is_module(&[&file.module[..], &import.path[..1]].concat());
                if !(import.is_public && (is_of_child || import.path[0] == "self")) {
                    add(&import.path, import.line);
                }
            }
            for (path, line) in paths(&file.code.tokens) {
                add(&path, line);
            }
        }
        edges
    }

    /// Structs, enums and traits: name, then file and line of each definition.
    pub(crate) fn types(&self) -> BTreeMap<&str, Vec<(&str, usize)>> {
        let mut types = BTreeMap::<&str, Vec<(&str, usize)>>::new();
        for file in &self.files {
            for (name, (keyword, line)) in &file.definitions {
                if ["struct", "enum", "trait"].contains(&&**keyword) {
                    types.entry(name).or_default().push((&file.name, *line));
                }
            }
        }
        types
    }

    fn is_module(&self, module: &[String]) -> bool {
        self.by_module.contains_key(module)
    }

    /// Follows a path as file `i` writes it, through re-exports, to the file that defines the item.
    fn resolve(&self, i: usize, path: &[String], depth: usize) -> Target {
        assert!(depth < 16, "{}: {path:?} is re-exported in a cycle", self.files[i].name);
        let file = &self.files[i];
        let mut module = file.module.clone();
        let rest = match path[0].as_str() {
            "crate" | "rerankd" => {
                module.clear();
                &path[1..]
            }
            "self" => &path[1..],
            "super" => {
                let ups = path.iter().take_while(|segment| *segment == "super").count();
                module.truncate(module.len().saturating_sub(ups));
                &path[ups..]
            }
            first if self.is_module(&[&module[..], &[first.to_owned()]].concat()) => path,
            first => {
                let Some(import) = file.imports.iter().find(|import| import.alias == first && import.path[0] != first)
                else {
                    return Target::Elsewhere;
                };
                let full = [&import.path[..], &path[1..]].concat();
                return self.resolve(i, &full, depth + 1);
            }
        };
        for (at, segment) in rest.iter().enumerate() {
            let child = [&module[..], std::slice::from_ref(segment)].concat();
            if self.is_module(&child) {
                module = child;
                continue;
            }
            let Some(&owner) = self.by_module.get(&module) else { return Target::Elsewhere };
            if !self.files[owner].definitions.contains_key(segment)
                && let Some(import) = self.files[owner].imports.iter().find(|import| import.alias == *segment)
            {
                let full = [&import.path[..], &rest[at + 1..]].concat();
                return self.resolve(owner, &full, depth + 1);
            }
            return Target::File(owner);
        }
        Target::Module
    }
}

fn rust_files(folder: &Path, files: &mut Vec<PathBuf>) {
    for entry in std::fs::read_dir(folder).unwrap() {
        let path = entry.unwrap().path();
        if path.is_dir() {
            rust_files(&path, files);
        } else if path.extension().is_some_and(|extension| extension == "rs") {
            files.push(path);
        }
    }
}

/// `src/a/b.rs` and `src/a/b/mod.rs` are `a::b`.
fn module_path(file: &str) -> ModulePath {
    let path = file.strip_prefix("src/").unwrap().strip_suffix(".rs").unwrap();
    let mut module: ModulePath = path.split('/').map(str::to_owned).collect();
    if module.last().is_some_and(|last| last == "mod") || module == ["lib"] {
        module.pop();
    }
    module
}

/// The names that the `use` items of the file bring into scope, also inside functions.
fn imports(tokens: &[Token]) -> Vec<Import> {
    let mut imports = Vec::new();
    for (i, token) in tokens.iter().enumerate() {
        if token.text != "use" || tokens.get(i + 1).is_some_and(|next| next.text == "<") {
            continue;
        }
        // `pub use`, `pub(crate) use`
        let is_public = i > 0 && ["pub", ")"].contains(&&*tokens[i - 1].text);
        let end = i + tokens[i..].iter().position(|token| token.text == ";").unwrap();
        let mut tree = &tokens[i + 1..end];
        use_tree(&mut tree, &[], &mut |path, alias, line| {
            imports.push(Import { path, alias, is_public, line });
        });
    }
    imports
}

/// Reads one tree, `a::{b, c as d}`, and calls `found` with each path, its name and its line.
fn use_tree(tokens: &mut &[Token], prefix: &[String], found: &mut impl FnMut(Vec<String>, String, usize)) {
    let mut path = prefix.to_vec();
    while let Some((token, rest)) = tokens.split_first() {
        *tokens = rest;
        match &*token.text {
            "::" => {}
            "{" => {
                while tokens.first().is_some_and(|token| token.text != "}") {
                    use_tree(tokens, &path, found);
                    if tokens.first().is_some_and(|token| token.text == ",") {
                        *tokens = &tokens[1..];
                    }
                }
                *tokens = &tokens[1..];
                return;
            }
            "*" => return found(path, "*".to_owned(), token.line),
            "self" if !path.is_empty() => {}
            name => path.push(name.to_owned()),
        }
        match tokens.first().map(|token| &*token.text) {
            Some("as") => {
                let alias = tokens[1].text.clone();
                *tokens = &tokens[2..];
                return found(path, alias, token.line);
            }
            None | Some("," | "}") => {
                let alias = path.last().unwrap().clone();
                return found(path, alias, token.line);
            }
            _ => {}
        }
    }
}

/// Items at the top level of the file.
fn definitions(tokens: &[Token]) -> BTreeMap<String, (String, usize)> {
    const KEYWORDS: [&str; 8] = ["struct", "enum", "trait", "union", "type", "fn", "const", "static"];
    let mut definitions = BTreeMap::new();
    let mut depth = 0usize;
    for (token, next) in tokens.iter().zip(&tokens[1.min(tokens.len())..]) {
        match &*token.text {
            "{" | "(" | "[" => depth += 1,
            "}" | ")" | "]" => depth -= 1,
            keyword if depth == 0 && KEYWORDS.contains(&keyword) => {
                definitions.insert(next.text.clone(), (keyword.to_owned(), next.line));
            }
            _ => {}
        }
    }
    definitions
}

/// Every path `a::b` outside `use` items, up to the first part that is not a plain name, with its line.
fn paths(tokens: &[Token]) -> Vec<(Vec<String>, usize)> {
    let mut paths = Vec::new();
    let is_name = |i: usize| tokens.get(i).is_some_and(|token| token.is_name());
    let is_colons = |i: usize| tokens.get(i).is_some_and(|token| token.text == "::");
    let mut i = 0;
    while i < tokens.len() {
        if tokens[i].text == "use" {
            i += tokens[i..].iter().position(|token| token.text == ";").unwrap_or(1);
            continue;
        }
        if !(is_name(i) && is_colons(i + 1) && is_name(i + 2)) || (i > 0 && is_colons(i - 1)) {
            i += 1;
            continue;
        }
        let (mut path, line) = (vec![tokens[i].text.clone()], tokens[i].line);
        i += 1;
        while is_colons(i) && is_name(i + 1) {
            path.push(tokens[i + 1].text.clone());
            i += 2;
        }
        paths.push((path, line));
    }
    paths
}

fn parse(files: &[(&str, &str)]) -> Source {
    Source::parse(files.iter().map(|&(name, text)| (name.to_owned(), text.to_owned())))
}

fn keys(source: &Source) -> Vec<String> {
    source.edges().iter().map(Edge::key).collect()
}

#[test]
fn imports_are_followed_through_re_exports_to_the_defining_file() {
    let source = parse(&[
        ("src/lib.rs", "pub mod a; pub mod b;"),
        ("src/a/mod.rs", "mod one; mod two; pub use one::One; pub(crate) use self::two::Two as Second;"),
        ("src/a/one.rs", "pub struct One; /* crate::b::B */ const TEXT: &str = \"crate::b::B\";"),
        ("src/a/two.rs", "use super::One; pub struct Two(One); #[cfg(test)] mod tests { use crate::b::B; }"),
        ("src/b.rs", "use crate::a::{self, Second}; pub struct B; fn f(_: Second) { a::One; }"),
    ]);
    assert_eq!(keys(&source), ["src/a/two.rs -> src/a/one.rs", "src/b.rs -> src/a/one.rs", "src/b.rs -> src/a/two.rs"]);
}

#[test]
fn a_parent_and_a_child_that_import_from_each_other_are_two_edges() {
    let source = parse(&[
        ("src/a/mod.rs", "mod child;\nuse child::run;\npub trait Parent {}\nfn f() { run() }"),
        ("src/a/child.rs", "pub(super) fn run() {}\n\nimpl super::Parent for u8 {}"),
    ]);
    assert_eq!(keys(&source), ["src/a/child.rs -> src/a/mod.rs", "src/a/mod.rs -> src/a/child.rs"]);
    assert_eq!(source.edges().first().unwrap().line, 3);
}

#[test]
fn files_of_test_modules_are_left_out() {
    let source = parse(&[("src/a.rs", "#[cfg(test)]\nmod tests;\nstruct A;"), ("src/a/tests.rs", "struct A;")]);
    assert_eq!(source.types()["A"], [("src/a.rs", 3)]);
}
