//! Keyless bundles with something flipped, of a private instance and of the public one: we accept nothing that
//! sigstore-python refuses.

use std::path::Path;

use anyhow::{Context as _, ensure};
use omsign_tests::keyless::{IDENTITY, PROVIDER, VERIFY, flipped, instance, sigstore_python};
use omsign_tests::random::Random;
use omsign_tests::sigstore::Flaw;
use omsign_tests::world::World;
use serde_json::Value;

/// Whatever sigstore-python refuses, we refuse; and whatever is flipped in what is signed or proves, too.
#[test]
fn mutated_bundles_are_refused_by_both() -> anyhow::Result<()> {
    let world = World::new()?;
    let (sigstore, payload) = instance(&world)?;
    let mut random = Random(2026);
    let v1 = sigstore.sign(&payload, IDENTITY, PROVIDER, Flaw::None)?;
    let v2 = sigstore.sign_v2(&payload, IDENTITY, PROVIDER, Flaw::None)?;
    let (mut names, mut what, mut in_note) = (Vec::new(), Vec::new(), Vec::new());
    for (whole, pointers) in [
        (
            &v1,
            &[
                "/verificationMaterial/certificate/rawBytes",
                "/verificationMaterial/tlogEntries/0/canonicalizedBody",
                "/verificationMaterial/tlogEntries/0/logId/keyId",
                "/verificationMaterial/tlogEntries/0/integratedTime",
                "/verificationMaterial/tlogEntries/0/inclusionPromise/signedEntryTimestamp",
                "/verificationMaterial/tlogEntries/0/inclusionProof/rootHash",
                "/verificationMaterial/tlogEntries/0/inclusionProof/treeSize",
                "/verificationMaterial/tlogEntries/0/inclusionProof/hashes/0",
                "/verificationMaterial/tlogEntries/0/inclusionProof/hashes/2",
                "/verificationMaterial/tlogEntries/0/inclusionProof/logIndex",
                "/verificationMaterial/tlogEntries/0/logIndex",
                "/verificationMaterial/tlogEntries/0/kindVersion/kind",
                "/verificationMaterial/tlogEntries/0/kindVersion/version",
                "/verificationMaterial/tlogEntries/0/inclusionProof/checkpoint/envelope",
                "/dsseEnvelope/payload",
                "/dsseEnvelope/signatures/0/sig",
            ][..],
        ),
        (
            &v2,
            &[
                "/verificationMaterial/certificate/rawBytes",
                "/verificationMaterial/tlogEntries/0/canonicalizedBody",
                "/verificationMaterial/timestampVerificationData/rfc3161Timestamps/0/signedTimestamp",
                "/verificationMaterial/tlogEntries/0/inclusionProof/hashes/1",
                // The proof's own index, size and root are no part of it in Rekor v2: the checkpoint has them.
                "/verificationMaterial/tlogEntries/0/logIndex",
                "/verificationMaterial/tlogEntries/0/kindVersion/version",
                "/verificationMaterial/tlogEntries/0/inclusionProof/checkpoint/envelope",
                "/dsseEnvelope/signatures/0/sig",
            ],
        ),
    ] {
        for pointer in pointers {
            for _ in 0..24 {
                let mut bundle = whole.clone();
                let value = bundle.pointer_mut(pointer).context("there")?;
                let text = value.as_str().context("text")?.to_owned();
                let changed = flipped(&text, &mut random);
                // What a log signs of a note ends where its signatures begin.
                let note = |text: &str| text.split_once("\n\n").map(|(note, _)| note.to_owned());
                in_note.push(note(&text) != note(&changed));
                *value = changed.into();
                let name = format!("mutated-{}.sig", names.len());
                world.write(&name, bundle.to_string())?;
                names.push(name);
                what.push((*pointer).to_owned());
            }
        }
    }
    let theirs = sigstore_python(&world, &names)?;
    let (mut accepted, mut harmless) = (Vec::new(), 0);
    for (((name, what), theirs), in_note) in names.iter().zip(&what).zip(&theirs).zip(in_note) {
        let arguments = VERIFY.map(|argument| if argument == "k.sig" { name.as_str() } else { argument });
        let output = world.omsign(&arguments)?;
        let errors = String::from_utf8_lossy(&output.stderr);
        ensure!(!errors.contains("panicked"), "{errors}");
        // Not all of these bytes are signed: the name before a note's signature (the log is known by its key), the
        // status before a token. What is not is no proof, and flips there change nothing for either verifier.
        let unsigned = theirs == "accepted"
            && ((what.ends_with("/checkpoint/envelope") && !in_note) || what.ends_with("/signedTimestamp"));
        harmless += usize::from(output.status.success() && unsigned);
        if output.status.success() && !unsigned {
            accepted.push((what.clone(), name.clone(), theirs.clone()));
        } else if !output.status.success() {
            ensure!(output.status.code() == Some(1), "{what}: {errors}");
        }
    }
    ensure!(accepted.is_empty(), "accepted: {accepted:?}");
    ensure!(harmless <= 12, "{harmless} of {} flips change nothing", names.len());
    ensure!(theirs.iter().filter(|theirs| theirs.starts_with("refused")).count() * 10 > theirs.len() * 9);
    Ok(())
}

/// Real bundles, and the root that is built in.
#[test]
fn bundles_of_the_public_instance() -> anyhow::Result<()> {
    let world = World::new()?;
    let mut random = Random(2026);
    for file in ["signme-1", "signme-2"] {
        world.write(&format!("model/{file}"), file)?;
    }
    let verify = [
        "verify",
        "model",
        "--signature",
        "k.sig",
        "--identity",
        "stefanb@us.ibm.com",
        "--identity-provider",
        "https://sigstore.verify.ibm.com/oauth2",
    ];
    for release in ["0.3.1", "1.0.0", "1.0.1", "1.1.0"] {
        let path = format!("data/historical/{release}-sigstore.sig");
        let text = std::fs::read_to_string(Path::new(env!("CARGO_MANIFEST_DIR")).join(path))?;
        world.write("k.sig", &text)?;
        world.omsign_ok(&verify)?;
        let whole: Value = serde_json::from_str(&text)?;
        let entry = "/verificationMaterial/tlogEntries/0";
        let mut pointers = vec!["/dsseEnvelope/payload".into(), "/dsseEnvelope/signatures/0/sig".into()];
        for part in ["rawBytes", "certificates/0/rawBytes"] {
            for kind in ["certificate", "x509CertificateChain"] {
                pointers.push(format!("/verificationMaterial/{kind}/{part}"));
            }
        }
        for part in [
            "canonicalizedBody",
            "integratedTime",
            "logIndex",
            "logId/keyId",
            "inclusionPromise/signedEntryTimestamp",
            "inclusionProof/rootHash",
            "inclusionProof/treeSize",
            "inclusionProof/logIndex",
            "inclusionProof/hashes/0",
            "inclusionProof/hashes/9",
            "kindVersion/kind",
            "kindVersion/version",
        ] {
            pointers.push(format!("{entry}/{part}"));
        }
        let mut tried = 0;
        for pointer in pointers {
            for _ in 0..8 {
                let mut bundle = whole.clone();
                let Some(value) = bundle.pointer_mut(&pointer) else { continue };
                let text = value.as_str().context("text")?.to_owned();
                *value = flipped(&text, &mut random).into();
                world.write("k.sig", bundle.to_string())?;
                let output = world.omsign(&verify)?;
                let errors = String::from_utf8_lossy(&output.stderr);
                ensure!(output.status.code() == Some(1), "{release} {pointer}: {errors}");
                tried += 1;
            }
        }
        ensure!(tried >= 8 * 12, "{release}: {tried} tried");
    }
    Ok(())
}
