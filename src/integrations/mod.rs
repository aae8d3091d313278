//! integrations
pub mod images;
pub mod layers;
pub mod overlay;
pub mod registry;
