//! One forward pass: walks a model's layers on a backend.

use crate::backend::{Backend, PredictionBackend, Slot};
use crate::layers::{Attention, GroupedAttention, Layer, Mlp, Model, Prediction, Query, Residual};

/// Computes the backend's current step through all layers and the head.
///
/// # Errors
/// The first error of the backend.
pub fn forward<B: Backend>(model: &Model, backend: &mut B) -> Result<(), B::Error> {
    backend.embed(model.embedding)?;
    for (index, layer) in model.layers.iter().enumerate() {
        attend(index, layer, backend)?;
        transform(layer, backend)?;
    }
    backend.head(&model.final_norm, model.head)
}

/// The same, and leaves in [`Slot::Previous`] what the prediction layer goes on from.
///
/// # Errors
/// The first error of the backend.
pub fn forward_to_draft<B: PredictionBackend>(
    model: &Model,
    backend: &mut B,
) -> Result<(), B::Error> {
    forward(model, backend)?;
    backend.norm(&model.final_norm, Slot::Hidden, Slot::Previous)
}

/// Computes the backend's current pass through the prediction layer: the logits of the tokens after the rows' own.
///
/// # Errors
/// The first error of the backend.
pub fn predict<B: PredictionBackend>(
    model: &Model,
    prediction: &Prediction,
    backend: &mut B,
) -> Result<(), B::Error> {
    let Prediction {
        prefix: _,
        token_norm,
        hidden_norm,
        join,
        layer,
        final_norm,
    } = prediction;
    backend.embed(model.embedding)?;
    backend.join(token_norm, hidden_norm)?;
    backend.linear(*join, Slot::Joined, Slot::Hidden)?;
    attend(model.layers.len(), layer, backend)?;
    transform(layer, backend)?;
    backend.predict_head(final_norm, model.head)
}

fn attend<B: Backend>(index: usize, layer: &Layer, backend: &mut B) -> Result<(), B::Error> {
    backend.norm(&layer.input_norm, Slot::Hidden, Slot::Normed)?;
    match &layer.attention {
        Attention::Latent(attention) => {
            match &attention.query {
                Query::Full(weight) => backend.linear(*weight, Slot::Normed, Slot::Query)?,
                Query::LowRank { down, norm, up, .. } => {
                    backend.linear(*down, Slot::Normed, Slot::QueryLatent)?;
                    backend.norm(norm, Slot::QueryLatent, Slot::QueryLatent)?;
                    backend.linear(*up, Slot::QueryLatent, Slot::Query)?;
                }
            }
            backend.linear(attention.kv_down, Slot::Normed, Slot::CacheRow)?;
            backend.latent_attention(index, attention)?;
            backend.linear(attention.output, Slot::Value, Slot::Attended)?;
        }
        Attention::Grouped(attention) => {
            let GroupedAttention {
                query, key, value, ..
            } = attention;
            backend.linear(query.weight, Slot::Normed, Slot::Query)?;
            backend.linear(key.weight, Slot::Normed, Slot::FreshKey)?;
            backend.linear(value.weight, Slot::Normed, Slot::FreshValue)?;
            backend.grouped_attention(index, attention)?;
            backend.linear(attention.output, Slot::Value, Slot::Attended)?;
        }
    }
    match layer.residual {
        Residual::Add => backend.add(Slot::Attended, Slot::Hidden),
    }
}

fn transform<B: Backend>(layer: &Layer, backend: &mut B) -> Result<(), B::Error> {
    backend.norm(&layer.mlp_norm, Slot::Hidden, Slot::Normed)?;
    match &layer.mlp {
        Mlp::Dense(mlp) => backend.mlp(mlp, Slot::Normed, Slot::Mixed)?,
        Mlp::Moe(moe) => {
            backend.gate(&moe.gate, Slot::Normed)?;
            backend.experts(moe, Slot::Normed, Slot::Mixed)?;
        }
    }
    match layer.residual {
        Residual::Add => backend.add(Slot::Mixed, Slot::Hidden),
    }
}
