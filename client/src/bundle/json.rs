//! A bundle as JSON has it (the schemas of OMS v1.0, and `sigstore_bundle.proto`).

use std::io;

use base64::Engine as _;
use base64::display::Base64Display;
use base64::engine::general_purpose::STANDARD;
use serde::{Deserialize, Serialize, Serializer};
use serde_json::value::RawValue;

use super::log::EntryJson;
use super::{
    Bundle, BundleError, KeyIdentifier, LogEntries, MEDIA_TYPE, MOST, Material, OLDER_MEDIA_TYPE, said,
};
use crate::dsse::PAYLOAD_TYPE;
use crate::object::{Bounded, Object, Text, present};

/// No other fields anywhere: the schemas of OMS allow them in the verification material, but no parser of Sigstore
/// bundles does.
#[derive(Serialize, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
struct BundleJson<'a, P> {
    media_type: String,
    #[serde(borrow)]
    verification_material: Object<MaterialJson<'a>>,
    dsse_envelope: Object<EnvelopeJson<P>>,
}

#[derive(Default, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
struct MaterialJson<'a> {
    #[serde(default, deserialize_with = "present", skip_serializing_if = "Option::is_none")]
    public_key: Option<Object<KeyJson>>,
    #[serde(
        default,
        rename = "x509CertificateChain",
        deserialize_with = "present",
        skip_serializing_if = "Option::is_none"
    )]
    certificate_chain: Option<Object<ChainJson>>,
    #[serde(default, deserialize_with = "present", skip_serializing_if = "Option::is_none")]
    certificate: Option<Object<CertificateJson>>,
    /// Unparsed. Written even where it is empty, for some verifiers ask for it.
    #[serde(default, borrow, deserialize_with = "present")]
    tlog_entries: Option<&'a RawValue>,
    #[serde(default, deserialize_with = "present", skip_serializing_if = "Option::is_none")]
    timestamp_verification_data: Option<Object<TimestampsJson>>,
}

#[derive(Serialize, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
struct KeyJson {
    #[serde(default, deserialize_with = "present", skip_serializing_if = "Option::is_none")]
    hint: Option<String>,
    #[serde(default, deserialize_with = "present", skip_serializing_if = "Option::is_none")]
    raw_bytes: Option<String>,
    #[serde(default, deserialize_with = "present", skip_serializing)]
    #[expect(dead_code, reason = "known, so not an unknown field; the key itself says what it is")]
    key_details: Option<String>,
}

#[derive(Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct ChainJson {
    certificates: Bounded<Object<CertificateJson>, MOST>,
}

#[derive(Serialize, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
struct CertificateJson {
    raw_bytes: String,
}

#[derive(Serialize, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
struct TimestampsJson {
    #[serde(default, rename = "rfc3161Timestamps")]
    rfc3161: Bounded<Object<TimestampJson>, MOST>,
}

#[derive(Serialize, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
struct TimestampJson {
    signed_timestamp: String,
}

#[derive(Serialize, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
struct EnvelopeJson<P> {
    /// It may be nearly all of the bundle: borrowed when it is read, and encoded as it is written.
    payload: P,
    payload_type: String,
    signatures: Bounded<Object<SignatureJson>, MOST>,
}

struct Encoded<'a>(&'a [u8]);

impl Serialize for Encoded<'_> {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_str(&Base64Display::new(self.0, &STANDARD))
    }
}

#[derive(Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct SignatureJson {
    sig: String,
    /// Absent, empty and null mean the same (OMS v1.0, 4.1); it identifies nothing.
    #[serde(default)]
    keyid: Option<String>,
}

impl Bundle {
    /// Parses a bundle.
    pub fn parse(bytes: &[u8]) -> Result<Self, BundleError> {
        let bundle: Object<BundleJson<'_, Text<'_>>> =
            serde_json::from_slice(bytes).map_err(|error| BundleError::Malformed(error.to_string()))?;
        let BundleJson { media_type, verification_material, dsse_envelope } = bundle.0;
        let (Object(material), Object(envelope)) = (verification_material, dsse_envelope);
        if ![MEDIA_TYPE, OLDER_MEDIA_TYPE].contains(&media_type.as_str()) {
            return Err(BundleError::MediaType(said(media_type)));
        }
        if envelope.payload_type != PAYLOAD_TYPE {
            return Err(BundleError::PayloadType(said(envelope.payload_type)));
        }
        let [Object(signature)] = envelope.signatures.kept.as_slice() else {
            return Err(BundleError::Signatures(envelope.signatures.count));
        };
        let timestamps = timestamps(material.timestamp_verification_data)?;
        let entries = log_entries(material.tlog_entries.map_or("[]", RawValue::get))?;
        let idle_log_entries = material.certificate.is_none() && entries.0 != "[]";
        let material = match (material.public_key, material.certificate_chain, material.certificate) {
            (Some(Object(key)), None, None) => Material::PublicKey(key_identifier(key)?),
            (None, Some(Object(chain)), None) => Material::CertificateChain(certificates(&chain)?),
            (None, None, Some(Object(certificate))) => {
                if entries.0 == "[]" {
                    return Err(BundleError::NoLogEntries);
                }
                Material::Keyless {
                    certificate: decode("certificate", &certificate.raw_bytes)?,
                    log: entries,
                }
            }
            (key, chain, certificate) => {
                let given = [key.is_some(), chain.is_some(), certificate.is_some()];
                return Err(BundleError::Methods(given.into_iter().filter(|given| *given).count()));
            }
        };
        let payload = decode("payload", &envelope.payload.0)?;
        let signature = decode("sig", &signature.sig)?;
        Ok(Self { material, timestamps, idle_log_entries, payload, signature })
    }

    /// The bundle as JSON, on one line.
    pub fn to_json(&self) -> Vec<u8> {
        let mut json = Vec::new();
        self.write_json(&mut json).expect("memory takes everything");
        json
    }

    /// The same, to where it goes: it may have tens of megabytes.
    pub(super) fn write_json(&self, to: &mut dyn io::Write) -> io::Result<()> {
        let certificate = |der: &Vec<u8>| Object(CertificateJson { raw_bytes: STANDARD.encode(der) });
        let entries = match &self.material {
            Material::Keyless { log, .. } => log.0.as_str(),
            Material::PublicKey(_) | Material::CertificateChain(_) => "[]",
        };
        let entries = serde_json::from_str(entries).expect("they were JSON when they were read");
        let mut material = MaterialJson { tlog_entries: Some(entries), ..MaterialJson::default() };
        match &self.material {
            Material::PublicKey(identifier) => {
                let (hint, raw_bytes) = match identifier {
                    KeyIdentifier::Hint(hint) => (Some(hint.clone()), None),
                    KeyIdentifier::Pem(pem) => (None, Some(STANDARD.encode(pem))),
                };
                material.public_key = Some(Object(KeyJson { hint, raw_bytes, key_details: None }));
            }
            Material::CertificateChain(chain) => {
                let certificates: Vec<_> = chain.iter().map(certificate).collect();
                material.certificate_chain = Some(Object(ChainJson { certificates: certificates.into() }));
            }
            Material::Keyless { certificate: leaf, .. } => material.certificate = Some(certificate(leaf)),
        }
        if !self.timestamps.is_empty() {
            let timestamp = |der: &Vec<u8>| Object(TimestampJson { signed_timestamp: STANDARD.encode(der) });
            let rfc3161: Vec<_> = self.timestamps.iter().map(timestamp).collect();
            material.timestamp_verification_data = Some(Object(TimestampsJson { rfc3161: rfc3161.into() }));
        }
        let signature = SignatureJson { sig: STANDARD.encode(&self.signature), keyid: Some(String::new()) };
        let bundle = BundleJson {
            media_type: MEDIA_TYPE.into(),
            verification_material: Object(material),
            dsse_envelope: Object(EnvelopeJson {
                payload: Encoded(&self.payload),
                payload_type: PAYLOAD_TYPE.into(),
                signatures: vec![Object(signature)].into(),
            }),
        };
        serde_json::to_writer(&mut *to, &bundle)?;
        to.write_all(b"\n")
    }
}

fn key_identifier(key: KeyJson) -> Result<KeyIdentifier, BundleError> {
    match (key.hint, key.raw_bytes) {
        (Some(hint), None) => Ok(KeyIdentifier::Hint(hint)),
        (None, Some(raw)) => Ok(KeyIdentifier::Pem(decode("publicKey.rawBytes", &raw)?)),
        _ => Err(BundleError::Malformed("publicKey needs exactly one of hint and rawBytes".into())),
    }
}

fn certificates(chain: &ChainJson) -> Result<Vec<Vec<u8>>, BundleError> {
    let certificates = few("certificates", &chain.certificates)?;
    if certificates.is_empty() {
        return Err(BundleError::EmptyChain);
    }
    certificates.iter().map(|Object(certificate)| decode("certificate", &certificate.raw_bytes)).collect()
}

fn log_entries(json: &str) -> Result<LogEntries, BundleError> {
    let malformed = |error: serde_json::Error| BundleError::Malformed(format!("tlogEntries: {error}"));
    let list: Bounded<Object<EntryJson>, MOST> = serde_json::from_str(json).map_err(malformed)?;
    if list.count > 1 {
        return Err(BundleError::NotOne { count: list.count, what: "transparency log entries" });
    }
    Ok(LogEntries(if list.count == 0 { "[]" } else { json }.to_owned()))
}

fn timestamps(data: Option<Object<TimestampsJson>>) -> Result<Vec<Vec<u8>>, BundleError> {
    let Some(Object(data)) = data else { return Ok(Vec::new()) };
    let timestamps = few("time stamps", &data.rfc3161)?;
    let decoded =
        timestamps.iter().map(|Object(timestamp)| decode("signedTimestamp", &timestamp.signed_timestamp));
    let decoded: Vec<_> = decoded.collect::<Result<_, _>>()?;
    let same = |stamp: &&Vec<u8>| decoded.iter().filter(|other| other == stamp).count();
    match decoded.iter().map(|stamp| same(&stamp)).find(|count| *count > 1) {
        Some(count) => Err(BundleError::NotOne { count, what: "copies of a time stamp" }),
        None => Ok(decoded),
    }
}

fn few<'a, T>(what: &'static str, list: &'a Bounded<T, MOST>) -> Result<&'a [T], BundleError> {
    if list.count > MOST { Err(BundleError::TooMany { count: list.count, what }) } else { Ok(&list.kept) }
}

fn decode(what: &'static str, text: &str) -> Result<Vec<u8>, BundleError> {
    if text.is_empty() {
        return Err(BundleError::Empty(what));
    }
    STANDARD.decode(text).map_err(|_| BundleError::Base64(what))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn bundle() -> Bundle {
        let material = Material::PublicKey(KeyIdentifier::Hint("ab".into()));
        Bundle {
            material,
            timestamps: Vec::new(),
            idle_log_entries: false,
            payload: b"{}".to_vec(),
            signature: vec![1, 2, 3],
        }
    }

    #[test]
    fn a_bundle_survives_the_round_trip() {
        assert_eq!(Bundle::parse(&bundle().to_json()).expect("valid"), bundle());
        let chain = Bundle { material: Material::CertificateChain(vec![vec![1], vec![2]]), ..bundle() };
        assert_eq!(Bundle::parse(&chain.to_json()).expect("valid"), chain);
        let log = r#"[{"logIndex":"1","logId":{"keyId":"AA=="},"kindVersion":{"kind":"dsse","version":"1"},"canonicalizedBody":"AA=="}]"#;
        let log = LogEntries(log.into());
        let material = Material::Keyless { certificate: vec![1], log };
        let keyless = Bundle { material, timestamps: vec![vec![3], vec![4]], ..bundle() };
        assert_eq!(Bundle::parse(&keyless.to_json()).expect("valid"), keyless);
        let pem = Bundle { material: Material::PublicKey(KeyIdentifier::Pem(vec![1])), ..bundle() };
        assert_eq!(Bundle::parse(&pem.to_json()).expect("valid"), pem);
    }

    #[test]
    fn each_wrong_bundle_has_its_own_error() {
        type Change = fn(&mut serde_json::Value);
        let cases: &[(Change, &str)] = &[
            (|b| b["mediaType"] = "text/plain".into(), "(OMS 8.1)"),
            (|b| b["dsseEnvelope"]["payloadType"] = "text/plain".into(), "(OMS 6.7)"),
            (|b| b["dsseEnvelope"]["signatures"] = serde_json::json!([]), "0 signatures"),
            (
                |b| b["dsseEnvelope"]["signatures"] = serde_json::json!([{"sig": "AA=="}, {"sig": "AA=="}]),
                "2 signatures",
            ),
            (|b| b["dsseEnvelope"]["payload"] = "e30".into(), "payload is not base64"),
            (|b| b["dsseEnvelope"]["payload"] = "e31=".into(), "payload is not base64"),
            (|b| b["verificationMaterial"] = serde_json::json!({"tlogEntries": []}), "0 signing methods"),
            (
                |b| b["verificationMaterial"]["certificate"] = serde_json::json!({"rawBytes": "AA=="}),
                "2 signing methods",
            ),
            (|b| b["verificationMaterial"]["publicKey"] = serde_json::json!({}), "exactly one of hint"),
            (
                |b| {
                    b["verificationMaterial"] =
                        serde_json::json!({"x509CertificateChain": {"certificates": []}})
                },
                "empty",
            ),
            (|b| b["dsseEnvelope"]["payload"] = "".into(), "payload is empty (OMS 4)"),
            (|b| b["dsseEnvelope"]["signatures"][0]["sig"] = "".into(), "sig is empty (OMS 4)"),
            (
                |b| b["verificationMaterial"] = serde_json::json!({"certificate": {"rawBytes": "AA=="}}),
                "no transparency log entries (OMS 4.1)",
            ),
            (
                |b| b["verificationMaterial"]["timestampVerificationData"] = serde_json::json!({"rfc3161Timestamps": vec![serde_json::json!({"signedTimestamp": "AA=="}); 17]}),
                "17 time stamps, more than 16",
            ),
            (|b| b["more"] = 1.into(), "unknown field `more`"),
            (|b| b["dsseEnvelope"]["signatures"][0]["more"] = 1.into(), "unknown field `more`"),
        ];
        for (change, expected) in cases {
            let mut json = serde_json::from_slice(&bundle().to_json()).expect("JSON");
            change(&mut json);
            let error = Bundle::parse(json.to_string().as_bytes()).expect_err(expected).to_string();
            assert!(error.contains(expected), "{error:?} does not contain {expected:?}");
        }
    }

    #[test]
    fn keyid_may_be_absent_empty_or_null() {
        for keyid in [r#""keyid":"""#, r#""keyid":null"#, r#""keyid":"x""#] {
            let json = String::from_utf8(bundle().to_json()).expect("text").replace(r#""keyid":"""#, keyid);
            Bundle::parse(json.as_bytes()).expect(keyid);
        }
        let json = String::from_utf8(bundle().to_json()).expect("text").replace(r#","keyid":"""#, "");
        Bundle::parse(json.as_bytes()).expect("absent");
    }
}
