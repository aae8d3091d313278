//! integrations
pub mod layers;
pub mod overlay;
