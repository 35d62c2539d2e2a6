//! Commands to a card that the crate does not have or cannot encode, over a line of their own. What was shown to the
//! card over the crate's line counts for this one: it belongs to the application that both selected.

use std::ffi::CString;

use pcsc::{Card, Context, Disposition, Protocols, Scope, ShareMode};
use x509_cert::der::{Encode as _, Length};
use yubikey::piv::SlotId;
use yubikey::{Error, YubiKey};

/// GENERAL AUTHENTICATE with an Ed25519 key (NIST SP 800-73-4, part 2, 3.2.4; Yubico, "PIV extensions").
const AUTHENTICATE: u8 = 0x87;
const ED25519: u8 = 0xe0;

/// An answer with an Ed25519 signature begins so: a dynamic authentication template with a response of 64 bytes.
const SIGNATURE: [u8; 4] = [0x7c, 0x42, 0x82, 0x40];

/// The most data of one command; longer data goes in several (ISO 7816-4, 5.3.3).
const PART: usize = 255;
const MORE_FOLLOWS: u8 = 0x10;

/// Status words (ISO 7816-4, 5.6).
pub(super) const DONE: u16 = 0x9000;
/// Wrong length, wrong data, no room: the key itself was found, so there is too much of it.
const TOO_LONG: [u16; 3] = [0x6700, 0x6a80, 0x6a84];
pub(super) const NOT_ALLOWED: u16 = 0x6982;

/// A line that is let go of without a reset, which would take the verified PIN from the crate's line.
struct Line(Option<Card>);

impl Drop for Line {
    fn drop(&mut self) {
        if let Some(card) = self.0.take() {
            let _ = card.disconnect(Disposition::LeaveCard);
        }
    }
}

/// Sends a command in one transaction; returns the answer's data and the status word. Data that the card refuses on
/// the way goes no further.
pub(super) fn command(
    yubikey: &YubiKey,
    [class, rest @ ..]: [u8; 4],
    data: &[u8],
) -> Result<(Vec<u8>, u16), Error> {
    let send = || {
        let context = Context::establish(Scope::System)?;
        let reader = CString::new(yubikey.name()).map_err(|_| pcsc::Error::UnknownReader)?;
        let mut line = Line(Some(context.connect(&reader, ShareMode::Shared, Protocols::T1)?));
        let card = line.0.as_mut().ok_or(pcsc::Error::InvalidHandle)?;
        let transaction = card.transaction()?;
        let transmit = |class: u8, part: &[u8]| {
            let length = u8::try_from(part.len()).ok().filter(|length| *length > 0);
            let command = [&[class][..], &rest, length.as_slice(), part].concat();
            let mut buffer = [0; pcsc::MAX_BUFFER_SIZE];
            let answer = transaction.transmit(&command, &mut buffer)?;
            let (data, status) = answer.split_last_chunk().ok_or(pcsc::Error::CommDataLost)?;
            Ok((data.to_vec(), u16::from_be_bytes(*status)))
        };
        let mut parts = data.chunks(PART);
        let last = parts.next_back().unwrap_or_default();
        let done = parts
            .map(|part| transmit(class | MORE_FOLLOWS, part))
            .find(|done| !matches!(done, Ok((_, DONE))));
        let answer = done.unwrap_or_else(|| transmit(class, last));
        let _ = transaction.end(Disposition::LeaveCard);
        answer
    };
    send().map_err(|inner| Error::PcscError { inner: Some(inner) })
}

/// Signs a message with an Ed25519 key. (The crate's encoding ends at 1,024 bytes and lacks one length.)
pub(super) fn sign_message(yubikey: &YubiKey, slot: SlotId, message: &[u8]) -> Result<Vec<u8>, Error> {
    let field = |tag: u8, value: &[u8]| {
        let length = Length::try_from(value.len()).and_then(|length| length.to_der());
        length.map(|length| [&[tag][..], &length, value].concat()).map_err(|_| Error::SizeError)
    };
    let template = field(0x7c, &[field(0x82, &[])?, field(0x81, message)?].concat())?;
    match command(yubikey, [0, AUTHENTICATE, ED25519, slot.into()], &template)? {
        (answer, DONE) => answer.strip_prefix(&SIGNATURE).map(<[u8]>::to_vec).ok_or(Error::ParseError),
        (_, NOT_ALLOWED) => Err(Error::AuthenticationError),
        (_, status) if TOO_LONG.contains(&status) => Err(Error::SizeError),
        _ => Err(Error::GenericError),
    }
}
