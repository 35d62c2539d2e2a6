//! A time stamp of anything: nobody's who is trusted, so never accepted.
#![no_main]

use libfuzzer_sys::fuzz_target;
use omsign::bundle::{Bundle, KeyIdentifier, Material};
use omsign::key::PublicKey;
use omsign::trust::{Signers, Trust, TrustError};

fuzz_target!(|stamp: &[u8]| {
    let root =
        openssl::x509::X509::from_pem(include_bytes!("../../../tests/data/historical/ca.pem")).expect("PEM");
    let key = PublicKey::of_certificate(&root).expect("a key");
    let material = Material::PublicKey(KeyIdentifier::Hint(key.hint()));
    let timestamps = vec![stamp.to_vec()];
    let bundle = Bundle { material, timestamps, payload: b"{}".to_vec(), signature: vec![1] };
    let trust = Trust { timestamp_roots: vec![root], ..Trust::new(Signers::PublicKey(key)) };
    assert!(matches!(trust.verify(&bundle), Err(TrustError::Timestamp(_))));
});
