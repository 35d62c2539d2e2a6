//! Compiles the contract with protox, so that no protoc has to be installed.

use std::error::Error;
use std::path::PathBuf;

use prost::Message as _;

fn main() -> Result<(), Box<dyn Error>> {
    println!("cargo:rerun-if-changed=omsign/v1/agent.proto");
    let files = protox::compile(["omsign/v1/agent.proto"], ["."])?;
    let out = PathBuf::from(std::env::var("OUT_DIR")?);
    std::fs::write(out.join("omsign.bin"), files.encode_to_vec())?;
    tonic_prost_build::configure()
        // A PIN travels in this one: its Debug is written by hand, without it.
        .skip_debug(["omsign.v1.UnlockTokenRequest"])
        .compile_fds(files)?;
    Ok(())
}
