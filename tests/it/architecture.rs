//! Checks the source text against rules of docs/architecture.md that the compiler does not enforce.

use std::collections::{BTreeMap, BTreeSet};

use crate::source::{Edge, Source};

/// Known imports that form a cycle between files. The aim is none.
const KNOWN_CYCLE_IMPORTS: &[&str] = &[];

/// Known imports of a layer above. The aim is none.
const KNOWN_LAYER_VIOLATIONS: &[&str] = &[];

/// Known files outside [`CANDLE_FILES`] that use candle. The aim is none.
const KNOWN_CANDLE_FILES: &[&str] = &[];

/// Known type names that several modules define. The aim is none.
const KNOWN_REPEATED_TYPES: &[&str] = &[];

/// A top-level module, and the top-level modules that it must not import.
const FORBIDDEN: [(&str, &[&str]); 5] = [
    ("backend", &["api", "text", "scheduler", "encoder", "loading", "config"]),
    ("checkpoint", &["api", "text", "scheduler", "encoder", "loading", "config"]),
    ("encoder", &["api", "text", "scheduler", "loading"]),
    ("scheduler", &["api", "text"]),
    ("text", &["api", "scheduler"]),
];

const CANDLE_FILES: [&str; 2] = ["src/backend/candle.rs", "src/checkpoint/weights.rs"];

/// Type names that several modules may define: the associated types of `Backend`, and the arguments of each command.
const REPEATABLE_TYPES: [&str; 7] = ["Buffer", "Embeddings", "Linear", "Norm", "Rotary", "ExecContext", "Args"];

#[test]
fn no_imports_form_a_cycle_between_files() {
    let edges = Source::read().edges();
    assert!(edges.len() > 50, "only {} imports were found in src/", edges.len());
    let mut reachable = BTreeMap::<&str, BTreeSet<&str>>::new();
    for edge in &edges {
        reachable.entry(&edge.from).or_default().insert(&edge.to);
    }
    // Transitive closure, one round per step of distance.
    loop {
        let longer: Vec<(&str, BTreeSet<&str>)> = reachable
            .iter()
            .map(|(&from, to)| (from, to.iter().filter_map(|to| reachable.get(to)).flatten().copied().collect()))
            .collect();
        let mut grew = false;
        for (from, more) in longer {
            let known = reachable.get_mut(from).unwrap();
            let before = known.len();
            known.extend(more);
            grew |= known.len() > before;
        }
        if !grew {
            break;
        }
    }
    let in_cycle = |edge: &&Edge| reachable.get(&*edge.to).is_some_and(|files| files.contains(&*edge.from));
    check_known(edges.iter().filter(in_cycle).map(|edge| (edge.key(), edge.describe())), KNOWN_CYCLE_IMPORTS);
}

#[test]
fn layers_import_only_layers_below() {
    let edges = Source::read().edges();
    let is_forbidden = |edge: &&Edge| {
        let (from, to) = (layer(&edge.from), layer(&edge.to));
        let is_listed = FORBIDDEN.iter().any(|&(above, forbidden)| from == above && forbidden.contains(&to));
        is_listed || (to == "cli" && from != "cli" && from != "main")
    };
    check_known(edges.iter().filter(is_forbidden).map(|edge| (edge.key(), edge.describe())), KNOWN_LAYER_VIOLATIONS);
}

#[test]
fn candle_is_used_by_one_backend_and_the_weight_reader_only() {
    let source = Source::read();
    let mut found = Vec::new();
    for file in source.files.iter().filter(|file| !CANDLE_FILES.contains(&&*file.name)) {
        for krate in ["candle_core", "candle_nn"] {
            let lines = file.code.lines_of(&[krate]);
            found.extend(lines.iter().map(|line| (file.name.clone(), format!("{}:{line} uses {krate}", file.name))));
        }
    }
    check_known(found.into_iter(), KNOWN_CANDLE_FILES);
}

#[test]
fn environment_variables_are_read_by_config_and_cli_only() {
    check_confined(&["src/config/", "src/cli/"], |file| {
        ["var", "var_os", "vars", "vars_os"].iter().flat_map(|name| file.code.lines_of(&["env", "::", name])).collect()
    });
}

#[test]
fn unsafe_is_confined_to_the_cpu_and_cuda_backends() {
    check_confined(&["src/backend/cpu/", "src/backend/cuda/"], |file| file.code.lines_of(&["unsafe"]));
}

#[test]
fn a_type_name_is_defined_once() {
    let source = Source::read();
    let repeated = source.types().into_iter().filter(|(name, places)| {
        let is_command_args = places.iter().all(|(file, _)| file.starts_with("src/cli/"));
        places.len() > 1 && !(REPEATABLE_TYPES.contains(name) && (*name != "Args" || is_command_args))
    });
    let describe = |(name, places): (&str, Vec<(&str, usize)>)| {
        let places: Vec<String> = places.iter().map(|(file, line)| format!("{file}:{line}")).collect();
        (name.to_owned(), format!("{name} is defined at {}", places.join(" and ")))
    };
    check_known(repeated.map(describe), KNOWN_REPEATED_TYPES);
}

/// The top-level module of a file: `backend` of `src/backend/cpu/mod.rs`.
fn layer(file: &str) -> &str {
    let path = file.strip_prefix("src/").unwrap_or(file);
    path.split(['/', '.']).next().unwrap_or(path)
}

/// Fails unless the lines that `find` returns are in files under `folders`.
fn check_confined(folders: &[&str], find: impl Fn(&crate::source::File) -> Vec<usize>) {
    let (mut inside, mut outside) = (0, Vec::new());
    for file in &Source::read().files {
        for line in find(file) {
            if folders.iter().any(|folder| file.name.starts_with(folder)) {
                inside += 1;
            } else {
                outside.push(format!("{}:{line}", file.name));
            }
        }
    }
    assert!(outside.is_empty(), "allowed under {} only, found at:\n{}", folders.join(" and "), outside.join("\n"));
    assert!(inside > 0, "none is left under {}: this test no longer finds any", folders.join(" and "));
}

/// Fails unless the keys found are exactly the known ones. `found` is (key, description).
fn check_known(found: impl Iterator<Item = (String, String)>, known: &[&str]) {
    let mut first_of_key = BTreeMap::new();
    for (key, description) in found {
        first_of_key.entry(key).or_insert(description);
    }
    let new: Vec<String> = first_of_key
        .iter()
        .filter(|(key, _)| !known.contains(&key.as_str()))
        .map(|(key, description)| format!("    \"{key}\": {description}"))
        .collect();
    let gone: Vec<&&str> = known.iter().filter(|known| !first_of_key.contains_key(**known)).collect();
    assert!(new.is_empty(), "{} not allowed:\n{}", new.len(), new.join("\n"));
    assert!(gone.is_empty(), "no longer found; remove from the list of known violations: {gone:?}");
}
