//! A bundle of anything: parsed, written and parsed again, and what `inspect` shows of it.
#![no_main]

use libfuzzer_sys::fuzz_target;
use omsign::bundle::{Bundle, Material};
use omsign::{certificate, keyless};

fuzz_target!(|bytes: &[u8]| {
    let Ok(bundle) = Bundle::parse(bytes) else { return };
    assert_eq!(Bundle::parse(&bundle.to_json()).as_ref().ok(), Some(&bundle));
    match &bundle.material {
        Material::PublicKey(_) => {}
        Material::CertificateChain(chain) => {
            for certificate in chain.iter().filter_map(|der| certificate::parse(der)) {
                let _ = (certificate::subject(&certificate), certificate::names(&certificate));
            }
        }
        Material::Keyless { certificate, .. } => drop(keyless::claimed_identity(certificate)),
    }
});
