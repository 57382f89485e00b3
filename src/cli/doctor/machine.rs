//! Processor, memory and open files.

use std::io;

use sysinfo::{CpuRefreshKind, RefreshKind, System};

use super::report::Report;
use crate::backend::cpu::roofline::peak;
use crate::backend::cpu::{CpuBackend, CpuDtype};
use crate::cli::output::bytes;
use crate::cli::serve::OTHER_FILES;
use crate::config::machine::{HostMemory, Machine};
use crate::loading::DeviceChoice;

/// The processors and memory that the operating system reports.
pub(super) struct Host {
    processor: String,
    /// Processors of the machine.
    processors: usize,
    pub(super) memory: HostMemory,
}

impl Host {
    pub(super) fn detect() -> Self {
        let kinds = RefreshKind::nothing().with_cpu(CpuRefreshKind::nothing());
        let system = System::new_with_specifics(kinds).ok();
        let processors = system.as_ref().map_or(&[][..], |system| system.cpus());
        Self {
            processor: processors.first().map_or_else(String::new, |cpu| cpu.brand().trim().to_owned()),
            processors: processors.len(),
            memory: HostMemory::detect(),
        }
    }

    pub(super) fn check_memory(&self, report: &mut Report) {
        report.section("Memory");
        let Some(free) = self.memory.free else {
            report.note("the free memory is not known", "");
            return;
        };
        let total = bytes(self.memory.total);
        match self.memory.limit {
            Some(limit) if limit < self.memory.total => report.ok(format!(
                "{} free of the limit of {} for this container or service (the machine has {total})",
                bytes(free),
                bytes(limit)
            )),
            _ => report.ok(format!("{} free of {total}", bytes(free))),
        }
    }

    /// The processor, and how fast it multiplies in each precision on the threads that `device` would use.
    pub(super) fn check_processor(&self, report: &mut Report, machine: &Machine, device: Option<&DeviceChoice>) {
        report.section("Processor");
        let name = if self.processor.is_empty() { std::env::consts::ARCH } else { &self.processor };
        let usable = machine.processors;
        if usable < self.processors {
            report.ok(format!(
                "{name}; this process may use {usable} of {} processors (CPU affinity, or a container's limit)",
                self.processors
            ));
        } else {
            report.ok(format!("{name}; {usable} processors"));
        }
        match CpuBackend::instruction_set() {
            "portable" => report.note(
                "no vector instructions that the kernels use (AVX2 with FMA, AVX-512): several times slower",
                "in a virtual machine, give it the host's processor type (QEMU: -cpu host)",
            ),
            name => report.ok(format!("instruction set of the kernels: {name}")),
        }
        let (threads, chosen) = match device {
            Some(DeviceChoice::Cpu { threads, dtype, .. }) => (*threads, Some(*dtype)),
            _ => (usable, None),
        };
        self.check_rates(report, threads.min(usable), chosen);
        if threads > usable {
            report.note(
                format!("--threads {threads} is more than the {usable} usable processors: slower than with {usable}"),
                format!("--threads {usable}, or leave it out"),
            );
        }
        if cfg!(debug_assertions) {
            report.note("this is a debug build, which is several times slower", "cargo build --release");
        }
    }

    /// The measured rates of the GEMM's instructions, and whether the chosen precision is a slow one.
    fn check_rates(&self, report: &mut Report, threads: usize, chosen: Option<CpuDtype>) {
        let dtypes = [CpuDtype::F32, CpuDtype::Bf16, CpuDtype::Int8];
        let rates = dtypes.iter().map(|&dtype| Ok((dtype, peak(dtype, threads)?))).collect::<io::Result<Vec<_>>>();
        let rates = match rates {
            Ok(rates) => rates,
            Err(error) => {
                return report.problem(
                    format!("cannot start {threads} threads: {error}"),
                    "raise the limit on threads (ulimit -u; systemd: TasksMax; docker: --pids-limit)",
                );
            }
        };
        let listed: Vec<String> =
            rates.iter().map(|(dtype, rate)| format!("{} {:.0}", dtype.name(), rate / 1e9)).collect();
        report.ok(format!(
            "measured maximum on {threads} threads, in billion operations per second: {}",
            listed.join(", ")
        ));
        let rate_of = |wanted| rates.iter().find(|(dtype, _)| *dtype == wanted).map_or(0.0, |&(_, rate)| rate);
        if let Some(dtype) = chosen.filter(|&dtype| rate_of(dtype) < 0.9 * rate_of(CpuDtype::F32)) {
            report.note(
                format!("{} is slower than f32 on this processor; it still takes less memory", dtype.name()),
                "--dtype f32",
            );
        }
    }
}

/// Whether `connections` connections fit into the limit on open files, which `serve` raises as far as it may.
pub(super) fn check_open_files(report: &mut Report, connections: usize) {
    report.section("Limits");
    let needed = connections as u64 + OTHER_FILES;
    match rlimit::Resource::NOFILE.get() {
        Ok((_, hard)) if hard < needed => report.note(
            format!("at most {hard} open files: too few for --max-connections {connections}; serve will accept fewer connections"),
            format!("ulimit -n {needed} (systemd: LimitNOFILE={needed}; docker: --ulimit nofile={needed})"),
        ),
        Ok((_, hard)) => report.ok(format!("up to {hard} open files; {connections} connections need {needed}")),
        Err(error) => report.note(format!("the limit on open files is not known: {error}"), ""),
    }
}
