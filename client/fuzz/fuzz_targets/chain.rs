//! A certificate chain of anything: nobody's who is trusted, so never accepted.
#![no_main]

use libfuzzer_sys::fuzz_target;
use omsign::bundle::{Bundle, Material};
use omsign::trust::{Anchors, Signers, Trust};

fuzz_target!(|chain: Vec<Vec<u8>>| {
    let material = Material::CertificateChain(chain);
    let bundle = Bundle { material, timestamps: Vec::new(), payload: b"{}".to_vec(), signature: vec![1] };
    let roots = openssl::x509::X509::stack_from_pem(include_bytes!("../../../tests/data/historical/ca.pem"));
    let anchors = Anchors { roots: roots.expect("PEM"), ..Anchors::default() };
    assert!(Trust::new(Signers::Certified(anchors)).verify(&bundle).is_err());
});
