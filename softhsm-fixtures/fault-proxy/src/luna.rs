//! A module with a Luna's numbers for some mechanisms, and for a kind of key.

use cryptoki_sys::*;

use super::{C_GenerateKeyPair, C_GetAttributeValue, C_GetMechanismInfo, C_SignInit, cloudhsm};

/// Luna's number for each mechanism that it has under no other.
const LUNA: [(CK_MECHANISM_TYPE, CK_MECHANISM_TYPE); 3] = [
    (CKM_RSA_PKCS_KEY_PAIR_GEN, CKM_VENDOR_DEFINED + 0x143),
    (CKM_EC_EDWARDS_KEY_PAIR_GEN, CKM_VENDOR_DEFINED + 0xc01),
    (CKM_EDDSA, CKM_VENDOR_DEFINED + 0xc03),
];

/// The mechanism of the module behind for the one that is asked for; none where a Luna would refuse it.
fn known_to_luna(asked: CK_MECHANISM_TYPE) -> Option<CK_MECHANISM_TYPE> {
    if std::env::var_os("OMSIGN_PROXY_LUNA").is_none() {
        return Some(asked);
    }
    match LUNA.iter().find(|(usual, own)| asked == *usual || asked == *own) {
        Some((usual, own)) => (asked == *own).then_some(*usual),
        None => Some(asked),
    }
}

/// What the caller's mechanism is to the module behind.
///
/// # Safety
///
/// It has to point to one, or nowhere.
unsafe fn behind_luna(mechanism: CK_MECHANISM_PTR) -> Option<CK_MECHANISM> {
    // SAFETY: the caller's promise.
    let mut mechanism = unsafe { mechanism.as_ref() }.copied()?;
    mechanism.mechanism = known_to_luna(mechanism.mechanism)?;
    Some(mechanism)
}

pub(super) unsafe extern "C" fn of_mechanism(
    slot: CK_SLOT_ID,
    mechanism: CK_MECHANISM_TYPE,
    info: CK_MECHANISM_INFO_PTR,
) -> CK_RV {
    let Some(mechanism) = known_to_luna(mechanism) else { return CKR_MECHANISM_INVALID };
    // SAFETY: the arguments are the caller's, for the same function.
    unsafe { C_GetMechanismInfo(slot, mechanism, info) }
}

pub(super) unsafe extern "C" fn made(
    session: CK_SESSION_HANDLE,
    mechanism: CK_MECHANISM_PTR,
    public: CK_ATTRIBUTE_PTR,
    public_count: CK_ULONG,
    private: CK_ATTRIBUTE_PTR,
    private_count: CK_ULONG,
    public_key: CK_OBJECT_HANDLE_PTR,
    private_key: CK_OBJECT_HANDLE_PTR,
) -> CK_RV {
    // SAFETY: the caller's mechanism.
    let Some(mut mechanism) = (unsafe { behind_luna(mechanism) }) else { return CKR_MECHANISM_INVALID };
    // SAFETY: the caller's template.
    if unsafe { cloudhsm::refuses(public, public_count) } {
        return CKR_ATTRIBUTE_VALUE_INVALID;
    }
    // SAFETY: the arguments are the caller's, and a mechanism that outlives the call.
    unsafe {
        C_GenerateKeyPair(
            session,
            &mut mechanism,
            public,
            public_count,
            private,
            private_count,
            public_key,
            private_key,
        )
    }
}

pub(super) unsafe extern "C" fn signed(
    session: CK_SESSION_HANDLE,
    mechanism: CK_MECHANISM_PTR,
    key: CK_OBJECT_HANDLE,
) -> CK_RV {
    // SAFETY: the caller's mechanism.
    let Some(mut mechanism) = (unsafe { behind_luna(mechanism) }) else { return CKR_MECHANISM_INVALID };
    // SAFETY: the arguments are the caller's, and a mechanism that outlives the call.
    unsafe { C_SignInit(session, &mut mechanism, key) }
}

/// `C_GetAttributeValue`, with Luna's number for keys on Edwards curves.
pub(super) unsafe extern "C" fn of_kind(
    session: CK_SESSION_HANDLE,
    object: CK_OBJECT_HANDLE,
    template: CK_ATTRIBUTE_PTR,
    count: CK_ULONG,
) -> CK_RV {
    // SAFETY: the arguments are the caller's, for the same function.
    let rv = unsafe { C_GetAttributeValue(session, object, template, count) };
    if rv == CKR_OK && !template.is_null() && std::env::var_os("OMSIGN_PROXY_LUNA").is_some() {
        // SAFETY: the caller's template has that many attributes (PKCS#11 2.40, 5.7).
        let attributes = unsafe { std::slice::from_raw_parts(template, usize::try_from(count).unwrap_or(0)) };
        let kinds = attributes.iter().filter(|attribute| attribute.type_ == CKA_KEY_TYPE);
        for kind in kinds.map(|attribute| attribute.pValue.cast::<CK_KEY_TYPE>()) {
            // SAFETY: the module has filled in a CK_KEY_TYPE, unless only its length was asked for.
            if !kind.is_null() && unsafe { kind.read_unaligned() } == CKK_EC_EDWARDS {
                // SAFETY: as above.
                unsafe { kind.write_unaligned(CKK_VENDOR_DEFINED + 0x12) };
            }
        }
    }
    rv
}
