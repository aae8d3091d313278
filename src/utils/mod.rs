//! Small tools without policy that every layer may use.

pub mod atomic;
pub mod beneath;
pub mod failpoint;
pub mod inquiry;
pub mod memory;
pub mod newfile;
pub mod pidfd;
pub mod process;
pub mod secret_file;
pub mod section;
pub mod stdout;
pub mod tar;
pub mod tasks;
pub mod time;
pub mod trace;
pub mod turns;
pub mod watched;
