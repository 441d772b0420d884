//! Compiles `proto/**/*.proto` without a system `protoc`; no other logic.

use prost::Message as _;

fn main() -> Result<(), Box<dyn std::error::Error>> {
    println!("cargo:rerun-if-changed=proto");
    let out = std::path::PathBuf::from(std::env::var("OUT_DIR")?);
    let files = protox::compile(["absurd/v1/absurd_service.proto", "absurd/v1/test_clock.proto"], ["proto"])?;
    std::fs::write(out.join("descriptor.bin"), files.encode_to_vec())?;
    tonic_prost_build::configure().compile_fds(files)?;
    Ok(())
}
