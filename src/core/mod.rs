//! The engine room: types, decisions and ports. Knows no wire format, no tool and no backend.
//!
//! Everything outside is reached through the traits in [`ports`].

pub mod error;
pub mod ids;
pub mod ports;
pub mod reference;
pub mod spec;
