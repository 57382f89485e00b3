//! Failpoints: named places where a test makes the program fail.
//!
//! They need the feature `failpoints`; without it they compile to nothing. A test sets the variable `FAILPOINTS` of a process,
//! such as `worker-before-batch=10%panic;download-write=return`, in the syntax of the crate `fail`.

/// `failpoint!("name")` may panic or sleep. `failpoint!("name", value)` may also return `value` from the function around it.
macro_rules! failpoint {
    ($name:literal) => {
        #[cfg(feature = "failpoints")]
        fail::fail_point!($name);
    };
    ($name:literal, $value:expr) => {
        #[cfg(feature = "failpoints")]
        fail::fail_point!($name, |_| $value);
    };
}

pub(crate) use failpoint;

/// Reads the variable `FAILPOINTS`, if the program has failpoints.
///
/// # Panics
/// The variable is not valid.
pub fn setup() {
    #[cfg(feature = "failpoints")]
    std::mem::forget(fail::FailScenario::setup()); // dropping it would turn the failpoints off
}
