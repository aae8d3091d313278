//! Compiles `proto/cri.proto` (the CRI v1 contract) and `proto/local.proto` for tonic, and the messages of `proto/nri.proto`, with a
//! pure Rust parser: no protoc is needed.

fn main() -> Result<(), Box<dyn std::error::Error>> {
    println!("cargo:rerun-if-changed=proto");
    let files = protox::compile(["cri.proto", "local.proto"], ["proto"])?;
    tonic_prost_build::configure()
        .build_client(true)
        .build_server(true)
        .btree_map(".")
        // Written by hand in src/api.rs: it holds secrets.
        .skip_debug([".runtime.v1.AuthConfig"])
        .compile_fds(files)?;
    let nri = protox::compile(["nri.proto"], ["proto"])?;
    tonic_prost_build::configure().build_client(false).build_server(false).btree_map(".").compile_fds(nri)?;
    Ok(())
}
