//! integrations
pub mod layers;
pub mod overlay;
pub mod registry;
