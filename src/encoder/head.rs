//! The classification head: computes a logit from each sequence's pooled row.

use anyhow::Result;

use super::parts::Parts;
use crate::backend::{Activation, Backend, BackendError, Epilogue, LayerRole};
use crate::checkpoint::config::{HeadConfig, HeadModule, Pooling};

/// A chain of linear layers and layer norms. The last has one output.
pub(super) struct Head<B: Backend> {
    pub(super) pooling: Pooling,
    modules: Vec<Module<B>>,
}

enum Module<B: Backend> {
    Dense { linear: B::Linear, outputs: usize, activation: Option<Activation> },
    Norm(B::Norm),
}

impl<B: Backend> Head<B> {
    pub(super) fn load(config: &HeadConfig, parts: &mut Parts<'_, B>) -> Result<Self> {
        let mut load = |module: &HeadModule| -> Result<Module<B>> {
            Ok(match *module {
                HeadModule::Dense { ref name, inputs, outputs, bias, activation } => {
                    let linear = parts.linear(name, outputs, inputs, bias, LayerRole::Head)?;
                    Module::Dense { linear, outputs, activation }
                }
                HeadModule::Norm { ref name, size, bias, eps } => Module::Norm(parts.norm(name, size, bias, eps)?),
            })
        };
        Ok(Self { pooling: config.pooling, modules: config.modules.iter().map(&mut load).collect::<Result<_>>()? })
    }

    /// `[S, C]` to `[S, 1]`.
    pub(super) fn logits(
        &self,
        backend: &B,
        ctx: &B::ExecContext,
        mut pooled: B::Buffer,
    ) -> Result<B::Buffer, BackendError> {
        for module in &self.modules {
            pooled = match module {
                Module::Dense { linear, outputs, activation } => {
                    let epilogue = activation.map_or(Epilogue::Bias, Epilogue::Activation);
                    backend.apply(ctx, linear, 0..*outputs, &pooled, epilogue)?
                }
                Module::Norm(norm) => backend.layer_norm(ctx, norm, pooled)?,
            };
        }
        Ok(pooled)
    }
}
