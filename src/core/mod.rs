//! The engine room: types, decisions and ports. Knows no wire format, no tool and no backend.
//!
//! Everything outside is reached through the traits in [`ports`] and [`backend`].

pub mod backend;
pub mod blocking;
pub mod caps;
pub mod classes;
pub mod config;
pub mod engine;
pub mod error;
pub mod ids;
pub mod limits;
pub mod metrics;
pub mod plugins;
pub mod policy;
pub mod ports;
pub mod progress;
pub mod quota;
pub mod records;
pub mod reference;
pub mod signals;
pub mod spec;
pub mod state;
pub mod stats;
