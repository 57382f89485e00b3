//! Estimates of the memory that a model takes.

use super::device::DeviceChoice;
use crate::backend::cpu::CpuDtype;
use crate::checkpoint::config::ModelConfig;

/// Memory of the tokenizer for each entry of its vocabulary, in bytes. Measured with XLM-RoBERTa's Unigram tokenizer, of which
/// 250,002 entries take some 330 MB; BERT's WordPiece tokenizer takes less.
const TOKENIZER_ENTRY_BYTES: u64 = 1_350;

/// Memory of the process besides weights and tokenizer, in bytes: the program, the server, activations of one batch.
const PROCESS_BYTES: u64 = 30_000_000;

/// GPU memory besides the weights, in bytes: the CUDA context, cuBLASLt and activations.
const GPU_BYTES: u64 = 1_000_000_000;

/// The dimensions of a model that its memory depends on.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct ModelSize {
    /// Values in all of the model's tensors.
    pub parameters: u64,
    /// Rows of the word embedding, and entries of the tokenizer.
    pub vocabulary: u64,
    /// C
    pub hidden_size: u64,
    /// Whether feed-forward networks are gated. Such a model is computed in bf16 instead of int8.
    pub gated: bool,
}

impl ModelSize {
    pub fn of(config: &ModelConfig) -> Self {
        Self {
            parameters: config.parameters(),
            vocabulary: config.vocab_size as u64,
            hidden_size: config.hidden_size as u64,
            gated: config.gated,
        }
    }

    /// Bytes of a server with this model on the CPU: weights, tokenizer and a constant. The weights are 4 bytes per parameter in
    /// f32 and 2 in bf16. In int8 they are 2 for embeddings, which are stored as f16, and 1 for the rest; a gated model has bf16
    /// weights instead.
    pub fn cpu_bytes(self, dtype: CpuDtype) -> u64 {
        let (embedding, other) = match dtype {
            CpuDtype::F32 => (4, 4),
            CpuDtype::Int8 if !self.gated => (2, 1),
            CpuDtype::Bf16 | CpuDtype::Int8 => (2, 2),
        };
        self.weight_bytes(embedding, other) + self.host_bytes()
    }

    /// Bytes on `device`: memory of the host, and memory of each GPU.
    pub fn bytes_on(self, device: &DeviceChoice) -> (u64, u64) {
        match device {
            DeviceChoice::Cpu { dtype, .. } => (self.cpu_bytes(*dtype), 0),
            DeviceChoice::Candle { .. } => (self.cpu_bytes(CpuDtype::F32), 0),
            // f16, bf16, f32 or fp8. With fp8 embeddings are f16.
            #[cfg(any(feature = "cuda", feature = "candle-cuda"))]
            _ => {
                let (embedding, other) = match device.name() {
                    "f16" | "bf16" => (2, 2),
                    "fp8" => (2, 1),
                    _ => (4, 4),
                };
                (self.host_bytes(), self.weight_bytes(embedding, other) + GPU_BYTES)
            }
        }
    }

    /// Bytes of the weights, with this many bytes for a value of the word embedding and for any other value.
    fn weight_bytes(self, embedding: u64, other: u64) -> u64 {
        let embeddings = self.vocabulary * self.hidden_size;
        embedding * embeddings + other * self.parameters.saturating_sub(embeddings)
    }

    fn host_bytes(self) -> u64 {
        TOKENIZER_ENTRY_BYTES * self.vocabulary + PROCESS_BYTES
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::loading::catalogue;

    /// Resident memory of `rerankd serve` in MB, after the start, as measured on x86-64 Linux.
    #[test]
    fn estimates_are_close_to_measured_memory() {
        for (name, measured) in [("rerankd-mini", [75, 59, 56]), ("BAAI/bge-reranker-v2-m3", [2616, 1489, 1208])] {
            let size = catalogue::find(name).unwrap().size();
            for (dtype, measured) in [CpuDtype::F32, CpuDtype::Bf16, CpuDtype::Int8].into_iter().zip(measured) {
                let estimate = size.cpu_bytes(dtype) as f64 / 1e6;
                let ratio = estimate / f64::from(measured);
                assert!((0.95..1.25).contains(&ratio), "{name} {dtype:?}: {estimate} MB, measured {measured}");
            }
        }
    }

    #[test]
    fn the_catalogue_has_the_dimensions_of_the_built_in_model() {
        let config = ModelConfig::parse(include_str!("../../models/mini/config.json")).unwrap();
        assert_eq!(catalogue::find("rerankd-mini").unwrap().size(), ModelSize::of(&config));
    }
}
