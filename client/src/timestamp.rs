//! RFC 3161: when did a signature exist? OpenSSL checks a time-stamp token's own signature and path; here is what
//! RFC 3161 and RFC 5816 ask beyond that.

use cms::cert::CertificateChoices;
use cms::cert::x509::Certificate;
use cms::cert::x509::der::asn1::{AnyRef, Int, ObjectIdentifier, OctetStringRef};
use cms::cert::x509::der::{self, Decode as _, Encode as _, Reader as _, SliceReader, Tag, Tagged as _};
use cms::cert::x509::ext::pkix::SubjectKeyIdentifier;
use cms::content_info::{CmsVersion, ContentInfo};
use cms::signed_data::{SignedData, SignerIdentifier, SignerInfo};
use jiff::{SignedDuration, Timestamp};
use openssl::cms::{CMSOptions, CmsContentInfo};
use openssl::error::ErrorStack;
use openssl::hash::{MessageDigest, hash};
use openssl::stack::Stack;
use openssl::x509::X509;

use crate::certificate;
use crate::lengths;
use crate::path::{PathError, Purpose, Question};
use crate::strength::{is_strong_signature, skip_rest, strong_hash};

const SIGNED_DATA: ObjectIdentifier = ObjectIdentifier::new_unwrap("1.2.840.113549.1.7.2");
const TST_INFO: ObjectIdentifier = ObjectIdentifier::new_unwrap("1.2.840.113549.1.9.16.1.4");
const CONTENT_TYPE: ObjectIdentifier = ObjectIdentifier::new_unwrap("1.2.840.113549.1.9.3");
const SIGNING_CERTIFICATE: ObjectIdentifier = ObjectIdentifier::new_unwrap("1.2.840.113549.1.9.16.2.12");
const SIGNING_CERTIFICATE_V2: ObjectIdentifier = ObjectIdentifier::new_unwrap("1.2.840.113549.1.9.16.2.47");

/// More in one token are an attack: nobody signs them.
const MOST_CERTIFICATES: usize = 16;

/// How far an authority's clock may be ahead of ours.
const CLOCK_SKEW: SignedDuration = SignedDuration::from_mins(5);

/// Why a time stamp proves nothing.
#[derive(Debug, thiserror::Error)]
pub enum TimestampError {
    /// Not a response with a token that is signed once.
    #[error("the time stamp is malformed (RFC 3161, 2.4.2): {0}")]
    Malformed(&'static str),
    /// The authority refused.
    #[error("the time stamp is a refusal of its authority (RFC 3161, 2.4.2)")]
    Refused,
    /// A stamp of something else.
    #[error("the time stamp is of another signature (RFC 3161, 2.4.2: messageImprint)")]
    Imprint,
    /// A broken or unknown hash.
    #[error("the time stamp's hash is {0}, neither SHA-256, SHA-384 nor SHA-512 (RFC 3161, 2.4.2)")]
    Hash(String),
    /// Signed with a broken or unknown hash.
    #[error("the time stamp is signed with less than 112 bits of security (NIST SP 800-57)")]
    Weak,
    /// Its own signature is wrong.
    #[error("the time stamp was changed, or not signed by the certificate that it names (RFC 5652, 5.6)")]
    Signature,
    /// Signed with a certificate that is neither in it nor trusted.
    #[error("the certificate of the time stamp's signer is not at hand (RFC 3161, 2.4.1: certReq)")]
    NoCertificate,
    /// The certificate is not the one that the authority meant.
    #[error("the time stamp does not name the certificate that it is signed with (RFC 5816, 2.2.1)")]
    SigningCertificate,
    /// The authority is not trusted.
    #[error("the time stamp's authority is not trusted (RFC 3161, 2.3)")]
    Authority(#[source] PathError),
    /// From the future.
    #[error("the time stamp is of {0}, which is yet to come (RFC 3161, 2.4.2: genTime)")]
    Future(Timestamp),
    /// OpenSSL failed.
    #[error("OpenSSL could not check the time stamp")]
    OpenSsl(#[from] ErrorStack),
}

/// When an authority saw a signature.
pub(crate) struct Seen {
    /// Not before this.
    pub(crate) earliest: Timestamp,
    /// At this time at the latest, its clock's accuracy considered: the signature existed.
    pub(crate) latest: Timestamp,
    /// From the authority's certificate to the one that is trusted.
    pub(crate) path: Vec<X509>,
}

/// Verifies that an authority that leads to one of `roots` saw `signature`.
pub(crate) fn verify(
    response: &[u8],
    signature: &[u8],
    roots: &[X509],
    now: Timestamp,
) -> Result<Seen, TimestampError> {
    let token = token(response)?;
    let signed = signed_data(&token)?;
    let [info] = signed.signer_infos.0.as_slice() else {
        return Err(TimestampError::Malformed("not signed exactly once"));
    };
    let version = match info.sid {
        SignerIdentifier::IssuerAndSerialNumber(_) => CmsVersion::V1,
        SignerIdentifier::SubjectKeyIdentifier(_) => CmsVersion::V3,
    };
    // RFC 5652, 5.1 and 5.3. Nothing that is signed covers these numbers.
    if (signed.version, info.version) != (CmsVersion::V3, version) {
        return Err(TimestampError::Malformed("of another version of CMS"));
    }
    // Nor does it have to be signed with the hash that it is a stamp of.
    if strong_hash(info.digest_alg.oid).is_none() || !is_strong_signature(&info.signature_algorithm) {
        return Err(TimestampError::Weak);
    }
    let certificates = embedded(&signed)?;
    // Only where the token has no certificates (certReq was false), the trusted ones may hold the signer's.
    let candidates = if certificates.is_empty() { roots } else { &certificates };
    let signer = candidates.iter().find(|certificate| identifies(&info.sid, certificate));
    let signer = signer.ok_or(TimestampError::NoCertificate)?;
    check_attributes(info, signer)?;

    // The one signer, and no other certificate of the token's.
    let mut only = Stack::new()?;
    only.push(signer.clone())?;
    let mut content = Vec::new();
    let flags = CMSOptions::NOINTERN | CMSOptions::NO_SIGNER_CERT_VERIFY | CMSOptions::BINARY;
    CmsContentInfo::from_der(&token)
        .and_then(|mut cms| cms.verify(Some(&only), None, None, Some(&mut content), flags))
        .map_err(|_| TimestampError::Signature)?;

    // Nothing of the content is looked at before this line.
    let stamp = Stamp::parse(&content).map_err(|_| TimestampError::Malformed("no TSTInfo"))?;
    let time = stamp.time.ok_or(TimestampError::Malformed("no genTime in UTC"))?;
    let digest = strong_hash(stamp.hash).ok_or_else(|| TimestampError::Hash(stamp.hash.to_string()))?;
    if hash(digest, signature)?.as_ref() != stamp.digest {
        return Err(TimestampError::Imprint);
    }
    if time > now + CLOCK_SKEW {
        return Err(TimestampError::Future(time));
    }
    let purpose = Purpose::TimeStamping;
    let question = Question { anchors: roots, leaf: signer, intermediates: &certificates, purpose };
    let path = question.ask(time).map_err(TimestampError::Authority)?;
    let out_of_range = |_| TimestampError::Malformed("no accuracy that a clock can have");
    let earliest = time.checked_sub(stamp.accuracy).map_err(out_of_range)?;
    let latest = time.checked_add(stamp.accuracy).map_err(out_of_range)?;
    Ok(Seen { earliest, latest, path })
}

/// When an authority says that it saw something. Nothing about it is proven.
pub fn claimed_time(response: &[u8]) -> Option<Timestamp> {
    let content = signed_data(&token(response).ok()?).ok()?.encap_content_info.econtent?;
    Stamp::parse(content.value()).ok()?.time
}

/// The token of a TimeStampResp. Some bundles hold the token alone.
fn token(response: &[u8]) -> Result<Vec<u8>, TimestampError> {
    let malformed = |_| TimestampError::Malformed("not a TimeStampResp");
    if !lengths::fit(response) {
        return Err(TimestampError::Malformed("not a TimeStampResp"));
    }
    if ContentInfo::from_der(response).is_ok() {
        return Ok(response.to_vec());
    }
    let mut reader = SliceReader::new(response).map_err(malformed)?;
    let (granted, token) = reader
        .sequence(|response| {
            let granted = response.sequence(|status| {
                let granted = matches!(Int::decode(status)?.as_bytes(), [0 | 1]);
                skip_rest(status)?;
                Ok(granted)
            })?;
            let token = if response.is_finished() { None } else { Some(AnyRef::decode(response)?.to_der()?) };
            Ok((granted, token))
        })
        .map_err(malformed)?;
    reader.finish(()).map_err(malformed)?;
    match token {
        Some(token) if granted => Ok(token),
        Some(_) => Err(TimestampError::Refused),
        None => Err(TimestampError::Malformed("no token")),
    }
}

fn signed_data(token: &[u8]) -> Result<SignedData, TimestampError> {
    let malformed = |_| TimestampError::Malformed("not signed data");
    let content = ContentInfo::from_der(token).map_err(malformed)?;
    if content.content_type != SIGNED_DATA {
        return Err(TimestampError::Malformed("not signed data"));
    }
    let signed: SignedData = content.content.decode_as().map_err(malformed)?;
    if signed.encap_content_info.econtent_type != TST_INFO {
        return Err(TimestampError::Malformed("it signs something else than a time"));
    }
    Ok(signed)
}

/// The certificates in the token, nothing about which is proven.
fn embedded(signed: &SignedData) -> Result<Vec<X509>, TimestampError> {
    let choices = signed.certificates.iter().flat_map(|set| set.0.iter());
    if choices.clone().count() > MOST_CERTIFICATES {
        return Err(TimestampError::Malformed("it holds too many certificates"));
    }
    let certificates = choices.map(|choice| match choice {
        CertificateChoices::Certificate(certificate) => certificate::parse(&certificate.to_der().ok()?),
        CertificateChoices::Other(_) => None,
    });
    let certificates: Option<Vec<X509>> = certificates.collect();
    certificates.ok_or(TimestampError::Malformed("a certificate in it cannot be read"))
}

fn identifies(id: &SignerIdentifier, certificate: &X509) -> bool {
    let Ok(parsed) = certificate.to_der().map(|der| Certificate::from_der(&der)) else { return false };
    let Ok(parsed) = parsed else { return false };
    let certificate = &parsed.tbs_certificate;
    match id {
        SignerIdentifier::IssuerAndSerialNumber(id) => {
            id.issuer == certificate.issuer && id.serial_number == certificate.serial_number
        }
        SignerIdentifier::SubjectKeyIdentifier(id) => {
            let own = certificate.get::<SubjectKeyIdentifier>().ok().flatten();
            own.is_some_and(|(_, own)| own == *id)
        }
    }
}

/// The content's type, and which certificate the authority meant, are signed attributes.
fn check_attributes(info: &SignerInfo, signer: &X509) -> Result<(), TimestampError> {
    let attribute = |wanted: ObjectIdentifier| {
        let mut found = info.signed_attrs.iter().flat_map(|set| set.iter());
        let attribute = found.find(|attribute| attribute.oid == wanted)?;
        match attribute.values.as_slice() {
            [only] => only.to_der().ok(),
            _ => None,
        }
    };
    let kind = attribute(CONTENT_TYPE).and_then(|der| ObjectIdentifier::from_der(&der).ok());
    if kind != Some(TST_INFO) {
        return Err(TimestampError::Malformed("its content type is not signed"));
    }
    let v2 = attribute(SIGNING_CERTIFICATE_V2).map(|der| certificate_hash(&der, MessageDigest::sha256()));
    let named = v2
        .or_else(|| attribute(SIGNING_CERTIFICATE).map(|der| certificate_hash(&der, MessageDigest::sha1())));
    match named {
        Some(Ok((digest, value))) if signer.digest(digest)?.as_ref() == value => Ok(()),
        _ => Err(TimestampError::SigningCertificate),
    }
}

/// Of the first ESSCertID in a SigningCertificate (RFC 2634, 5.4) or SigningCertificateV2 (RFC 5035, 3): its hash.
fn certificate_hash(attribute: &[u8], default: MessageDigest) -> der::Result<(MessageDigest, Vec<u8>)> {
    SliceReader::new(attribute)?.sequence(|attribute| {
        let id = attribute.sequence(|ids| {
            let id = ids.sequence(|id| {
                let mut digest = default;
                let mut field = AnyRef::decode(id)?;
                if field.tag() == Tag::Sequence {
                    let oid = field.sequence(|algorithm| {
                        let oid = ObjectIdentifier::decode(algorithm)?;
                        skip_rest(algorithm)?;
                        Ok(oid)
                    })?;
                    digest = strong_hash(oid).ok_or(der::ErrorKind::OidUnknown { oid })?;
                    field = AnyRef::decode(id)?;
                }
                let value = field.decode_as::<OctetStringRef<'_>>()?.as_bytes().to_vec();
                skip_rest(id)?;
                Ok((digest, value))
            })?;
            skip_rest(ids)?;
            Ok(id)
        })?;
        skip_rest(attribute)?;
        Ok(id)
    })
}

/// What of a TSTInfo is used (RFC 3161, 2.4.2).
struct Stamp {
    hash: ObjectIdentifier,
    digest: Vec<u8>,
    time: Option<Timestamp>,
    accuracy: SignedDuration,
}

impl Stamp {
    fn parse(content: &[u8]) -> der::Result<Self> {
        let mut reader = SliceReader::new(content)?;
        let stamp = reader.sequence(|info| {
            if u8::decode(info)? != 1 {
                return Err(Tag::Integer.value_error());
            }
            let _policy = ObjectIdentifier::decode(info)?;
            let (hash, digest) = info.sequence(|imprint| {
                let hash = imprint.sequence(|algorithm| {
                    let oid = ObjectIdentifier::decode(algorithm)?;
                    skip_rest(algorithm)?;
                    Ok(oid)
                })?;
                Ok((hash, OctetStringRef::decode(imprint)?.as_bytes().to_vec()))
            })?;
            let _serial = Int::decode(info)?;
            let time = AnyRef::decode(info)?;
            let time = if time.tag() == Tag::GeneralizedTime { generalized_time(time.value()) } else { None };
            let mut accuracy = SignedDuration::ZERO;
            while !info.is_finished() {
                let field = AnyRef::decode(info)?;
                if field.tag() == Tag::Sequence {
                    accuracy = parse_accuracy(field.value())?;
                } else if field.tag().number().value() == 1 && field.tag().is_context_specific() {
                    no_critical_extension(field.value())?;
                }
            }
            Ok(Self { hash, digest, time, accuracy })
        })?;
        reader.finish(stamp)
    }
}

/// Accuracy: `seconds INTEGER OPTIONAL, millis [0] OPTIONAL, micros [1] OPTIONAL`.
fn parse_accuracy(fields: &[u8]) -> der::Result<SignedDuration> {
    let (mut reader, mut accuracy) = (SliceReader::new(fields)?, SignedDuration::ZERO);
    while !reader.is_finished() {
        let field = AnyRef::decode(&mut reader)?;
        let number = match field.value() {
            bytes @ [0..0x80, ..] if bytes.len() <= 4 => {
                bytes.iter().fold(0, |sum, byte| sum << 8 | i64::from(*byte))
            }
            _ => return Err(field.tag().value_error()),
        };
        accuracy += match (field.tag() == Tag::Integer, field.tag().number().value()) {
            (true, _) => SignedDuration::from_secs(number),
            (false, 0) => SignedDuration::from_millis(number),
            (false, _) => SignedDuration::from_micros(number),
        };
    }
    Ok(accuracy)
}

/// None is understood.
fn no_critical_extension(extensions: &[u8]) -> der::Result<()> {
    let mut reader = SliceReader::new(extensions)?;
    while !reader.is_finished() {
        let critical = reader.sequence(|extension| {
            let _oid = ObjectIdentifier::decode(extension)?;
            let second = AnyRef::decode(extension)?;
            skip_rest(extension)?;
            Ok(second.tag() == Tag::Boolean && second.value() != [0])
        })?;
        if critical {
            return Err(Tag::Boolean.value_error());
        }
    }
    Ok(())
}

/// `YYYYMMDDhhmmss[.fraction]Z`. Fractions, which der's own type refuses, are cut off.
fn generalized_time(text: &[u8]) -> Option<Timestamp> {
    let text = std::str::from_utf8(text).ok()?.strip_suffix('Z')?;
    let (whole, fraction) = text.split_once('.').unwrap_or((text, "0"));
    let digits = |text: &str| !text.is_empty() && text.bytes().all(|digit| digit.is_ascii_digit());
    if whole.len() != 14 || !digits(whole) || !digits(fraction) {
        return None;
    }
    let part = |range: std::ops::Range<usize>| whole.get(range).unwrap_or_default();
    let [year, month, day] = [part(0..4), part(4..6), part(6..8)];
    let [hour, minute, second] = [part(8..10), part(10..12), part(12..14)];
    format!("{year}-{month}-{day}T{hour}:{minute}:{second}Z").parse().ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn times_with_and_without_fractions() {
        let time = |text: &str| generalized_time(text.as_bytes()).map(|time| time.to_string());
        assert_eq!(time("20261124180000Z").as_deref(), Some("2026-11-24T18:00:00Z"));
        assert_eq!(time("20261124180000.123456Z").as_deref(), Some("2026-11-24T18:00:00Z"));
        for wrong in
            ["20261124180000", "202611241800Z", "20261324180000Z", "20261124180000.Z", "+0261124180000Z", ""]
        {
            assert_eq!(time(wrong), None, "{wrong}");
        }
    }
}
