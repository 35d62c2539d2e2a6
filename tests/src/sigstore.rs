//! A private Sigstore instance in miniature: a Fulcio CA, a certificate transparency log, a Rekor log of a few
//! entries, and a time-stamp authority. Its bundles are judged by sigstore-python, too, so that it is not our own idea of one.

use anyhow::Context as _;
use openssl::asn1::{Asn1Object, Asn1OctetString, Asn1Time};
use openssl::base64::{decode_block, encode_block};
use openssl::bn::BigNum;
use openssl::ec::{EcGroup, EcKey};
use openssl::hash::MessageDigest;
use openssl::nid::Nid;
use openssl::pkey::{PKey, Private};
use openssl::sha::sha256;
use openssl::sign::Signer;
use openssl::x509::extension::{
    AuthorityKeyIdentifier, ExtendedKeyUsage, KeyUsage, SubjectAlternativeName, SubjectKeyIdentifier,
};
use openssl::x509::{X509, X509Builder, X509Extension, X509Name};
use serde_json::{Value, json};

use crate::forge;
use crate::pki::{Certificate, Pki, TSA};
use crate::world::World;

const SCT_LIST: &str = "1.3.6.1.4.1.11129.2.4.2";
const ISSUER: &str = "1.3.6.1.4.1.57264.1.8";
const OLD_ISSUER: &str = "1.3.6.1.4.1.57264.1.1";
const ORIGIN: &str = "rekor.example";

/// Entries of the log, and which of them is ours: the last of an odd number would have a shorter proof.
const ENTRIES: u8 = 5;
const OURS: usize = 2;

/// The instance. Its CA is `fulcio` and its time-stamp authority `tsa` of the world's PKI.
pub struct Sigstore<'a> {
    world: &'a World,
    ct_log: PKey<Private>,
    rekor: PKey<Private>,
}

/// What is not as it should be.
#[derive(Clone, Copy, Default, PartialEq, Eq)]
pub enum Flaw {
    /// Nothing.
    #[default]
    None,
    /// No signed certificate timestamp.
    NoSct,
    /// It was made when the certificate was not valid: after it, by the log; long before it, by the time-stamp authority.
    Late,
    /// The log's signature over the entry is another log's.
    OtherLog,
    /// The entry is about another payload.
    OtherEntry,
    /// The time stamp is of another signature.
    OtherStamp,
}

impl<'a> Sigstore<'a> {
    /// Founds one.
    pub fn new(world: &'a World) -> anyhow::Result<Self> {
        let pki = Pki::new(world);
        pki.root("fulcio")?;
        pki.root("tsa-root")?;
        pki.issue("tsa", "tsa-root", Certificate { extensions: TSA, ..Certificate::default() })?;
        Ok(Self { world, ct_log: new_key()?, rekor: new_key()? })
    }

    fn certificate(&self, name: &str) -> anyhow::Result<X509> {
        Ok(X509::from_pem(&std::fs::read(self.world.path(&format!("{name}.pem")))?)?)
    }

    /// Its `TrustedRoot` (`sigstore_trustroot.proto`).
    pub fn trusted_root(&self) -> anyhow::Result<Value> {
        let start = json!({ "start": "2020-01-01T00:00:00Z" });
        let log = |key: &PKey<Private>, url: &str| -> anyhow::Result<Value> {
            let spki = key.public_key_to_der()?;
            Ok(json!({
                "baseUrl": url,
                "hashAlgorithm": "SHA2_256",
                "publicKey": {
                    "rawBytes": encode_block(&spki), "keyDetails": "PKIX_ECDSA_P256_SHA_256", "validFor": start,
                },
                "logId": { "keyId": encode_block(&sha256(&spki)) },
            }))
        };
        let authority = |names: &[&str], url: &str| -> anyhow::Result<Value> {
            let mut certificates = Vec::new();
            for name in names {
                certificates.push(json!({ "rawBytes": encode_block(&self.certificate(name)?.to_der()?) }));
            }
            Ok(json!({
                "subject": { "organization": "example", "commonName": names[0] },
                "uri": url,
                "certChain": { "certificates": certificates },
                "validFor": start,
            }))
        };
        Ok(json!({
            "mediaType": "application/vnd.dev.sigstore.trustedroot+json;version=0.1",
            "tlogs": [log(&self.rekor, &format!("https://{ORIGIN}"))?],
            "certificateAuthorities": [authority(&["fulcio"], "https://fulcio.example")?],
            "ctlogs": [log(&self.ct_log, "https://ct.example")?],
            "timestampAuthorities": [authority(&["tsa", "tsa-root"], "https://tsa.example")?],
        }))
    }

    /// Certifies a key for ten minutes, from five minutes ago.
    fn certify(
        &self,
        key: &PKey<Private>,
        identity: &str,
        provider: &str,
        flaw: Flaw,
    ) -> anyhow::Result<X509> {
        let fulcio = self.certificate("fulcio")?;
        let fulcio_key = forge::private_key(&self.world.path("fulcio.key"))?;
        let now = now()?;
        let mut builder = X509Builder::new()?;
        builder.set_version(2)?;
        builder.set_serial_number(BigNum::from_u32(7)?.to_asn1_integer()?.as_ref())?;
        builder.set_subject_name(X509Name::builder()?.build().as_ref())?;
        builder.set_issuer_name(fulcio.subject_name())?;
        builder.set_not_before(Asn1Time::from_unix(now - 300)?.as_ref())?;
        builder.set_not_after(Asn1Time::from_unix(now + 300)?.as_ref())?;
        builder.set_pubkey(key)?;
        builder.append_extension(KeyUsage::new().critical().digital_signature().build()?)?;
        builder.append_extension(ExtendedKeyUsage::new().code_signing().build()?)?;
        let context = builder.x509v3_context(Some(&fulcio), None);
        let own = SubjectKeyIdentifier::new().build(&context)?;
        let issuers = AuthorityKeyIdentifier::new().keyid(true).build(&context)?;
        let mut names = SubjectAlternativeName::new();
        let names = if identity.contains("://") { names.uri(identity) } else { names.email(identity) };
        let names = names.critical().build(&context)?;
        for more in [own, issuers, names] {
            builder.append_extension(more)?;
        }
        builder.append_extension(extension(OLD_ISSUER, provider.as_bytes())?)?;
        let mut utf8 = vec![0x0c, u8::try_from(provider.len())?];
        utf8.extend(provider.as_bytes());
        builder.append_extension(extension(ISSUER, &utf8)?)?;
        builder.sign(&fulcio_key, MessageDigest::sha256())?;
        if flaw == Flaw::NoSct {
            return Ok(builder.build());
        }
        // What the CT log signs is the certificate without its SCTs (RFC 6962, 3.2): what is there until now. A
        // builder cannot be signed twice, so it is made again from the same parts.
        let without = builder.build();
        let tbs = tbs_certificate(&without.to_der()?)?;
        let sct = self.sct(&tbs, &fulcio, now)?;
        with_extension(&tbs, &extension(SCT_LIST, &sct)?.to_der()?, &fulcio_key)
    }

    /// A SignedCertificateTimestampList of one, in an OCTET STRING.
    fn sct(&self, tbs: &[u8], issuer: &X509, now: i64) -> anyhow::Result<Vec<u8>> {
        let millis = u64::try_from(now - 300)? * 1000;
        let issuer_key = sha256(&issuer.public_key()?.public_key_to_der()?);
        let mut signed = vec![0, 0];
        signed.extend(millis.to_be_bytes());
        signed.extend([0, 1]);
        signed.extend(issuer_key);
        signed.extend(&u32::try_from(tbs.len())?.to_be_bytes()[1..]);
        signed.extend(tbs);
        signed.extend([0, 0]);
        let signature = ecdsa(&self.ct_log, &signed)?;
        let mut sct = vec![0];
        sct.extend(sha256(&self.ct_log.public_key_to_der()?));
        sct.extend(millis.to_be_bytes());
        sct.extend([0, 0, 4, 3]);
        sct.extend(u16::try_from(signature.len())?.to_be_bytes());
        sct.extend(signature);
        let mut list = u16::try_from(sct.len() + 2)?.to_be_bytes().to_vec();
        list.extend(u16::try_from(sct.len())?.to_be_bytes());
        list.extend(sct);
        Ok(der(0x04, &list))
    }

    /// Signs a payload with a fresh key, and logs it in Rekor v1 as `dsse`.
    pub fn sign(&self, payload: &[u8], identity: &str, provider: &str, flaw: Flaw) -> anyhow::Result<Value> {
        let key = new_key()?;
        let certificate = self.certify(&key, identity, provider, flaw)?;
        let signature = forge::sign(&key, payload)?;
        let logged: &[u8] = if flaw == Flaw::OtherEntry { b"{}" } else { payload };
        let logged_signature = forge::sign(&key, logged)?;
        let logged_signature = if flaw == Flaw::OtherEntry { &logged_signature } else { &signature };
        let envelope = serde_json::to_vec(&forge::envelope(logged, logged_signature))?;
        let verifier = encode_block(&certificate.to_pem()?);
        let body = json!({
            "apiVersion": "0.0.1",
            "kind": "dsse",
            "spec": {
                "envelopeHash": { "algorithm": "sha256", "value": hex::encode(sha256(&envelope)) },
                "payloadHash": { "algorithm": "sha256", "value": hex::encode(sha256(logged)) },
                "signatures": [{ "signature": encode_block(logged_signature), "verifier": verifier }],
            },
        });
        // serde_json's maps are sorted, which is all that RFC 8785 asks for of these values.
        let body = serde_json::to_vec(&body)?;
        let integrated = if flaw == Flaw::Late { now()? + 3600 } else { now()? };
        let other = new_key()?;
        let log = if flaw == Flaw::OtherLog { &other } else { &self.rekor };
        let mut entry = self.entry(log, &body, "dsse", "0.0.1")?;
        let log_id = sha256(&self.rekor.public_key_to_der()?);
        let promise = json!({
            "body": encode_block(&body), "integratedTime": integrated, "logID": hex::encode(log_id), "logIndex": OURS,
        });
        let promise = ecdsa(log, &serde_json::to_vec(&promise)?)?;
        entry["integratedTime"] = integrated.to_string().into();
        entry["inclusionPromise"] = json!({ "signedEntryTimestamp": encode_block(&promise) });
        Ok(forge::bundle(&material(&certificate, &entry, None)?, payload, &signature))
    }

    /// Signs a payload with a fresh key, and logs it in Rekor v2 as `hashedrekord`: a time-stamp authority says when.
    pub fn sign_v2(
        &self,
        payload: &[u8],
        identity: &str,
        provider: &str,
        flaw: Flaw,
    ) -> anyhow::Result<Value> {
        let key = new_key()?;
        let certificate = self.certify(&key, identity, provider, flaw)?;
        let signature = forge::sign(&key, payload)?;
        let logged: &[u8] = if flaw == Flaw::OtherEntry { b"{}" } else { payload };
        let body = json!({
            "apiVersion": "0.0.2",
            "kind": "hashedrekord",
            "spec": { "hashedRekordV002": {
                "data": { "algorithm": "SHA2_256", "digest": encode_block(&sha256(&forge::pae(logged))) },
                "signature": {
                    "content": encode_block(&signature),
                    "verifier": {
                        "keyDetails": "PKIX_ECDSA_P256_SHA_256",
                        "x509Certificate": { "rawBytes": encode_block(&certificate.to_der()?) },
                    },
                },
            } },
        });
        let other = new_key()?;
        let log = if flaw == Flaw::OtherLog { &other } else { &self.rekor };
        let entry = self.entry(log, &serde_json::to_vec(&body)?, "hashedrekord", "0.0.2")?;
        let stamped: &[u8] = if flaw == Flaw::OtherStamp { b"another" } else { &signature };
        let time = (flaw == Flaw::Late).then_some("2021-06-01 12:00:00");
        let stamp = Pki::new(self.world).stamp("tsa", stamped, time, "-sha256 -cert")?;
        Ok(forge::bundle(&material(&certificate, &entry, Some(&stamp))?, payload, &signature))
    }

    /// Adds a time stamp of its signature to a bundle.
    pub fn stamp(&self, bundle: &mut Value) -> anyhow::Result<()> {
        let signature = bundle["dsseEnvelope"]["signatures"][0]["sig"].as_str().context("a signature")?;
        let stamp = Pki::new(self.world).stamp("tsa", &decode_block(signature)?, None, "-sha256 -cert")?;
        bundle["verificationMaterial"]["timestampVerificationData"] =
            json!({ "rfc3161Timestamps": [{ "signedTimestamp": encode_block(&stamp) }] });
        Ok(())
    }

    /// An entry of a log that has some others.
    fn entry(&self, log: &PKey<Private>, body: &[u8], kind: &str, version: &str) -> anyhow::Result<Value> {
        let leaf = |body: &[u8]| sha256(&[&[0], body].concat());
        let mut leaves: Vec<_> = (0..ENTRIES).map(|other| leaf(&[other])).collect();
        leaves[OURS] = leaf(body);
        let (root, path) = root_and_path(&leaves, OURS);
        let note = format!("{ORIGIN}\n{ENTRIES}\n{}\n", encode_block(&root));
        let log_id = sha256(&self.rekor.public_key_to_der()?);
        let mut signature = log_id[..4].to_vec();
        signature.extend(ecdsa(log, note.as_bytes())?);
        let checkpoint = format!("{note}\n\u{2014} {ORIGIN} {}\n", encode_block(&signature));
        Ok(json!({
            "logIndex": OURS.to_string(),
            "logId": { "keyId": encode_block(&log_id) },
            "kindVersion": { "kind": kind, "version": version },
            "inclusionProof": {
                "logIndex": OURS.to_string(),
                "rootHash": encode_block(&root),
                "treeSize": ENTRIES.to_string(),
                "hashes": path.iter().map(|hash| encode_block(hash)).collect::<Vec<_>>(),
                "checkpoint": { "envelope": checkpoint },
            },
            "canonicalizedBody": encode_block(body),
        }))
    }
}

/// The Merkle tree head of leaves, and one's audit path (RFC 6962, 2.1).
fn root_and_path(leaves: &[[u8; 32]], index: usize) -> ([u8; 32], Vec<[u8; 32]>) {
    let [_, _, ..] = leaves else { return (leaves.first().copied().unwrap_or_default(), Vec::new()) };
    let (left, right) = leaves.split_at(leaves.len().next_power_of_two() / 2);
    let inside = |side: usize| if side == 0 { index } else { index.saturating_sub(left.len()) };
    let ((left_root, left_path), (right_root, right_path)) =
        (root_and_path(left, inside(0)), root_and_path(right, inside(1)));
    let (mut path, sibling) =
        if index < left.len() { (left_path, right_root) } else { (right_path, left_root) };
    path.push(sibling);
    (sha256(&[&[1], &left_root[..], &right_root[..]].concat()), path)
}

fn material(certificate: &X509, entry: &Value, stamp: Option<&[u8]>) -> anyhow::Result<Value> {
    let mut material = json!({
        "certificate": { "rawBytes": encode_block(&certificate.to_der()?) },
        "tlogEntries": [entry],
    });
    if let Some(stamp) = stamp {
        material["timestampVerificationData"] =
            json!({ "rfc3161Timestamps": [{ "signedTimestamp": encode_block(stamp) }] });
    }
    Ok(material)
}

fn now() -> anyhow::Result<i64> {
    let now = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH)?;
    Ok(i64::try_from(now.as_secs())?)
}

fn new_key() -> anyhow::Result<PKey<Private>> {
    let group = EcGroup::from_curve_name(Nid::X9_62_PRIME256V1)?;
    Ok(PKey::from_ec_key(EcKey::generate(&group)?)?)
}

fn ecdsa(key: &PKey<Private>, message: &[u8]) -> anyhow::Result<Vec<u8>> {
    Ok(Signer::new(MessageDigest::sha256(), key)?.sign_oneshot_to_vec(message)?)
}

fn extension(oid: &str, value: &[u8]) -> anyhow::Result<X509Extension> {
    let value = Asn1OctetString::new_from_bytes(value)?;
    Ok(X509Extension::new_from_der(Asn1Object::from_str(oid)?.as_ref(), false, value.as_ref())?)
}

/// A DER element.
fn der(tag: u8, content: &[u8]) -> Vec<u8> {
    let length = content.len().to_be_bytes();
    let used: Vec<u8> = length.into_iter().skip_while(|byte| *byte == 0).collect();
    let mut element = vec![tag];
    if content.len() >= 128 {
        element.push(0x80 | u8::try_from(used.len()).expect("at most eight"));
    }
    element.extend(if content.is_empty() { &[0][..] } else { &used });
    element.extend(content);
    element
}

/// The first element's whole bytes and its content.
fn first(der: &[u8]) -> anyhow::Result<(&[u8], &[u8])> {
    let short = usize::from(*der.get(1).context("a length")?);
    let (header, length) = match short.checked_sub(0x80) {
        None => (2, short),
        Some(bytes) => {
            let length = der.get(2..2 + bytes).context("a length")?;
            (2 + bytes, length.iter().fold(0, |length, byte| length << 8 | usize::from(*byte)))
        }
    };
    let whole = der.get(..header + length).context("content")?;
    Ok((whole, &whole[header..]))
}

fn tbs_certificate(certificate: &[u8]) -> anyhow::Result<Vec<u8>> {
    Ok(first(first(certificate)?.1)?.0.to_vec())
}

/// A certificate like one whose TBSCertificate is given, with one more extension, signed anew.
fn with_extension(tbs: &[u8], extension: &[u8], issuer: &PKey<Private>) -> anyhow::Result<X509> {
    let mut rest = first(tbs)?.1;
    let (mut fields, mut algorithm) = (Vec::new(), Vec::new());
    for index in 0.. {
        if rest.is_empty() {
            break;
        }
        let (whole, content) = first(rest)?;
        if index == 2 {
            algorithm = whole.to_vec();
        }
        if whole[0] == 0xa3 {
            let mut extensions = first(content)?.1.to_vec();
            extensions.extend(extension);
            fields.extend(der(0xa3, &der(0x30, &extensions)));
        } else {
            fields.extend(whole);
        }
        rest = &rest[whole.len()..];
    }
    let tbs = der(0x30, &fields);
    let mut signature = vec![0];
    signature.extend(ecdsa(issuer, &tbs)?);
    let certificate = [tbs, algorithm, der(0x03, &signature)].concat();
    Ok(X509::from_der(&der(0x30, &certificate))?)
}
