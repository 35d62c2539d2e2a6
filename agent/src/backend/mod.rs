//! The devices that can hold keys: one file each, and the only ones that name a hardware crate.

pub(crate) mod pkcs11;
