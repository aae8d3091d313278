//! Wires the layers together and hands over to the command registry.
fn main() {}
