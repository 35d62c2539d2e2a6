//! A time stamp of anything beside a right signature: nobody's who is trusted, so never accepted.
#![no_main]

use libfuzzer_sys::fuzz_target;
use omsign::bundle::{Bundle, KeyIdentifier, Material};
use omsign::trust::{Signers, Trust, TrustError};
use omsign_fuzz::{certificate, public_key, signature};

fuzz_target!(|stamp: &[u8]| {
    let key = public_key();
    let material = Material::PublicKey(KeyIdentifier::Hint(key.hint()));
    let timestamps = vec![stamp.to_vec()];
    let bundle = Bundle {
        material,
        timestamps,
        idle_log_entries: false,
        payload: b"{}".to_vec(),
        signature: signature(b"{}"),
    };
    let trust = Trust { timestamp_roots: vec![certificate()], ..Trust::new(Signers::PublicKey(key)) };
    assert!(matches!(trust.verify(&bundle), Err(TrustError::Timestamp(_))));
});
