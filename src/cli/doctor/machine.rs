//! Processor, memory and open files.

use std::io;

use sysinfo::{CpuRefreshKind, MemoryRefreshKind, ProcessRefreshKind, ProcessesToUpdate, RefreshKind, System};

use super::report::Report;
use crate::backend::cpu::roofline::peak;
use crate::backend::cpu::{CpuBackend, CpuDtype};
use crate::cli::output::bytes;
use crate::cli::serve::OTHER_FILES;
use crate::config::machine::Machine;
use crate::loading::DeviceChoice;

/// The processors and memory that the operating system reports.
pub(super) struct Host {
    processor: String,
    /// Processors of the machine.
    processors: usize,
    /// Memory in bytes.
    total_memory: u64,
    /// Memory that a new process could use, as far as known.
    pub(super) free_memory: Option<u64>,
    /// The memory limit of the container (cgroup), if there is one.
    memory_limit: Option<u64>,
}

impl Host {
    pub(super) fn detect() -> Self {
        let memory = MemoryRefreshKind::nothing().with_ram();
        let kinds = RefreshKind::nothing().with_cpu(CpuRefreshKind::nothing()).with_memory(memory);
        let Ok(mut system) = System::new_with_specifics(kinds) else {
            return Self {
                processor: String::new(),
                processors: 0,
                total_memory: 0,
                free_memory: None,
                memory_limit: None,
            };
        };
        let limits = sysinfo::get_current_pid().ok().and_then(|pid| {
            let wanted = ProcessesToUpdate::Some(&[pid]);
            system.refresh_processes_specifics(wanted, false, ProcessRefreshKind::nothing());
            system.process(pid)?.cgroup_limits()
        });
        // The page cache counts as usage of a cgroup, but the kernel frees it when memory is short. It cannot free `rss`.
        let within_limit = limits.as_ref().map(|limits| limits.total_memory.saturating_sub(limits.rss));
        let available = Some(system.available_memory()).filter(|&bytes| bytes > 0);
        Self {
            processor: system.cpus().first().map_or_else(String::new, |cpu| cpu.brand().trim().to_owned()),
            processors: system.cpus().len(),
            total_memory: system.total_memory(),
            free_memory: [available, within_limit].into_iter().flatten().min(),
            memory_limit: limits.map(|limits| limits.total_memory),
        }
    }

    pub(super) fn check_memory(&self, report: &mut Report) {
        report.section("Memory");
        let Some(free) = self.free_memory else {
            report.note("the free memory is not known", "");
            return;
        };
        let total = bytes(self.total_memory);
        match self.memory_limit {
            Some(limit) if limit < self.total_memory => report.ok(format!(
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
            format!("at most {hard} open files: too few for --max-connections {connections}; serve lowers it"),
            format!("ulimit -n {needed} (systemd: LimitNOFILE={needed}; docker: --ulimit nofile={needed})"),
        ),
        Ok((_, hard)) => report.ok(format!("up to {hard} open files; {connections} connections need {needed}")),
        Err(error) => report.note(format!("the limit on open files is not known: {error}"), ""),
    }
}
