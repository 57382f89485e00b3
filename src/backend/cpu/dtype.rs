//! The precisions of the CPU backend.

/// Precision of the encoder layers' GEMMs.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum CpuDtype {
    /// 32-bit floats: the exact mode.
    F32,
    /// bfloat16, summed in f32.
    Bf16,
    /// Bytes with a range for each token and a scale for each output, summed in i32.
    Int8,
}

impl CpuDtype {
    /// As in `--dtype`.
    pub fn name(self) -> &'static str {
        match self {
            Self::F32 => "f32",
            Self::Bf16 => "bf16",
            Self::Int8 => "int8",
        }
    }
}
