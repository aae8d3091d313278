//! integrations
pub mod images;
pub mod layers;
pub mod monitor;
pub mod mounts;
pub mod netns;
pub mod overlay;
pub mod registry;
