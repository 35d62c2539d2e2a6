//! A certificate chain of anything, after a certificate whose key really signed, or without one: nobody's who is
//! trusted, so never accepted.
#![no_main]

use libfuzzer_sys::fuzz_target;
use omsign::bundle::{Bundle, Material};
use omsign::trust::{Anchors, Signers, Trust};
use omsign_fuzz::{certificate, signature};

// A byte: whether the certificate whose key signed comes first. Then certificates, each after its length in two bytes.
fuzz_target!(|input: &[u8]| {
    let Some((signed, mut rest)) = input.split_first() else { return };
    let mut chain = Vec::new();
    if signed % 2 == 1 {
        chain.push(certificate().to_der().expect("a certificate"));
    }
    while let Some((length, more)) = rest.split_first_chunk() {
        let (certificate, later) = more.split_at(usize::from(u16::from_be_bytes(*length)).min(more.len()));
        chain.push(certificate.to_vec());
        rest = later;
    }
    let material = Material::CertificateChain(chain);
    let bundle = Bundle {
        material,
        timestamps: Vec::new(),
        idle_log_entries: false,
        payload: b"{}".to_vec(),
        signature: signature(b"{}"),
    };
    let roots = openssl::x509::X509::stack_from_pem(include_bytes!("../../../tests/data/historical/ca.pem"));
    let anchors = Anchors { roots: roots.expect("PEM"), ..Anchors::default() };
    assert!(Trust::new(Signers::Certified(anchors)).verify(&bundle).is_err());
});
