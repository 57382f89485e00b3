//! The server under test as a process of its own, and what /proc says about it (Linux).

use std::path::PathBuf;
use std::process::{Child, Command, Stdio};
use std::time::Duration;

use anyhow::{Context, Result, ensure};

/// Which server is measured.
#[derive(Debug, Clone, clap::Args)]
pub(crate) struct ServerArgs {
    /// Server binary
    #[arg(long, default_value = "target/release/rerankd")]
    server: PathBuf,
    /// Model that it serves, instead of the built-in one: a name or a folder
    #[arg(long)]
    model: Option<String>,
    /// Serve the stub model instead, from this binary
    #[arg(long, conflicts_with = "model")]
    stub: bool,
    /// Further flag of the server; can be repeated
    #[arg(long = "flag", value_name = "FLAG", allow_hyphen_values = true)]
    flags: Vec<String>,
    /// Address of a server that is running already; with --pid, its process is watched
    #[arg(long, conflicts_with_all = ["model", "stub", "flags"])]
    address: Option<String>,
    /// Process of the server at --address
    #[arg(long, requires = "address")]
    pid: Option<u32>,
}

/// A server that accepts requests. Dropping it kills the process, if this process has started it.
pub(crate) struct ServerProcess {
    pub(crate) address: String,
    pub(crate) watch: Watch,
    child: Option<Child>,
    log: Option<PathBuf>,
}

/// A process whose resources are read from /proc. All figures are NaN or 0 if its id is not known.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Watch(Option<u32>);

impl ServerArgs {
    /// Starts the server with the additional flags `more` and waits until its model is loaded.
    pub(crate) fn start(&self, more: &[&str]) -> Result<ServerProcess> {
        if let Some(address) = &self.address {
            return Ok(ServerProcess { address: address.clone(), watch: Watch(self.pid), child: None, log: None });
        }
        let mut command = match self.stub {
            true => Command::new(std::env::current_exe()?),
            false => Command::new(&self.server),
        };
        command.arg(if self.stub { "stub" } else { "serve" });
        for (name, _) in std::env::vars().filter(|(name, _)| name.starts_with("RERANKD_")) {
            command.env_remove(name);
        }
        if let Some(model) = &self.model {
            // One name for every model, so that requests need not change.
            command.args(["--model", &format!("rerankd-mini={model}")]);
        }
        let log = std::env::temp_dir().join(format!("rerankd-load-{}-{}.log", std::process::id(), fastrand::u32(..)));
        let output = std::fs::File::create(&log)?;
        let mut child = command
            .args(["--host", "127.0.0.1", "--port", "0"])
            .args(&self.flags)
            .args(more)
            .env("HF_HUB_OFFLINE", "1")
            .stderr(output)
            .stdout(Stdio::null())
            .spawn()
            .with_context(|| format!("cannot start {:?}; build it: cargo build --release", command.get_program()))?;
        let address = loop {
            let text = std::fs::read_to_string(&log)?;
            let found = text.lines().find_map(|line| line.split_once("listening on http://"));
            if let Some((_, rest)) = found
                && text.ends_with('\n')
            {
                break rest.chars().take_while(|c| c.is_ascii_digit() || matches!(c, '.' | ':')).collect();
            }
            ensure!(child.try_wait()?.is_none(), "the server has ended: {text}");
            std::thread::sleep(Duration::from_millis(10));
        };
        Ok(ServerProcess { address, watch: Watch(Some(child.id())), child: Some(child), log: Some(log) })
    }
}

impl ServerProcess {
    /// Sends SIGTERM.
    pub(crate) fn terminate(&self) -> Result<()> {
        self.signal("-TERM")
    }

    /// Sends a signal: `-HUP`.
    pub(crate) fn signal(&self, name: &str) -> Result<()> {
        let pid = self.watch.0.context("the server's process is unknown")?;
        ensure!(Command::new("kill").args([name, &pid.to_string()]).status()?.success(), "kill failed");
        Ok(())
    }

    /// Waits for the end of the process and returns its exit code.
    pub(crate) fn wait(&mut self) -> Result<Option<i32>> {
        Ok(self.child.as_mut().context("started elsewhere")?.wait()?.code())
    }
}

impl Drop for ServerProcess {
    fn drop(&mut self) {
        if let Some(child) = &mut self.child {
            child.kill().ok();
            child.wait().ok();
        }
        self.log.take().map(std::fs::remove_file);
    }
}

impl Watch {
    pub(crate) fn this_process() -> Self {
        Self(Some(std::process::id()))
    }

    fn read(self, file: &str) -> Option<String> {
        std::fs::read_to_string(format!("/proc/{}/{file}", self.0?)).ok()
    }

    fn status_number(self, name: &str) -> Option<f64> {
        let status = self.read("status")?;
        let line = status.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix(':'))?;
        line.trim().trim_end_matches(" kB").parse().ok()
    }

    /// Resident memory in MiB.
    pub(crate) fn rss_mib(self) -> f64 {
        self.status_number("VmRSS").map_or(f64::NAN, |kib| kib / 1024.0)
    }

    /// Highest resident memory in MiB since [`Watch::reset_peak`].
    pub(crate) fn peak_mib(self) -> f64 {
        self.status_number("VmHWM").map_or(f64::NAN, |kib| kib / 1024.0)
    }

    pub(crate) fn reset_peak(self) {
        if let Some(pid) = self.0 {
            std::fs::write(format!("/proc/{pid}/clear_refs"), "5").ok();
        }
    }

    pub(crate) fn threads(self) -> usize {
        self.status_number("Threads").map_or(0, |threads| threads as usize)
    }

    /// Open file descriptors.
    pub(crate) fn descriptors(self) -> usize {
        let Some(pid) = self.0 else { return 0 };
        std::fs::read_dir(format!("/proc/{pid}/fd")).map_or(0, Iterator::count)
    }

    /// Processor time so far, in seconds.
    pub(crate) fn cpu_seconds(self) -> f64 {
        let Some(stat) = self.read("stat") else { return f64::NAN };
        let fields: Vec<&str> = stat.rsplit(')').next().unwrap_or_default().split_whitespace().collect();
        // utime and stime, fields 14 and 15 of proc(5), in ticks of 10 ms.
        fields[11..13].iter().filter_map(|ticks| ticks.parse::<f64>().ok()).sum::<f64>() / 100.0
    }
}
