//! A PKCS#11 module that stands between an application and another module: it writes the name of each call
//! it passes on to a file, and fails or delays calls as a control file says.
//!
//! * `OMSIGN_PROXY_MODULE`: path of the module behind it.
//! * `OMSIGN_PROXY_LOG`: each wrapped call appends a line with its name, and one more, `C_Login failed a0`, when the module
//!   behind refuses it, or `C_Login injected` when the control file has something for it.
//! * `OMSIGN_PROXY_FAULTS`: lines `C_Sign 32 0` (function, CKR in hexadecimal, delay in milliseconds, or `held`: as long as
//!   the line is there; `0` means that the call goes through; in place of the CKR, `abort` and `segv` end the process, `C_GetSlotList none 0` is
//!   a module without slots, `C_GetTokenInfo last 0` a token that takes one wrong PIN more, and `C_GetTokenInfo blocked 0` one that takes none; `C_Login after 32` lets the call through and answers
//!   this in its place; a line that ends in `once` counts for the first call of each process, one that ends in
//!   `later` for all but the first two: a signature takes two, for its length and for itself). Read at every call, so
//!   faults come and go while the application runs.
//! * `OMSIGN_PROXY_PRIVATE_ONLY`: the token shows no public keys and no certificates.
//! * `OMSIGN_PROXY_WRITING_ONLY`: sessions that only read are refused.
//! * `OMSIGN_PROXY_HIDES_PUBLIC_KEYS`: new public keys may not be public objects.
//! * `OMSIGN_PROXY_LUNA`: numbers as a Luna has them, those for RSA keys as in FIPS mode (see `instead` in the profile).
//! * `OMSIGN_PROXY_PAD`: PINs are entered on the device: it is what this file says when somebody logs in without one, and
//!   nobody enters any where there is no such file.
//! * `OMSIGN_PROXY_SESSIONS`: what the token says is the most sessions that it allows.
//!
//! It offers what the module behind it does: PKCS#11 2.40, and 3.0 or 3.2 as its default interface.
#![allow(unsafe_code, non_snake_case)] // the PKCS#11 C ABI is what this crate is for

mod cloudhsm;
mod luna;
mod pad;

use std::fs::OpenOptions;
use std::io::Write as _;
use std::sync::OnceLock;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

use cryptoki_sys::*;

struct Module {
    /// Keeps the library loaded.
    _library: Pkcs11,
    list: CK_FUNCTION_LIST,
    /// What we offer in its place.
    wrapped: CK_FUNCTION_LIST,
    newer: Option<Newer>,
}

/// The table of a newer version. Later ones begin with the functions of the one before.
enum Newer {
    V3_0(Box<CK_FUNCTION_LIST_3_0>),
    V3_2(Box<CK_FUNCTION_LIST_3_2>),
}

/// What `C_GetInterface` answers.
struct Interface(CK_INTERFACE);

// SAFETY: they hold pointers to functions of a loaded library and to tables of such, are never changed after they were
// made, and neither library nor tables are ever let go of.
unsafe impl Send for Module {}
// SAFETY: as above.
unsafe impl Sync for Module {}
// SAFETY: as above.
unsafe impl Send for Interface {}
// SAFETY: as above.
unsafe impl Sync for Interface {}

static MODULE: OnceLock<Option<Module>> = OnceLock::new();
static INTERFACE: OnceLock<Option<Interface>> = OnceLock::new();
/// How many faults of some calls only were looked at so far.
static INJECTED: AtomicUsize = AtomicUsize::new(0);

/// A table with our functions in place of the module's.
macro_rules! wrap {
    ($list:expr) => {{
        let mut list = $list;
        list.C_Initialize = Some(C_Initialize);
        list.C_GetSlotList = Some(perhaps_no_slots);
        list.C_GetTokenInfo = Some(of_token);
        list.C_OpenSession = Some(perhaps_only_writing);
        list.C_CloseSession = Some(C_CloseSession);
        list.C_DestroyObject = Some(C_DestroyObject);
        list.C_Login = Some(pad::login);
        list.C_FindObjectsInit = Some(private_only);
        list.C_FindObjects = Some(C_FindObjects);
        list.C_FindObjectsFinal = Some(C_FindObjectsFinal);
        list.C_GetMechanismInfo = Some(luna::of_mechanism);
        list.C_GetAttributeValue = Some(luna::of_kind);
        list.C_GenerateKeyPair = Some(luna::made);
        list.C_SignInit = Some(luna::signed);
        list.C_Sign = Some(C_Sign);
        list.C_SignUpdate = Some(C_SignUpdate);
        list.C_SignFinal = Some(C_SignFinal);
        list.C_GenerateRandom = Some(C_GenerateRandom);
        list
    }};
}

fn module() -> Option<&'static Module> {
    let load = || {
        let path = std::env::var_os("OMSIGN_PROXY_MODULE")?;
        // SAFETY: the path names a PKCS#11 module, whose initializers are trusted as any module's are.
        let library = unsafe { Pkcs11::new(path) }.ok()?;
        let mut list: CK_FUNCTION_LIST_PTR = std::ptr::null_mut();
        // SAFETY: the function fills in a pointer to its table, which lives as long as the library.
        let rv = unsafe { library.C_GetFunctionList(&mut list) };
        if rv != CKR_OK || list.is_null() {
            return None;
        }
        // SAFETY: checked above; the table is plain data.
        let list = unsafe { *list };
        let newer = newer(&library);
        Some(Module { _library: library, list, wrapped: wrap!(list), newer })
    };
    MODULE.get_or_init(load).as_ref()
}

/// The module's own default interface (PKCS#11 3.0, 5.4), where it has a newer one, with our functions in it.
fn newer(library: &Pkcs11) -> Option<Newer> {
    library.C_GetInterface.as_ref().ok()?;
    let mut interface: *mut CK_INTERFACE = std::ptr::null_mut();
    // SAFETY: no name and no version ask for the default, whose description lives as long as the library.
    let rv = unsafe { library.C_GetInterface(std::ptr::null_mut(), std::ptr::null_mut(), &mut interface, 0) };
    if rv != CKR_OK || interface.is_null() {
        return None;
    }
    // SAFETY: checked for null above; every table begins with its version, and is as long as that says.
    unsafe {
        let table = (*interface).pFunctionList;
        let version = *table.cast::<CK_VERSION>();
        match (version.major, version.minor) {
            (3, 2..) => Some(Newer::V3_2(Box::new(wrap!(*table.cast::<CK_FUNCTION_LIST_3_2>())))),
            (3, _) => Some(Newer::V3_0(Box::new(wrap!(*table.cast::<CK_FUNCTION_LIST_3_0>())))),
            _ => None,
        }
    }
}

fn log(line: &str) {
    if let Some(path) = std::env::var_os("OMSIGN_PROXY_LOG") {
        let file = OpenOptions::new().create(true).append(true).open(path);
        // One write per line: several processes may log.
        let _ = file.and_then(|mut file| file.write_all(format!("{line}\n").as_bytes()));
    }
}

/// Whether the control file has this.
fn is_told(what: &str) -> bool {
    let faults = std::env::var_os("OMSIGN_PROXY_FAULTS").and_then(|path| std::fs::read_to_string(path).ok());
    faults.is_some_and(|faults| faults.contains(what))
}

/// Logs the call, waits as told, and returns the error that it shall fail with, if any.
fn intercept(function: &str) -> Option<CK_RV> {
    log(function);
    let faults = std::fs::read_to_string(std::env::var_os("OMSIGN_PROXY_FAULTS")?).ok()?;
    let mut lines = faults.lines().map(str::split_whitespace);
    let mut fault = lines.find_map(|mut words| (words.next() == Some(function)).then_some(words))?;
    let answer = fault.next().filter(|answer| *answer != "after")?;
    let delay = fault.next()?;
    match fault.next() {
        Some("once") if INJECTED.fetch_add(1, Ordering::Relaxed) > 0 => return None,
        Some("later") if INJECTED.fetch_add(1, Ordering::Relaxed) < 2 => return None,
        _ => {}
    }
    log(&format!("{function} injected"));
    match delay.parse() {
        Ok(delay) => std::thread::sleep(Duration::from_millis(delay)),
        Err(_) => {
            while is_told(&format!("{function} {answer} held")) {
                std::thread::sleep(Duration::from_millis(5));
            }
        }
    }
    match answer {
        "abort" => std::process::abort(),
        // Rust's own handler takes the first one for a stack that may have overflowed, and steps aside.
        "segv" => loop {
            let _ = rustix::process::kill_process(rustix::process::getpid(), rustix::process::Signal::SEGV);
        },
        _ => {}
    }
    let rv = CK_RV::from_str_radix(answer, 16).ok()?;
    (rv != CKR_OK).then_some(rv)
}

/// What a call that went through answers in place of the module's own answer.
fn lost(function: &str) -> Option<CK_RV> {
    let faults = std::fs::read_to_string(std::env::var_os("OMSIGN_PROXY_FAULTS")?).ok()?;
    let answer =
        |line: &str| CK_RV::from_str_radix(line.strip_prefix(function)?.strip_prefix(" after ")?, 16).ok();
    faults.lines().find_map(answer)
}

macro_rules! functions {
    ($($name:ident($($argument:ident: $type:ty),*);)*) => {
        $(
            unsafe extern "C" fn $name($($argument: $type),*) -> CK_RV {
                if let Some(rv) = intercept(stringify!($name)) {
                    return rv;
                }
                match module().and_then(|module| module.list.$name) {
                    // SAFETY: the arguments are the caller's, for the same function of the module behind.
                    Some(function) => {
                        let rv = unsafe { function($($argument),*) };
                        if rv != CKR_OK {
                            log(&format!("{} failed {rv:x}", stringify!($name)));
                        }
                        lost(stringify!($name)).unwrap_or(rv)
                    }
                    None => CKR_FUNCTION_NOT_SUPPORTED,
                }
            }
        )*
    };
}

functions! {
    C_Initialize(args: CK_VOID_PTR);
    C_GetSlotList(with_token: CK_BBOOL, slots: CK_SLOT_ID_PTR, count: CK_ULONG_PTR);
    C_GetTokenInfo(slot: CK_SLOT_ID, info: CK_TOKEN_INFO_PTR);
    C_OpenSession(slot: CK_SLOT_ID, flags: CK_FLAGS, application: CK_VOID_PTR, notify: CK_NOTIFY,
        session: CK_SESSION_HANDLE_PTR);
    C_CloseSession(session: CK_SESSION_HANDLE);
    C_DestroyObject(session: CK_SESSION_HANDLE, object: CK_OBJECT_HANDLE);
    C_Login(session: CK_SESSION_HANDLE, user: CK_USER_TYPE, pin: CK_UTF8CHAR_PTR, length: CK_ULONG);
    C_FindObjectsInit(session: CK_SESSION_HANDLE, template: CK_ATTRIBUTE_PTR, count: CK_ULONG);
    C_FindObjects(session: CK_SESSION_HANDLE, objects: CK_OBJECT_HANDLE_PTR, most: CK_ULONG, count: CK_ULONG_PTR);
    C_FindObjectsFinal(session: CK_SESSION_HANDLE);
    C_GetAttributeValue(session: CK_SESSION_HANDLE, object: CK_OBJECT_HANDLE, template: CK_ATTRIBUTE_PTR,
        count: CK_ULONG);
    C_GetMechanismInfo(slot: CK_SLOT_ID, mechanism: CK_MECHANISM_TYPE, info: CK_MECHANISM_INFO_PTR);
    C_GenerateKeyPair(session: CK_SESSION_HANDLE, mechanism: CK_MECHANISM_PTR, public: CK_ATTRIBUTE_PTR,
        public_count: CK_ULONG, private: CK_ATTRIBUTE_PTR, private_count: CK_ULONG,
        public_key: CK_OBJECT_HANDLE_PTR, private_key: CK_OBJECT_HANDLE_PTR);
    C_SignInit(session: CK_SESSION_HANDLE, mechanism: CK_MECHANISM_PTR, key: CK_OBJECT_HANDLE);
    C_Sign(session: CK_SESSION_HANDLE, data: CK_BYTE_PTR, length: CK_ULONG, signature: CK_BYTE_PTR,
        signature_length: CK_ULONG_PTR);
    C_SignUpdate(session: CK_SESSION_HANDLE, data: CK_BYTE_PTR, length: CK_ULONG);
    C_SignFinal(session: CK_SESSION_HANDLE, signature: CK_BYTE_PTR, signature_length: CK_ULONG_PTR);
    C_GenerateRandom(session: CK_SESSION_HANDLE, data: CK_BYTE_PTR, length: CK_ULONG);
}

/// `C_OpenSession` of a module that has no sessions that only read.
unsafe extern "C" fn perhaps_only_writing(
    slot: CK_SLOT_ID,
    flags: CK_FLAGS,
    application: CK_VOID_PTR,
    notify: CK_NOTIFY,
    session: CK_SESSION_HANDLE_PTR,
) -> CK_RV {
    if flags & CKF_RW_SESSION == 0 && std::env::var_os("OMSIGN_PROXY_WRITING_ONLY").is_some() {
        return CKR_SESSION_READ_WRITE_SO_EXISTS;
    }
    // SAFETY: the arguments are the caller's, for the same function.
    unsafe { C_OpenSession(slot, flags, application, notify, session) }
}

/// `C_GetTokenInfo` of a token that allows fewer sessions than the one behind, or fewer wrong PINs, or has a PIN pad.
unsafe extern "C" fn of_token(slot: CK_SLOT_ID, info: CK_TOKEN_INFO_PTR) -> CK_RV {
    // SAFETY: the arguments are the caller's, for the same function.
    let rv = unsafe { C_GetTokenInfo(slot, info) };
    let most = std::env::var("OMSIGN_PROXY_SESSIONS").ok().and_then(|most| most.parse().ok());
    if let (CKR_OK, Some(most)) = (rv, most) {
        // SAFETY: the module filled it in, so it points to one.
        unsafe { (*info).ulMaxSessionCount = most };
    }
    if rv == CKR_OK && std::env::var_os("OMSIGN_PROXY_PAD").is_some() {
        // SAFETY: as above.
        unsafe { (*info).flags |= CKF_PROTECTED_AUTHENTICATION_PATH };
    }
    for (told, flag) in [("last", CKF_USER_PIN_FINAL_TRY), ("blocked", CKF_USER_PIN_LOCKED)] {
        if rv == CKR_OK && is_told(&format!("C_GetTokenInfo {told}")) {
            // SAFETY: as above.
            unsafe { (*info).flags |= flag };
        }
    }
    rv
}

/// `C_GetSlotList` of a module whose reader was unplugged.
unsafe extern "C" fn perhaps_no_slots(
    with_token: CK_BBOOL,
    slots: CK_SLOT_ID_PTR,
    count: CK_ULONG_PTR,
) -> CK_RV {
    if !count.is_null() && is_told("C_GetSlotList none") {
        log("C_GetSlotList injected");
        // SAFETY: checked for null above; it points to the caller's number (PKCS#11 2.40, 5.5).
        unsafe { *count = 0 };
        return CKR_OK;
    }
    // SAFETY: the arguments are the caller's, for the same function.
    unsafe { C_GetSlotList(with_token, slots, count) }
}

/// `C_FindObjectsInit` of a token without public objects: what is looked for by such a class is not found.
unsafe extern "C" fn private_only(
    session: CK_SESSION_HANDLE,
    template: CK_ATTRIBUTE_PTR,
    count: CK_ULONG,
) -> CK_RV {
    // A class that no token here has objects of.
    let mut nothing = CKO_DOMAIN_PARAMETERS;
    let mut class = CK_ATTRIBUTE {
        type_: CKA_CLASS,
        pValue: (&raw mut nothing).cast(),
        ulValueLen: size_of::<CK_OBJECT_CLASS>() as CK_ULONG,
    };
    let hides = std::env::var_os("OMSIGN_PROXY_PRIVATE_ONLY").is_some() && !template.is_null();
    let attributes: &[CK_ATTRIBUTE] = match hides {
        // SAFETY: the caller's template has that many attributes (PKCS#11 2.40, 5.7).
        true => unsafe { std::slice::from_raw_parts(template, usize::try_from(count).unwrap_or(0)) },
        false => &[],
    };
    let is_public = attributes.iter().filter(|attribute| attribute.type_ == CKA_CLASS).any(|attribute| {
        // SAFETY: the value of CKA_CLASS is a CK_OBJECT_CLASS, which may stand anywhere.
        let class = unsafe { attribute.pValue.cast::<CK_OBJECT_CLASS>().read_unaligned() };
        matches!(class, CKO_PUBLIC_KEY | CKO_CERTIFICATE)
    });
    let (template, count) = if is_public { (&raw mut class, 1) } else { (template, count) };
    // SAFETY: the arguments are the caller's, or one attribute that outlives the call.
    unsafe { C_FindObjectsInit(session, template, count) }
}

/// The entry point of every PKCS#11 module (PKCS#11 2.40, 5.4).
///
/// # Safety
///
/// `list` must point to writable memory for one pointer.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn C_GetFunctionList(list: CK_FUNCTION_LIST_PTR_PTR) -> CK_RV {
    if list.is_null() {
        return CKR_ARGUMENTS_BAD;
    }
    match module() {
        Some(module) => {
            // SAFETY: checked for null above; callers only read the table.
            unsafe { *list = std::ptr::from_ref(&module.wrapped).cast_mut() };
            CKR_OK
        }
        None => CKR_GENERAL_ERROR,
    }
}

/// The default interface, whatever is asked for: that is all that callers here want (PKCS#11 3.0, 5.4).
///
/// # Safety
///
/// `interface` must point to writable memory for one pointer.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn C_GetInterface(
    _name: *mut CK_UTF8CHAR,
    _version: *mut CK_VERSION,
    interface: *mut *mut CK_INTERFACE,
    _flags: CK_FLAGS,
) -> CK_RV {
    if interface.is_null() {
        return CKR_ARGUMENTS_BAD;
    }
    let describe = || {
        let module = module()?;
        let table = match &module.newer {
            None => std::ptr::from_ref(&module.wrapped).cast(),
            Some(Newer::V3_0(table)) => std::ptr::from_ref(table.as_ref()).cast(),
            Some(Newer::V3_2(table)) => std::ptr::from_ref(table.as_ref()).cast::<std::ffi::c_void>(),
        };
        Some(Interface(CK_INTERFACE {
            pInterfaceName: c"PKCS 11".as_ptr().cast_mut().cast(),
            pFunctionList: table.cast_mut(),
            flags: 0,
        }))
    };
    match INTERFACE.get_or_init(describe) {
        Some(own) => {
            // SAFETY: checked for null above; callers only read it.
            unsafe { *interface = std::ptr::from_ref(&own.0).cast_mut() };
            CKR_OK
        }
        None => CKR_GENERAL_ERROR,
    }
}
