//! The signing daemon: owns hardware keys, lets callers in, signs their digests, and records every decision.
//!
//! A signature passes through [`listen`] (who?), [`policy`] (may they?), [`token`] (queue and deadline),
//! the process in [`host`] that owns the device, and [`audit`], in this order, before it is released.

mod agent;
pub mod algorithm;
pub mod audit;
mod backend;
mod breaker;
pub mod config;
pub mod connection;
mod denials;
pub mod doctor;
mod health;
pub mod host;
pub mod identity;
pub mod init;
mod intake;
mod key;
pub mod key_life;
pub mod listen;
pub mod log;
pub mod operator;
pub mod pin;
mod places;
pub mod policy;
mod public_key;
mod reload;
mod replay;
pub mod secret;
mod sent;
pub mod serve;
mod server;
mod setup;
pub mod spki;
mod tls;
pub mod token;
pub mod verifier;
