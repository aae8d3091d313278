//! Compiles `proto/monitor.proto` with a pure Rust parser: no protoc is needed.

fn main() -> Result<(), Box<dyn std::error::Error>> {
    println!("cargo:rerun-if-changed=../proto/monitor.proto");
    let files = protox::compile(["monitor.proto"], ["../proto"])?;
    prost_build::Config::new().compile_fds(files)?;
    Ok(())
}
