//! NVIDIA GPUs and CUDA's libraries.

use std::path::Path;

use super::report::{Report, Severity};
use crate::backend::gpus::CudaSurvey;
use crate::cli::output::bytes;

/// Whether there are GPUs, and whether they can be used. `device` is the value of `--device`. With `cuda` and `auto`, a GPU that
/// cannot be used is a problem; that there is no GPU is a problem only with `cuda`.
pub(super) fn check(report: &mut Report, survey: Option<&CudaSurvey>, device: &str) {
    report.section("GPU");
    let is_cuda = device.starts_with("cuda");
    let wanted = is_cuda || device == "auto";
    let severity = if wanted { Severity::Problem } else { Severity::Note };
    let Some(survey) = survey else {
        report.ok("this build has no CUDA support");
        return;
    };
    let on_bus = nvidia_gpus_on_bus(Path::new("/sys/bus/pci/devices"));
    let Some(driver) = &survey.driver else {
        match on_bus {
            0 if is_cuda => report.problem("no NVIDIA GPU and no driver (libcuda.so.1)", "--device cpu"),
            0 => report.ok("no NVIDIA GPU"),
            _ => report.add(
                severity,
                "there is an NVIDIA GPU, but no driver library (libcuda.so.1)",
                "install the NVIDIA driver, 525 or later; in a container: docker run --gpus all, which needs the NVIDIA \
                 Container Toolkit on the host",
            ),
        }
        return;
    };
    report.ok(format!("NVIDIA driver for CUDA up to {driver}"));
    let library = |name: &str, version: &Option<String>| match version {
        Some(version) => format!("{name} {version}"),
        None => format!("{name} not found"),
    };
    let libraries = format!("{}, {}", library("NVRTC", &survey.nvrtc), library("cuBLASLt", &survey.cublaslt));
    if survey.nvrtc.is_some() && survey.cublaslt.is_some() {
        report.ok(format!("CUDA libraries: {libraries}"));
    } else {
        report.add(
            severity,
            format!("CUDA libraries: {libraries}"),
            "pip install nvidia-cuda-nvrtc nvidia-cublas, and add their lib folders to LD_LIBRARY_PATH",
        );
    }
    if let Some(reason) = &survey.no_gpu {
        report.add(
            severity,
            reason.as_str(),
            "nvidia-smi shows whether the driver works; after an update of the driver, restart the machine",
        );
    }
    for (ordinal, gpu) in survey.gpus.iter().enumerate() {
        let name = format!(
            "cuda:{ordinal}: {}, compute capability {}.{}, {} of memory",
            gpu.name,
            gpu.compute_capability.0,
            gpu.compute_capability.1,
            bytes(gpu.memory)
        );
        match &gpu.problem {
            None => report.ok(name),
            Some(problem) => report.add(severity, format!("{name}: {problem}"), ""),
        }
    }
    if !wanted && survey.gpus.iter().any(|gpu| gpu.problem.is_none()) {
        report.note(format!("a GPU can be used, but --device is {device}"), "--device auto");
    }
}

/// Number of NVIDIA display and compute controllers among the PCI devices in `folder`, with or without a driver.
fn nvidia_gpus_on_bus(folder: &Path) -> usize {
    let Ok(devices) = std::fs::read_dir(folder) else { return 0 };
    let is_nvidia_gpu = |device: &Path| {
        let read = |file: &str| std::fs::read_to_string(device.join(file)).unwrap_or_default();
        read("vendor").trim() == "0x10de" && read("class").starts_with("0x03")
    };
    devices.flatten().filter(|device| is_nvidia_gpu(&device.path())).count()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::backend::gpus::Gpu;

    fn findings(survey: &CudaSurvey, device: &str) -> (usize, String) {
        let mut report = Report::default();
        check(&mut report, Some(survey), device);
        (report.problems(), report.text(false))
    }

    #[test]
    fn a_gpu_that_cannot_be_used_is_a_problem_only_if_it_is_wanted() {
        let gpu = Gpu {
            name: "T4".to_owned(),
            compute_capability: (7, 5),
            memory: 16_000_000_000,
            problem: Some("too old".to_owned()),
        };
        let driver = Some("13.0".to_owned());
        let survey = CudaSurvey { driver, gpus: vec![gpu.clone()], ..CudaSurvey::default() };
        let (problems, text) = findings(&survey, "auto");
        assert_eq!(problems, 2, "{text}"); // the libraries and the GPU
        assert!(text.contains("NVRTC not found, cuBLASLt not found") && text.contains("16.0 GB of memory: too old"));
        assert_eq!(findings(&survey, "cpu").0, 0);
        let version = Some("13.0".to_owned());
        let usable = CudaSurvey {
            nvrtc: version.clone(),
            cublaslt: version,
            gpus: vec![Gpu { problem: None, ..gpu }],
            ..survey
        };
        assert!(findings(&usable, "cpu").1.contains("fix: --device auto"));
        let (problems, text) = findings(&usable, "cuda:0");
        assert!(problems == 0 && !text.contains("--device"), "{text}");
    }

    #[test]
    fn nvidia_gpus_are_found_without_a_driver() {
        let folder = tempfile::tempdir().unwrap();
        for (name, vendor, class) in
            [("a", "0x10de", "0x030200"), ("b", "0x10de", "0x040300"), ("c", "0x1002", "0x030000")]
        {
            let device = folder.path().join(name);
            std::fs::create_dir(&device).unwrap();
            std::fs::write(device.join("vendor"), format!("{vendor}\n")).unwrap();
            std::fs::write(device.join("class"), format!("{class}\n")).unwrap();
        }
        assert_eq!(nvidia_gpus_on_bus(folder.path()), 1);
        assert_eq!(nvidia_gpus_on_bus(&folder.path().join("missing")), 0);
    }
}
