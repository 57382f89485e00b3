//! Scheduling: requests are admitted whole, in tokens; wait in order; and run in batches of up to a token budget.
//!
//! There are no timers in the batcher: an idle worker takes what is there. A request may span batches, and a batch may span
//! requests.

mod plan;
mod queue;
#[allow(clippy::module_inception, reason = "the type's own file; this one is the module's map")]
mod scheduler;
mod supervisor;
mod types;
mod worker;

pub use scheduler::Scheduler;
pub use supervisor::EXIT_DEVICE_LOST;
pub use types::{Deadline, SchedulerLimits, Scores};
