//! What a device must offer to run a [`crate::Model`].
//!
//! A backend owns weights (by [`WeightId`]), the cache (by layer) and one activation buffer per [`Slot`] with a row
//! per token of the step, and a scratch area for MLPs ([`crate::Model::mlp_width`]). Which tokens, positions and blocks a step has is the backend's own input; the calls below
//! only say what happens to all rows.
//!
//! Invariant: the result of a row depends on that row's token, position and cached context alone.
//!
//! Where a [`crate::Model`] is a rank's share, every rank runs the same operations, and each leaves what one rank alone
//! would: a slot that is whole ([`Slot::is_whole`]) holds the results of all ranks, the others those of the rank's heads.
//! How the ranks tell each other is the backend's own.

use crate::gate::Gate;
use crate::layers::{GatedMlp, GroupedAttention, LatentAttention, Moe, Norm};
use crate::tensors::WeightId;

/// An activation buffer; [`crate::Model::slot_width`] gives its float32 values per token.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Slot {
    /// The residual stream.
    Hidden,
    /// Normed input of a block.
    Normed,
    /// Output of attention.
    Attended,
    /// Output of an MLP.
    Mixed,
    /// Low-rank query.
    QueryLatent,
    /// Queries of all heads.
    Query,
    /// Queries of all heads, multiplied into the latent space.
    AbsorbedQuery,
    /// Attention output of all heads in the latent space.
    LatentValue,
    /// Attention output of all heads.
    Value,
    /// What is about to be cached by latent attention.
    CacheRow,
    /// Keys of all key-value heads, about to be cached.
    FreshKey,
    /// Values of all key-value heads, about to be cached.
    FreshValue,
    /// Normed hidden states that a prediction layer goes on from.
    Previous,
    /// A prediction layer's input: a normed embedding, then a normed hidden state.
    Joined,
}

impl Slot {
    /// Every buffer.
    pub const ALL: [Self; 14] = [
        Self::Hidden,
        Self::Normed,
        Self::Attended,
        Self::Mixed,
        Self::QueryLatent,
        Self::Query,
        Self::AbsorbedQuery,
        Self::LatentValue,
        Self::Value,
        Self::CacheRow,
        Self::FreshKey,
        Self::FreshValue,
        Self::Previous,
        Self::Joined,
    ];

    /// Whether every rank holds all columns; the others have those of the rank's heads.
    pub fn is_whole(self) -> bool {
        !matches!(
            self,
            Self::Query
                | Self::AbsorbedQuery
                | Self::LatentValue
                | Self::FreshKey
                | Self::FreshValue
        )
    }
}

/// The operations of a device.
pub trait Backend {
    /// Why an operation failed; the step is then lost.
    type Error;

    /// [`Slot::Hidden`] = rows of `table` for the step's tokens.
    ///
    /// # Errors
    /// When the device failed; so for all operations.
    fn embed(&mut self, table: WeightId) -> Result<(), Self::Error>;

    /// `to = norm(from)`, over rows as wide as the norm's weight.
    ///
    /// # Errors
    /// See [`Backend::embed`].
    fn norm(&mut self, norm: &Norm, from: Slot, to: Slot) -> Result<(), Self::Error>;

    /// `to = weight · from`.
    ///
    /// # Errors
    /// See [`Backend::embed`].
    fn linear(&mut self, weight: WeightId, from: Slot, to: Slot) -> Result<(), Self::Error>;

    /// Norms, rotates and caches [`Slot::CacheRow`] as the rows of layer `layer`, rotates [`Slot::Query`], and leaves
    /// every head's attention output in [`Slot::Value`].
    ///
    /// # Errors
    /// See [`Backend::embed`].
    fn latent_attention(
        &mut self,
        layer: usize,
        attention: &LatentAttention,
    ) -> Result<(), Self::Error>;

    /// Adds the biases to, and norms, the heads of [`Slot::Query`] and [`Slot::FreshKey`] where the descriptor has such,
    /// adds the bias to [`Slot::FreshValue`], rotates queries and keys in halves (see [`crate::Rope::rotate_halves`]),
    /// caches keys and values as those of layer `layer`, and leaves every head's attention output in [`Slot::Value`].
    ///
    /// # Errors
    /// See [`Backend::embed`].
    fn grouped_attention(
        &mut self,
        layer: usize,
        attention: &GroupedAttention,
    ) -> Result<(), Self::Error>;

    /// `to = mlp(from)`.
    ///
    /// # Errors
    /// See [`Backend::embed`].
    fn mlp(&mut self, mlp: &GatedMlp, from: Slot, to: Slot) -> Result<(), Self::Error>;

    /// Chooses the experts of every row of `from`; the backend keeps the choice for [`Backend::experts`].
    ///
    /// # Errors
    /// See [`Backend::embed`].
    fn gate(&mut self, gate: &Gate, from: Slot) -> Result<(), Self::Error>;

    /// `to = Σ weight · expert(from) + shared(from)` over the experts chosen by the last [`Backend::gate`], routed
    /// experts in ascending order.
    ///
    /// # Errors
    /// See [`Backend::embed`].
    fn experts(&mut self, moe: &Moe, from: Slot, to: Slot) -> Result<(), Self::Error>;

    /// `to += from`.
    ///
    /// # Errors
    /// See [`Backend::embed`].
    fn add(&mut self, from: Slot, to: Slot) -> Result<(), Self::Error>;

    /// Logits of the rows that want them: `table · norm(hidden)`.
    ///
    /// # Errors
    /// See [`Backend::embed`].
    fn head(&mut self, norm: &Norm, table: WeightId) -> Result<(), Self::Error>;
}

/// What a device must offer beside it to run a model's [`crate::Prediction`].
///
/// A pass of the prediction layer has its own rows: each has a token, a position, and the row of [`Slot::Previous`] that
/// it goes on from.
pub trait PredictionBackend: Backend {
    /// [`Slot::Joined`] = `[token_norm(Slot::Hidden) | hidden_norm(the row's row of Slot::Previous)]`.
    ///
    /// # Errors
    /// See [`Backend::embed`].
    fn join(&mut self, token_norm: &Norm, hidden_norm: &Norm) -> Result<(), Self::Error>;

    /// As [`Backend::head`], and leaves the normed rows that wanted logits in [`Slot::Previous`], in their order.
    ///
    /// # Errors
    /// See [`Backend::embed`].
    fn predict_head(&mut self, norm: &Norm, table: WeightId) -> Result<(), Self::Error>;
}
