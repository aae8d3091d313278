//! The monitor of one pod.
fn main() {}
