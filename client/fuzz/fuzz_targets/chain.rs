//! A certificate chain of anything, after a certificate whose key really signed, or without one: nobody's who is
//! trusted, so never accepted.
#![no_main]

use libfuzzer_sys::fuzz_target;
use omsign::bundle::{Bundle, Material};
use omsign::trust::{Anchors, Signers, Trust};
use omsign_fuzz::{certificate, signature};

fuzz_target!(|input: (bool, Vec<Vec<u8>>)| {
    let (signed, rest) = input;
    let mut chain = Vec::new();
    if signed {
        chain.push(certificate().to_der().expect("a certificate"));
    }
    chain.extend(rest);
    let material = Material::CertificateChain(chain);
    let bundle =
        Bundle { material, timestamps: Vec::new(), payload: b"{}".to_vec(), signature: signature(b"{}") };
    let roots = openssl::x509::X509::stack_from_pem(include_bytes!("../../../tests/data/historical/ca.pem"));
    let anchors = Anchors { roots: roots.expect("PEM"), ..Anchors::default() };
    assert!(Trust::new(Signers::Certified(anchors)).verify(&bundle).is_err());
});
