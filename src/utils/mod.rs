//! Small tools without policy that every layer may use.

pub mod atomic;
pub mod beneath;
pub mod failpoint;
pub mod memory;
pub mod pidfd;
pub mod process;
pub mod tar;
pub mod tasks;
