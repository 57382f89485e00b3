//! What the fuzz targets share with the integration tests.

#[path = "../../tests/it/support/stub.rs"]
pub mod stub;

pub mod targets;

/// The stub model under its path in the integration tests, which `targets` uses.
mod support {
    pub(crate) use crate::stub;
}

/// Replaces libFuzzer's panic hook, which would abort at panics that the server catches and turns into errors. Panics that the
/// stub model was asked for are not printed. A panic that leaves a target still ends the run.
pub fn allow_caught_panics() {
    std::panic::set_hook(Box::new(|panic| {
        let text = panic.to_string();
        if !text.contains("the stub was asked to panic") {
            eprintln!("{text}");
        }
    }));
}
