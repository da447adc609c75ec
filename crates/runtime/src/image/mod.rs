//! Images: names, archives, registries, and the store they end up in.
//!
//! Reading order: [`reference`] (names), [`manifest`] (the documents), `layer` (unpacking one layer safely),
//! [`archive`] (OCI and docker archives), [`pull`] (registries), [`store`] (what is here), [`build`] (making
//! archives), [`pause`] (one that is made here).

pub mod archive;
pub mod build;
mod layer;
pub mod manifest;
pub mod pause;
pub mod pull;
pub mod reference;
pub mod store;

pub use layer::Limits;
