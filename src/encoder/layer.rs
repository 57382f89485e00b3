//! One layer of a transformer encoder (Vaswani et al. 2017), in the variants that encoder families use.

use std::ops::Range;
use std::sync::Arc;

use crate::backend::{Activation, AttentionShape, Backend, BackendError, Epilogue};
use crate::batch::Batch;
use crate::checkpoint::config::NormOrder;

/// One encoder layer. The projections Q, K and V are one linear layer with a weight `[3C, C]`.
pub(super) struct Layer<B: Backend> {
    pub(super) norm_order: NormOrder,
    pub(super) attention: SelfAttention<B>,
    pub(super) feed_forward: FeedForward<B>,
}

pub(super) struct SelfAttention<B: Backend> {
    pub(super) shape: AttentionShape,
    /// The largest distance that a token attends to; `None` is the whole sequence.
    pub(super) window: Option<usize>,
    /// Rotates Q and K by their positions.
    pub(super) rotary: Option<Arc<B::Rotary>>,
    pub(super) qkv: B::Linear,
    pub(super) output: B::Linear,
    /// `None`: no norm, as in ModernBERT's first layer.
    pub(super) norm: Option<B::Norm>,
}

pub(super) struct FeedForward<B: Backend> {
    /// F
    pub(super) size: usize,
    pub(super) activation: Activation,
    /// Whether `input` has 2F outputs, a gate and a value.
    pub(super) gated: bool,
    pub(super) input: B::Linear,
    pub(super) output: B::Linear,
    pub(super) norm: B::Norm,
}

impl<B: Backend> Layer<B> {
    /// The layer for every token: `[T, C]` to `[T, C]`.
    pub(super) fn forward(
        &self,
        backend: &B,
        ctx: &B::ExecContext,
        hidden: &B::Buffer,
        batch: &Batch,
    ) -> Result<B::Buffer, BackendError> {
        let SelfAttention { shape, window, qkv, .. } = &self.attention;
        let normed = self.pre_norm(backend, ctx, self.attention.norm.as_ref(), hidden)?;
        let x = normed.as_ref().unwrap_or(hidden);
        let qkv = backend.apply(ctx, qkv, self.qkv_outputs(0, 3), x, Epilogue::Bias)?;
        let qkv = self.rotate(backend, ctx, 2 * shape.heads, qkv, batch)?;
        let context = backend.attention(ctx, *shape, *window, &qkv, batch)?;
        self.after_attention(backend, ctx, &context, hidden)
    }

    /// The layer for first tokens (CLS) only: `[T, C]` to `[S, C]`. Keys and values are still those of every token.
    pub(super) fn forward_cls(
        &self,
        backend: &B,
        ctx: &B::ExecContext,
        hidden: &B::Buffer,
        batch: &Batch,
    ) -> Result<B::Buffer, BackendError> {
        let SelfAttention { shape, window, qkv, .. } = &self.attention;
        let normed = self.pre_norm(backend, ctx, self.attention.norm.as_ref(), hidden)?;
        let x = normed.as_ref().unwrap_or(hidden);
        // A first token is at position 0, where the rotary embedding is the identity.
        let q = backend.gather_cls(ctx, x, batch)?;
        let q = backend.apply(ctx, qkv, self.qkv_outputs(0, 1), &q, Epilogue::Bias)?;
        let kv = backend.apply(ctx, qkv, self.qkv_outputs(1, 3), x, Epilogue::Bias)?;
        let kv = self.rotate(backend, ctx, shape.heads, kv, batch)?;
        let context = backend.cls_attention(ctx, *shape, *window, &q, &kv, batch)?;
        let cls = backend.gather_cls(ctx, hidden, batch)?;
        self.after_attention(backend, ctx, &context, &cls)
    }

    /// Attention output projection and feed-forward network, each with residual and layer norm.
    fn after_attention(
        &self,
        backend: &B,
        ctx: &B::ExecContext,
        context: &B::Buffer,
        hidden: &B::Buffer,
    ) -> Result<B::Buffer, BackendError> {
        let (c, f) = (self.attention.shape.heads * self.attention.shape.head_size, self.feed_forward.size);
        let FeedForward { activation, input, output, norm, .. } = &self.feed_forward;
        let attended = backend.apply(ctx, &self.attention.output, 0..c, context, Epilogue::Residual(hidden))?;
        let attended = self.post_norm(backend, ctx, self.attention.norm.as_ref(), attended)?;
        let normed = self.pre_norm(backend, ctx, Some(norm), &attended)?;
        let (outputs, epilogue) = match self.feed_forward.gated {
            true => (2 * f, Epilogue::Gated(*activation)),
            false => (f, Epilogue::Activation(*activation)),
        };
        let expanded = backend.apply(ctx, input, 0..outputs, normed.as_ref().unwrap_or(&attended), epilogue)?;
        let added = backend.apply(ctx, output, 0..c, &expanded, Epilogue::Residual(&attended))?;
        self.post_norm(backend, ctx, Some(norm), added)
    }

    /// Applies the norm before a sublayer. Returns `None` if there is none.
    fn pre_norm(
        &self,
        backend: &B,
        ctx: &B::ExecContext,
        norm: Option<&B::Norm>,
        x: &B::Buffer,
    ) -> Result<Option<B::Buffer>, BackendError> {
        let norm = norm.filter(|_| self.norm_order == NormOrder::Pre);
        norm.map(|norm| backend.pre_norm(ctx, norm, x)).transpose()
    }

    /// Applies the norm after a sublayer and its residual. Returns `x` if there is none.
    fn post_norm(
        &self,
        backend: &B,
        ctx: &B::ExecContext,
        norm: Option<&B::Norm>,
        x: B::Buffer,
    ) -> Result<B::Buffer, BackendError> {
        match norm.filter(|_| self.norm_order == NormOrder::Post) {
            Some(norm) => backend.layer_norm(ctx, norm, x),
            None => Ok(x),
        }
    }

    /// Applies the rotary embedding to the first `heads` heads, if the layer has one.
    fn rotate(
        &self,
        backend: &B,
        ctx: &B::ExecContext,
        heads: usize,
        x: B::Buffer,
        batch: &Batch,
    ) -> Result<B::Buffer, BackendError> {
        match &self.attention.rotary {
            Some(rotary) => backend.rotate(ctx, rotary, heads, x, batch),
            None => Ok(x),
        }
    }

    /// The outputs of the QKV projection for the parts `from..to`, where Q is part 0, K is 1 and V is 2.
    fn qkv_outputs(&self, from: usize, to: usize) -> Range<usize> {
        let c = self.attention.shape.heads * self.attention.shape.head_size;
        from * c..to * c
    }
}
