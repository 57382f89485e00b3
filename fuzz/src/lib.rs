//! What the fuzz targets share with the integration tests.

#[path = "../../tests/it/support/stub.rs"]
pub mod stub;

pub mod targets;

/// The stub model under its path in the integration tests, which `targets` uses.
mod support {
    pub(crate) use crate::stub;
}

/// Silences panics that the stub model was asked for, and no longer aborts at panics that the server turns into errors.
/// libFuzzer still ends at every panic that leaves a target.
pub fn allow_caught_panics() {
    std::panic::set_hook(Box::new(|panic| {
        let text = panic.to_string();
        if !text.contains("the stub was asked to panic") {
            eprintln!("{text}");
        }
    }));
}
