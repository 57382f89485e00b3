//! Loads layers from a checkpoint onto a backend, by tensor name.

use std::sync::Arc;

use anyhow::Result;

use crate::backend::{Backend, HostTensor, LayerRole, NormWeights, RotaryTable};
use crate::checkpoint::config::ModelConfig;
use crate::checkpoint::weights::Weights;

/// A checkpoint, and the backend to load its tensors to.
pub(super) struct Parts<'a, B> {
    pub(super) weights: &'a mut Weights,
    pub(super) backend: &'a B,
}

impl<B: Backend> Parts<'_, B> {
    /// Loads the linear layer `name.weight`, `[outputs, inputs]`, with `name.bias` if `bias`.
    pub(super) fn linear(
        &mut self,
        name: &str,
        outputs: usize,
        inputs: usize,
        bias: bool,
        role: LayerRole,
    ) -> Result<B::Linear> {
        let weight = self.weights.take(&format!("{name}.weight"), &[outputs, inputs])?;
        let bias = self.bias(&format!("{name}.bias"), outputs, bias)?;
        Ok(self.backend.linear(weight, bias, role)?)
    }

    /// Loads a linear layer without bias from its weight, `[outputs, inputs]`.
    pub(super) fn linear_without_bias(&self, weight: HostTensor, role: LayerRole) -> Result<B::Linear> {
        let outputs = weight.shape[0];
        Ok(self.backend.linear(weight, zeros(outputs), role)?)
    }

    /// Loads linear layers of equal shape, `[outputs, inputs]`, as a single layer of `names.len() * outputs` outputs.
    pub(super) fn stacked(&mut self, names: &[String], outputs: usize, inputs: usize) -> Result<B::Linear> {
        let tensors = |kind: &str| names.iter().map(|name| format!("{name}.{kind}")).collect::<Vec<_>>();
        let weight = self.weights.take_stacked(&tensors("weight"), &[outputs, inputs])?;
        let bias = self.weights.take_stacked(&tensors("bias"), &[outputs])?;
        Ok(self.backend.linear(weight, bias, LayerRole::Encoder)?)
    }

    /// Loads the layer norm `name.weight`, with `name.bias` if `bias`.
    pub(super) fn norm(&mut self, name: &str, size: usize, bias: bool, eps: f64) -> Result<B::Norm> {
        Ok(self.backend.norm(self.norm_weights(name, size, bias, eps)?)?)
    }

    pub(super) fn norm_weights(&mut self, name: &str, size: usize, bias: bool, eps: f64) -> Result<NormWeights> {
        // Old checkpoints, converted from TensorFlow, use the names gamma and beta.
        let old = self.weights.contains(&format!("{name}.gamma"));
        let (weight_name, bias_name) = if old { ("gamma", "beta") } else { ("weight", "bias") };
        Ok(NormWeights {
            weight: self.weights.take(&format!("{name}.{weight_name}"), &[size])?,
            bias: self.bias(&format!("{name}.{bias_name}"), size, bias)?,
            eps,
        })
    }

    /// Loads the rotary embeddings of [`ModelConfig::rotary`].
    pub(super) fn rotary(&self, config: &ModelConfig) -> Result<Vec<Arc<B::Rotary>>> {
        let load = |frequencies: &Vec<f32>| {
            let table = RotaryTable { frequencies: frequencies.clone(), positions: config.max_window };
            Ok(Arc::new(self.backend.rotary(table)?))
        };
        config.rotary.iter().map(load).collect()
    }

    fn bias(&mut self, name: &str, size: usize, present: bool) -> Result<HostTensor> {
        match present {
            true => self.weights.take(name, &[size]),
            false => Ok(zeros(size)),
        }
    }
}

fn zeros(size: usize) -> HostTensor {
    HostTensor { shape: vec![size], data: vec![0.0; size] }
}
