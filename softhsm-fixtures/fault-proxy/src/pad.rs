//! A device on which PINs are entered, so that none is passed to the module (PKCS#11 2.40, 5.6).

use cryptoki_sys::*;

use super::{C_Login, log};

pub(super) unsafe extern "C" fn login(
    session: CK_SESSION_HANDLE,
    user: CK_USER_TYPE,
    pin: CK_UTF8CHAR_PTR,
    length: CK_ULONG,
) -> CK_RV {
    let pad = std::env::var_os("OMSIGN_PROXY_PAD").filter(|_| pin.is_null());
    let Some(pad) = pad else {
        // SAFETY: the arguments are the caller's, for the same function.
        return unsafe { C_Login(session, user, pin, length) };
    };
    log("C_Login on the device");
    let Ok(mut entered) = std::fs::read(pad) else { return CKR_FUNCTION_CANCELED };
    // SAFETY: the PIN outlives the call, and is as long as it says.
    unsafe { C_Login(session, user, entered.as_mut_ptr(), entered.len() as CK_ULONG) }
}
