//! The harness: real agents, real clients and stand-in hardware, each test in a directory of its own.

pub mod agent;
pub mod bench;
pub mod certified;
pub mod client;
pub mod device;
pub mod disk;
pub mod forge;
pub mod hashed;
pub mod keyless;
pub mod lab;
pub mod mishaps;
pub mod operator;
pub mod peer;
pub mod pki;
pub mod random;
pub mod sigstore;
pub mod terminal;
pub mod world;
