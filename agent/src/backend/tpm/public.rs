//! A public key as a TPM has it, and as everybody else does.

use tss_esapi::interface_types::ecc::EccCurve;
use tss_esapi::structures::Public;

use crate::algorithm::Curve;
use crate::spki::SpkiDer;

/// The public key in a TPM's structure.
pub(super) fn encoded(public: &Public) -> Result<SpkiDer, String> {
    let spki = match public {
        Public::Ecc { parameters, unique, .. } => {
            let curve = match parameters.ecc_curve() {
                EccCurve::NistP256 => Curve::P256,
                EccCurve::NistP384 => Curve::P384,
                EccCurve::NistP521 => Curve::P521,
                other => {
                    return Err(format!("is on the curve {other:?}; P-256, P-384 and P-521 are supported"));
                }
            };
            let width = curve.field_len();
            let point = padded(unique.x().value(), width).zip(padded(unique.y().value(), width));
            let (x, y) = point.ok_or("has a malformed point")?;
            // Uncompressed (SEC 1, 2.3.3).
            SpkiDer::from_ec_point(curve, &[&[4][..], &x, &y].concat())
        }
        Public::Rsa { parameters, unique, .. } => {
            // Zero stands for the usual one (TPM 2.0 Part 2, 12.2.3.5).
            let exponent = match parameters.exponent().value() {
                0 => 65_537,
                exponent => exponent,
            };
            SpkiDer::from_rsa(unique.value(), &exponent.to_be_bytes())
        }
        _ => return Err("is not an asymmetric key".into()),
    };
    spki.map_err(|error| error.to_string())
}

/// A number with leading zeros.
pub(super) fn padded(number: &[u8], width: usize) -> Option<Vec<u8>> {
    let zeros = width.checked_sub(number.len())?;
    Some([vec![0; zeros], number.to_vec()].concat())
}
