//! Whatever a module, a TPM or a card answers, and to whatever it is asked: callers have an answer in time, others are
//! served, it is well again when the cause ends, no try of a PIN is spent, and nothing is left behind.

use std::ops::Range;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

use anyhow::ensure;
use omsign_fixtures::kryoptic::Kryoptic;
use omsign_fixtures::piv::{Faults, VirtualPiv, shows_pin};
use omsign_fixtures::softhsm::KeyType;
use omsign_fixtures::swtpm::{AUTH, SwTpm};
use omsign_fixtures::tpm_proxy::TpmProxy;
use omsign_tests::agent::eventually;
use omsign_tests::lab::{AT_ONCE, Lab, Sees, Tries};
use omsign_tests::operator::does;
use omsign_tests::world::{World, key};
use tonic::Code;

/// Nothing hangs here, and nobody waits for anything but a busy machine.
const ANSWERED: Range<Duration> = AT_ONCE;

/// When something goes wrong.
#[derive(Clone, Copy, PartialEq, Eq)]
enum When {
    /// It is open, and heals by itself.
    Open,
    /// The same, but an operator has to act: it was, as far as anybody knows, about a PIN.
    Refused,
    /// It is opened. An operator sees to it that it is opened once more, which it is by itself after some seconds.
    Opened,
}

fn trial(
    lab: &mut Lab,
    row: &str,
    when: When,
    tries: Tries<'_>,
    set: impl Fn(bool) -> anyhow::Result<()>,
) -> anyhow::Result<()> {
    let sees = if when == When::Refused { Sees::Unusable } else { Sees::Anything };
    let wrong = |lab: &Lab| {
        set(true)?;
        if when == When::Opened { lab.kill_host() } else { Ok(()) }
    };
    let right = |lab: &Lab| {
        set(false)?;
        match when {
            When::Open => Ok(()),
            When::Refused => lab.world.omsign_ok(&["agent", "unlock", "device"]).map(drop),
            // It may be open again.
            When::Opened => lab.world.omsign(&["agent", "unlock", "device"]).map(drop),
        }
    };
    lab.trial(row, (sees, ANSWERED), tries, wrong, right)
}

/// CKR_… (PKCS#11 v3.1, 3.2), of general ones to those that only a vendor knows. Not those that it has no room, which is
/// waited for, and of which `faults` tells.
const CKRS: &str = "1 3 5 6 7 8 9 a 10 11 12 13 1b 20 21 30 32 40 41 50 51 54 60 62 63 64 65 66 67 68 69 6a 6b 70 71 82 90 91 \
                    b0 b3 b4 b5 b6 b7 b8 c0 c1 d0 d1 e0 e1 e2 f0 f1 f2 100 101 103 104 105 110 112 113 114 115 120 121 130 140 \
                    141 150 160 170 180 190 191 1a0 1a1 200 201 202 80000001";

/// And those about a PIN: PIN_INCORRECT, PIN_INVALID, PIN_LEN_RANGE, PIN_EXPIRED, PIN_LOCKED, USER_PIN_NOT_INITIALIZED.
const OF_PINS: &str = "a0 a1 a2 a3 a4 102";

fn module(functions: &[&str], rows: &[(&str, When)]) -> anyhow::Result<()> {
    let world = World::new()?;
    let section = world.token("t", "k", KeyType::P256)?.section("device");
    behind_proxy(world, &section, 32, functions, rows)
}

fn other_module(functions: &[&str], rows: &[(&str, When)]) -> anyhow::Result<()> {
    let world = World::new()?;
    let token = Kryoptic::create(&world.path("kryoptic"), "k")?;
    token.generate("k")?;
    let section = token.section("device")?;
    behind_proxy(world, &section, 48, functions, rows)
}

fn behind_proxy(
    world: World,
    section: &str,
    digest_bytes: usize,
    functions: &[&str],
    rows: &[(&str, When)],
) -> anyhow::Result<()> {
    let proxy = world.proxy()?;
    let section = proxy.before(section)?;
    let counted = proxy.clone();
    let tries = || Ok(i64::try_from(counted.tries())?);
    let mut lab = Lab::new(world, &section, "label = \"k\"", digest_bytes, Some(proxy))?;
    for function in functions {
        for (ckrs, when) in rows {
            for ckr in ckrs.split_whitespace() {
                let (row, before) = (format!("{function} answers {ckr}"), counted.injected(function));
                let line = format!("{function} {ckr} 0\n");
                trial(&mut lab, &row, *when, &tries, |wrong| counted.set(if wrong { &line } else { "" }))?;
                ensure!(counted.injected(function) > before, "{row}: nothing did");
            }
        }
    }
    Ok(())
}

#[test]
fn a_module_that_signs() -> anyhow::Result<()> {
    module(&["C_SignInit", "C_Sign"], &[(CKRS, When::Open), (OF_PINS, When::Refused)])
}

#[test]
fn another_module_that_signs() -> anyhow::Result<()> {
    other_module(&["C_SignInit", "C_Sign"], &[(CKRS, When::Open), (OF_PINS, When::Refused)])
}

/// What a token is asked when it is opened, in this order.
const OPENS: [&str; 4] = ["C_Initialize", "C_GetSlotList", "C_GetTokenInfo", "C_OpenSession"];
const FINDS: [&str; 4] = ["C_FindObjectsInit", "C_FindObjects", "C_FindObjectsFinal", "C_GetAttributeValue"];

#[test]
fn a_module_that_is_opened() -> anyhow::Result<()> {
    module(&OPENS, &[(CKRS, When::Opened)])
}

#[test]
fn another_module_that_is_opened() -> anyhow::Result<()> {
    other_module(&OPENS, &[(CKRS, When::Opened)])
}

#[test]
fn a_module_that_is_asked_for_keys() -> anyhow::Result<()> {
    module(&FINDS, &[(CKRS, When::Opened)])
}

#[test]
fn another_module_that_is_asked_for_keys() -> anyhow::Result<()> {
    other_module(&FINDS, &[(CKRS, When::Opened)])
}

/// TPM_RC_… (TPM 2.0 Part 2, 6.6.3): of format 0, of format 1 with the number of a handle, session or parameter, and warnings.
/// Not those that it has no room or no time, or that somebody extended a PCR, which is waited for, and of which `tpm_sessions` tells.
const TPM_RCS: &str = "01e 100 101 103 10b 119 120 121 124 126 127 12d 12e 130 131 142 143 144 145 146 147 148 149 14a 14b 14c 150 151 152 153 \
     154 155 1c1 182 183 1c4 185 1c7 188 1c9 18a 18b 18c 18d 98f 990 192 1d5 1d6 98b 199 1da 1db 19c 99d 1df 1a0 1a1 1a3 9a4 901 \
     906 907 909 923";

/// And those about an authorization value: AUTH_MISSING, AUTH_UNAVAILABLE, AUTH_FAIL, BAD_AUTH, LOCKOUT.
const OF_VALUES: &str = "125 12f 98e 9a2 921";

/// Its commands, and TPM_CC of them (TPM 2.0 Part 2, 6.5.2).
type Commands<'a> = &'a [(&'a str, u32)];
const SIGN: (&str, u32) = ("TPM2_Sign", 0x15d);

fn chip(object: &str, commands: Commands<'_>, rows: &[(&str, When)]) -> anyhow::Result<()> {
    let world = World::new()?;
    let chip = SwTpm::create(&world.path("tpm"))?;
    let proxy = TpmProxy::before(&chip)?;
    let section = chip.section("device").replace(&chip.tcti(), &proxy.tcti());
    if object.starts_with("handle") {
        chip.guarded_key("k", 0x8100_0010, AUTH)?;
    } else {
        world.write("agent.toml", world.listen() + &section + &key("k", "device", object))?;
        does(&world, &["generate", "k", "--type", "p256"])?;
    }
    let mut lab = Lab::new(world, &section, object, 32, None)?;
    let tries = || Ok(i64::from(chip.failed_tries()?));
    for (name, command) in commands {
        for (codes, when) in rows {
            for code in codes.split_whitespace() {
                let (row, before) = (format!("{name} answers {code}"), proxy.injected());
                let fault = (*command, u32::from_str_radix(code, 16)?);
                let set = |wrong: bool| {
                    proxy.set(wrong.then_some(fault));
                    Ok(())
                };
                trial(&mut lab, &row, *when, &tries, set)?;
                ensure!(proxy.injected() > before, "{row}: nothing did");
            }
        }
    }
    drop(lab);
    let left = (chip.handles("transient")?, chip.handles("loaded-session")?);
    ensure!(left.0 <= 1 && left.1 == 0, "keys and sessions left in the TPM: {left:?}");
    Ok(())
}

#[test]
fn a_tpm_that_signs() -> anyhow::Result<()> {
    chip("handle = \"0x81000010\"", &[SIGN], &[(TPM_RCS, When::Open), (OF_VALUES, When::Refused)])
}

#[test]
fn a_tpm_that_is_opened() -> anyhow::Result<()> {
    let commands = [("TPM2_ReadPublic", 0x173), ("TPM2_GetCapability", 0x17a)];
    chip("handle = \"0x81000010\"", &commands, &[(TPM_RCS, When::Opened), (OF_VALUES, When::Opened)])
}

#[test]
fn a_tpm_that_loads_a_key() -> anyhow::Result<()> {
    let commands = [("TPM2_Load", 0x157), ("TPM2_CreatePrimary", 0x131), ("TPM2_FlushContext", 0x165)];
    chip("file = \"k.pem\"", &commands, &[(TPM_RCS, When::Opened), (OF_VALUES, When::Opened)])
}

/// What comes after it in its line is left out.
const WITH_PCRS: &str = "file = \"k.pem\" }\npcrs = \"sha256:16\" #";

#[test]
fn a_tpm_that_looks_at_pcrs() -> anyhow::Result<()> {
    let commands =
        [("TPM2_StartAuthSession", 0x176), ("TPM2_PolicyPCR", 0x17f), ("TPM2_PolicyAuthValue", 0x16b)];
    chip(WITH_PCRS, &commands, &[(TPM_RCS, When::Open), (OF_VALUES, When::Refused)])
}

#[test]
fn a_tpm_that_ends_a_session() -> anyhow::Result<()> {
    let commands = [SIGN, ("TPM2_FlushContext", 0x165)];
    chip(WITH_PCRS, &commands, &[(TPM_RCS, When::Open), (OF_VALUES, When::Refused)])
}

/// Status words (ISO/IEC 7816-4, 5.6; NIST SP 800-73-4, part 2, 3).
const STATUS: &str = "6100 6200 6281 6282 6283 6300 6400 6500 6581 6600 6700 6800 6881 6882 6900 6981 6982 6984 6985 6986 6987 \
                      6988 6a80 6a81 6a82 6a84 6a86 6a88 6b00 6c00 6d00 6e00 6f00 9100";

/// Which commands fail, and what they are called.
type Only = (&'static str, fn(&[u8]) -> bool);

/// How often a command was one that fails.
static STRUCK: AtomicUsize = AtomicUsize::new(0);

fn strikes(fails: bool) -> bool {
    STRUCK.fetch_add(fails.into(), Ordering::Relaxed);
    fails
}

fn is(command: &[u8], instruction: u8) -> bool {
    strikes(command.get(1) == Some(&instruction))
}

fn is_shown_pin(command: &[u8]) -> bool {
    strikes(shows_pin(command))
}

fn card(slot: &str, commands: &[Only], when: When) -> anyhow::Result<()> {
    let world = World::new()?;
    let card = VirtualPiv::create(&world.path("card"), 11_223_344)?;
    card.change_pin()?;
    card.generate(slot, "ECCP256", &[])?;
    let object = format!("slot = \"{slot}\"");
    let mut lab = Lab::new(world, &card.section("device"), &object, 32, None)?;
    let tries = || Ok(i64::try_from(card.wrong_pins())?);
    for (name, only) in commands {
        for word in STATUS.split_whitespace() {
            let (row, status) = (format!("{name} answers {word}"), u16::from_str_radix(word, 16)?);
            let fault = Faults { status: Some(status), only: Some(*only), ..Faults::default() };
            let set = |wrong: bool| {
                card.set(if wrong { fault.clone() } else { Faults::default() });
                Ok(())
            };
            let before = STRUCK.load(Ordering::Relaxed);
            trial(&mut lab, &row, when, &tries, set)?;
            ensure!(STRUCK.load(Ordering::Relaxed) > before, "{row}: nothing did");
        }
    }
    Ok(())
}

#[test]
fn a_card_that_signs() -> anyhow::Result<()> {
    let commands: [Only; 1] = [("GENERAL AUTHENTICATE", |command| is(command, 0x87))];
    card("9a", &commands, When::Open)
}

#[test]
fn a_card_that_is_shown_a_pin() -> anyhow::Result<()> {
    card("9c", &[("VERIFY", is_shown_pin)], When::Opened)
}

#[test]
fn a_card_that_does_not_say_what_became_of_a_pin_is_shown_it_once_by_each_process() -> anyhow::Result<()> {
    let world = World::new()?;
    let card = VirtualPiv::create(&world.path("card"), 11_223_344)?;
    card.change_pin()?;
    card.generate("9c", "ECCP256", &[])?;
    let lab = Lab::new(world, &card.section("device"), "slot = \"9c\"", 32, None)?;
    card.set(Faults { status: Some(0x6f00), only: Some(is_shown_pin), ..Faults::default() });
    eventually("it is locked", || Ok(lab.sign()? == Err(Code::FailedPrecondition)))?;
    // By the one that signed, by the one that took its place, and once more: it does not show what it counted.
    let shown = STRUCK.load(Ordering::Relaxed);
    ensure!((1..=3).contains(&shown), "it was shown the PIN {shown} times");
    Ok(())
}

#[test]
fn a_card_that_is_opened() -> anyhow::Result<()> {
    let commands: [Only; 4] = [
        ("SELECT", |command| is(command, 0xa4)),
        ("GET METADATA", |command| is(command, 0xf7)),
        ("GET SERIAL", |command| is(command, 0xf8)),
        ("VERIFY without a PIN", |command| !shows_pin(command) && is(command, 0x20)),
    ];
    card("9a", &commands, When::Opened)
}
