//! Lists models/*.toml for the catalogue, so that adding a model is adding a file.

use std::fmt::Write as _;
use std::path::Path;
use std::{env, fs};

fn main() {
    println!("cargo:rerun-if-changed=models");
    let folder = Path::new(&env::var("CARGO_MANIFEST_DIR").expect("set by cargo")).join("models");
    let mut entries: Vec<_> = fs::read_dir(&folder)
        .expect("models/ is part of the repository")
        .map(|entry| entry.expect("a readable folder").path())
        .filter(|path| path.extension().is_some_and(|extension| extension == "toml"))
        .collect();
    entries.sort();
    let mut code = String::from("&[\n");
    for path in entries {
        let name = path.file_name().expect("a file").to_string_lossy().into_owned();
        writeln!(code, "    ({name:?}, include_str!({path:?})),").expect("a string takes all");
    }
    code.push(']');
    let target = Path::new(&env::var("OUT_DIR").expect("set by cargo")).join("catalogue_files.rs");
    fs::write(target, code).expect("OUT_DIR is writable");
}
