//! Scheduling. A request is admitted as a whole, by its number of tokens. Its pairs wait in a queue and run in batches with a
//! token budget.
//!
//! Batching uses no timer: an idle worker takes the pairs that wait. A request may span batches, and a batch may span requests.

mod plan;
mod queue;
#[allow(clippy::module_inception, reason = "the type's own file; this one is the module's map")]
mod scheduler;
#[cfg(test)]
#[cfg(feature = "shuttle")]
mod schedules;
mod supervisor;
mod types;
mod worker;

pub use scheduler::Scheduler;
pub use supervisor::EXIT_DEVICE_LOST;
pub use types::{Deadline, QueuePermit, SchedulerLimits, Scores};
