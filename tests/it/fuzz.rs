//! The fuzz targets on their committed inputs and on reproducible mutations of these. fuzz/README.md describes fuzzing with
//! libFuzzer.

#[path = "../../fuzz/src/targets/mod.rs"]
mod targets;

use std::fs;
use std::path::Path;

use proptest::prelude::*;
use rerankd::text::{Chunking, Tail};

/// Runs a target on every file of `fuzz/seeds/TARGET`, then on `mutations` inputs that are derived from them.
fn check(target: &str, run: fn(&[u8]), mutations: usize) {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("fuzz/seeds").join(target);
    let mut paths: Vec<_> = fs::read_dir(folder).unwrap().map(|entry| entry.unwrap().path()).collect();
    paths.sort();
    assert!(paths.len() > 5, "{} inputs for {target}", paths.len());
    let seeds: Vec<Vec<u8>> = paths.iter().map(|path| fs::read(path).unwrap()).collect();
    for (path, seed) in paths.iter().zip(&seeds) {
        attempt(run, seed, &path.display().to_string());
    }
    let mut random = fastrand::Rng::with_seed(1);
    for i in 0..mutations {
        let mut input = seeds[random.usize(..seeds.len())].clone();
        for _ in 0..random.usize(1..5) {
            mutate(&mut input, &seeds, &mut random);
        }
        attempt(run, &input, &format!("mutation {i}"));
    }
}

/// Runs the target. If it panics, writes the input to a file and panics with the file's name.
fn attempt(run: fn(&[u8]), input: &[u8], what: &str) {
    if std::panic::catch_unwind(|| run(input)).is_err() {
        let path = Path::new(env!("CARGO_TARGET_TMPDIR")).join("fuzz-failure");
        fs::write(&path, input).unwrap();
        panic!("{what} fails; the input is in {}", path.display());
    }
}

fn mutate(input: &mut Vec<u8>, seeds: &[Vec<u8>], random: &mut fastrand::Rng) {
    let at = random.usize(..=input.len());
    let end = (at + random.usize(..16)).min(input.len());
    match random.u8(..6) {
        0 if at < input.len() => input[at] ^= 1 << random.u8(..8),
        1 if at < input.len() => input[at] = random.u8(..),
        2 => drop(input.drain(at..end)),
        3 => {
            let repeated = input[at..end].repeat(random.usize(1..40));
            input.splice(at..at, repeated);
        }
        4 => {
            let other = &seeds[random.usize(..seeds.len())];
            let from = random.usize(..=other.len());
            let part = &other[from..(from + random.usize(..64)).min(other.len())];
            input.splice(at..end, part.iter().copied());
        }
        _ => input.insert(at, random.u8(..)),
    }
}

#[test]
fn a_body_is_a_valid_request_or_an_error_that_names_a_field() {
    check("requests", targets::requests::run, 5000);
}

#[test]
fn chunks_are_those_of_the_reference() {
    check("chunks", targets::chunks::run, 5000);
}

#[test]
fn a_request_gets_a_documented_response_and_the_scores_of_the_reference() {
    check("http", targets::http::run, 2000);
}

#[test]
fn a_model_folder_loads_and_scores_or_is_refused() {
    check("models", targets::models::run, 1000);
}

proptest! {
    /// The sizes of real requests, which random bytes seldom have.
    #[test]
    fn chunks_of_real_sizes_are_those_of_the_reference(
        tokens in 0usize..20_000, room in 1usize..2_000, overlap in 0usize..=80, max_chunks in 1usize..40, short in any::<bool>(),
    ) {
        let tail = if short { Tail::Short } else { Tail::Aligned };
        targets::chunks::check(tokens, Chunking { room, overlap, max_chunks, tail });
    }
}
