//! integrations

pub mod monitor;
