//! A module whose public keys are private objects, as those of AWS CloudHSM.

use cryptoki_sys::*;

/// Whether a new public key is to be seen by everybody, where none may be.
///
/// # Safety
///
/// `template` is a caller's, with so many attributes (PKCS#11 2.40, 5.13).
pub(super) unsafe fn refuses(template: CK_ATTRIBUTE_PTR, count: CK_ULONG) -> bool {
    if std::env::var_os("OMSIGN_PROXY_HIDES_PUBLIC_KEYS").is_none() || template.is_null() {
        return false;
    }
    // SAFETY: the caller's template.
    let attributes = unsafe { std::slice::from_raw_parts(template, usize::try_from(count).unwrap_or(0)) };
    let mut private = attributes.iter().filter(|attribute| attribute.type_ == CKA_PRIVATE);
    private.any(|attribute| {
        let value = attribute.pValue.cast::<CK_BBOOL>();
        // SAFETY: the caller says that a CK_BBOOL is there.
        !value.is_null() && unsafe { value.read_unaligned() } == CK_FALSE
    })
}
