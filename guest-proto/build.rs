//! Compiles `proto/guest.proto` with a pure Rust parser: no protoc is needed.

fn main() -> Result<(), Box<dyn std::error::Error>> {
    println!("cargo:rerun-if-changed=../proto/guest.proto");
    println!("cargo:rerun-if-changed=../proto/monitor.proto");
    let files = protox::compile(["guest.proto"], ["../proto"])?;
    prost_build::Config::new().extern_path(".lxcri.monitor.v1", "::lxcri_monitor_proto::v1").compile_fds(files)?;
    Ok(())
}
