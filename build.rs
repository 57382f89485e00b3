//! Generates the list of models/*.toml that the catalogue includes, so that a new file there is a new model.

use std::fmt::Write as _;
use std::path::Path;
use std::{env, fs};

fn main() {
    println!("cargo:rerun-if-changed=models");
    let folder = Path::new(&env::var("CARGO_MANIFEST_DIR").expect("set by cargo")).join("models");
    let mut entries: Vec<_> = fs::read_dir(&folder)
        .expect("models/ is part of the repository")
        .map(|entry| entry.expect("models/ is readable").path())
        .filter(|path| path.extension().is_some_and(|extension| extension == "toml"))
        .collect();
    entries.sort();
    let mut code = String::from("&[\n");
    for path in entries {
        let name = path.file_name().expect("a path of read_dir has a file name").to_string_lossy().into_owned();
        writeln!(code, "    ({name:?}, include_str!({path:?})),").expect("writing to a string cannot fail");
    }
    code.push(']');
    let target = Path::new(&env::var("OUT_DIR").expect("set by cargo")).join("catalogue_files.rs");
    fs::write(target, code).expect("OUT_DIR is writable");
}
