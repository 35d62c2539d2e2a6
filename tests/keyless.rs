//! The sigstore method: a private instance in miniature, judged by us and by sigstore-python.

use std::path::Path;
use std::process::Command;

use anyhow::{Context as _, ensure};
use omsign_tests::forge;
use omsign_tests::peer::cache;
use omsign_tests::random::Random;
use omsign_tests::sigstore::{Flaw, Sigstore};
use omsign_tests::world::World;
use serde_json::{Value, json};

const IDENTITY: &str = "https://github.com/acme/models/.github/workflows/release.yml@refs/tags/v1";
const PROVIDER: &str = "https://token.actions.githubusercontent.com";
const FILES: [(&str, &str); 2] = [("config.json", "{}"), ("weights.bin", "some weights")];

/// A world with a model, its statement, and an instance whose trusted root is in `root.json`.
fn instance(world: &World) -> anyhow::Result<(Sigstore<'_>, Vec<u8>)> {
    for (name, content) in FILES {
        world.write(&format!("model/{name}"), content)?;
    }
    let sigstore = Sigstore::new(world)?;
    world.write("root.json", serde_json::to_vec(&sigstore.trusted_root()?)?)?;
    Ok((sigstore, serde_json::to_vec(&forge::statement(&FILES))?))
}

const VERIFY: [&str; 11] = [
    "verify",
    "sigstore",
    "model",
    "--signature",
    "k.sig",
    "--identity",
    IDENTITY,
    "--identity-provider",
    PROVIDER,
    "--trusted-root",
    "root.json",
];

/// What sigstore-python says of each bundle.
fn sigstore_python(world: &World, bundles: &[String]) -> anyhow::Result<Vec<String>> {
    let script = Path::new(env!("CARGO_MANIFEST_DIR")).join("peers/sigstore_verify.py");
    let mut command = Command::new(cache("reference/bin/python")?);
    command.arg(script).args(["root.json", IDENTITY, PROVIDER]).args(bundles).current_dir(world.path(""));
    let output = command.output()?;
    ensure!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    let lines: Vec<_> = String::from_utf8(output.stdout)?.lines().map(str::to_owned).collect();
    ensure!(lines.len() == bundles.len(), "{lines:?}");
    Ok(lines)
}

#[test]
fn a_private_instance() -> anyhow::Result<()> {
    let world = World::new()?;
    let (sigstore, payload) = instance(&world)?;
    world.write("v1.sig", sigstore.sign(&payload, IDENTITY, PROVIDER, Flaw::None)?.to_string())?;
    world.write("v2.sig", sigstore.sign_v2(&payload, IDENTITY, PROVIDER)?.to_string())?;
    let theirs = sigstore_python(&world, &["v1.sig".into(), "v2.sig".into()])?;
    ensure!(theirs == ["accepted", "accepted"], "{theirs:?}");
    for (bundle, source) in [("v1.sig", "transparency log"), ("v2.sig", "RFC 3161 time stamp")] {
        std::fs::copy(world.path(bundle), world.path("k.sig"))?;
        let said = world.omsign_ok(&VERIFY)?;
        let expected = [
            format!("signed by {IDENTITY}\n"),
            format!("vouched by   {PROVIDER}\n"),
            format!("or before ({source})\n"),
            "certificate transparency, transparency log, identity and identity provider".into(),
        ];
        for part in &expected {
            ensure!(said.contains(part), "{bundle}: {said}");
        }
        // Without the method, which is in the bundle, and with patterns.
        let identity = "https://github.com/acme/**";
        let patterns = ["--identity-pattern", identity, "--identity-provider-pattern", "https://*"];
        let plain =
            [&["verify", "model", "--signature", "k.sig", "--trusted-root", "root.json"], &patterns[..]];
        let json: Value =
            serde_json::from_str(&world.omsign_ok(&[&plain.concat()[..], &["--json"]].concat())?)?;
        ensure!(json["method"] == "sigstore" && json["identity"] == IDENTITY, "{json}");
        ensure!(json["signed_at"].is_string() && json["signed_at_source"] == source, "{json}");

        let instead = |from: &str, to: &str| {
            VERIFY.map(|argument| if argument == from { to.to_owned() } else { argument.to_owned() })
        };
        for (from, to, expected) in [
            (IDENTITY, "ann@acme.com", "not by ann@acme.com (OMS 8.2: identity)"),
            (IDENTITY, "https://github.com/acme/**", "not by https://github.com/acme/**"),
            (
                PROVIDER,
                "https://accounts.example",
                "not https://accounts.example (OMS 8.2: identity provider)",
            ),
        ] {
            let arguments = instead(from, to);
            world.omsign_refuses(1, &arguments.each_ref().map(String::as_str), &[expected])?;
        }
        // The public instance knows nothing of this one.
        world.omsign_refuses(1, &VERIFY[..9], &["error: "])?;
        // Nor are keys or certificates asked for a keyless bundle.
        world.omsign_refuses(
            1,
            &["verify", "model", "--signature", "k.sig", "--certificate-chain", "fulcio.pem"],
            &[
                "signed with the sigstore method, but a certificate chain was given",
                "hint: verify it with --identity",
            ],
        )?;
    }
    let config = json!({
        "mediaType": "application/vnd.dev.sigstore.clienttrustconfig.v0.1+json",
        "trustedRoot": sigstore.trusted_root()?,
        "signingConfig": { "mediaType": "application/vnd.dev.sigstore.signingconfig.v0.2+json" },
    });
    world.write("config.json", config.to_string())?;
    world.omsign_ok(&[&VERIFY[..9], &["--trust-config", "config.json"]].concat())?;
    world.omsign_refuses(
        2,
        &[&VERIFY[..9], &["--trust-config", "root.json"]].concat(),
        &["root.json is not a Sigstore client trust configuration in JSON"],
    )?;
    world.omsign_refuses(
        2,
        &[&VERIFY[..9], &["--trusted-root", "config.json"]].concat(),
        &["config.json is not a Sigstore trusted root in JSON"],
    )?;
    // What was signed is what counts.
    world.write("model/config.json", "{ }")?;
    world.omsign_refuses(1, &VERIFY, &["1 changed", "changed: config.json"])
}

#[test]
fn what_is_wrong_with_a_keyless_bundle_is_said() -> anyhow::Result<()> {
    let world = World::new()?;
    let (sigstore, payload) = instance(&world)?;
    for (flaw, expected) in [
        (Flaw::NoSct, "has no valid signed certificate timestamp (RFC 6962, 3.2)"),
        (
            Flaw::Late,
            "the transparency log does not prove the signature (OMS 8.2: Rekor): invalid integrated time",
        ),
        (
            Flaw::OtherLog,
            "the transparency log does not prove the signature (OMS 8.2: Rekor): invalid inclusion promise",
        ),
        (Flaw::OtherEntry, "log entry does not match the bundle"),
    ] {
        let bundle = sigstore.sign(&payload, IDENTITY, PROVIDER, flaw)?;
        world.write("k.sig", bundle.to_string())?;
        let theirs = sigstore_python(&world, &["k.sig".into()])?;
        ensure!(theirs[0].starts_with("refused"), "{theirs:?}");
        world.omsign_refuses(1, &VERIFY, &[expected])?;
    }
    // Each proof is needed.
    let whole = sigstore.sign(&payload, IDENTITY, PROVIDER, Flaw::None)?;
    for (pointer, expected) in [
        ("/verificationMaterial/tlogEntries", "no transparency log entries"),
        ("/verificationMaterial/tlogEntries/0/inclusionProof", "must have an inclusion proof"),
        ("/verificationMaterial/tlogEntries/0/inclusionPromise", "no trusted time stamp proves when"),
        (
            "/verificationMaterial/tlogEntries/0/inclusionProof/checkpoint",
            "inclusion proof has no checkpoint",
        ),
    ] {
        let mut bundle = whole.clone();
        let (parent, name) = pointer.rsplit_once('/').context("a pointer")?;
        let parent = bundle.pointer_mut(parent).and_then(Value::as_object_mut).context(pointer)?;
        parent.remove(name).context(pointer)?;
        world.write("k.sig", bundle.to_string())?;
        world.omsign_refuses(1, &VERIFY, &[expected]).context(pointer)?;
    }
    Ok(())
}

/// Whatever sigstore-python refuses, we refuse; and whatever is flipped in what is signed or proves, too.
#[test]
fn mutated_bundles_are_refused_by_both() -> anyhow::Result<()> {
    let world = World::new()?;
    let (sigstore, payload) = instance(&world)?;
    let mut random = Random(2026);
    let v1 = sigstore.sign(&payload, IDENTITY, PROVIDER, Flaw::None)?;
    let v2 = sigstore.sign_v2(&payload, IDENTITY, PROVIDER)?;
    let (mut names, mut what) = (Vec::new(), Vec::new());
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
                *value = flipped(&text, &mut random).into();
                let name = format!("mutated-{}.sig", names.len());
                world.write(&name, bundle.to_string())?;
                names.push(name);
                what.push((*pointer).to_owned());
            }
        }
    }
    let theirs = sigstore_python(&world, &names)?;
    let mut accepted = Vec::new();
    for ((name, what), theirs) in names.iter().zip(&what).zip(&theirs) {
        let arguments = VERIFY.map(|argument| if argument == "k.sig" { name.as_str() } else { argument });
        let output = world.omsign(&arguments)?;
        let errors = String::from_utf8_lossy(&output.stderr);
        ensure!(!errors.contains("panicked"), "{errors}");
        // Not all of these bytes are signed: the name before a note's signature (the log is known by its key), the
        // status before a token. What is not is no proof, and flips there change nothing for either verifier.
        let unsigned = theirs == "accepted"
            && (what.ends_with("/checkpoint/envelope") || what.ends_with("/signedTimestamp"));
        if output.status.success() && !unsigned {
            accepted.push((what.clone(), name.clone(), theirs.clone()));
        } else if !output.status.success() {
            ensure!(output.status.code() == Some(1), "{what}: {errors}");
        }
    }
    ensure!(accepted.is_empty(), "accepted: {accepted:?}");
    ensure!(theirs.iter().filter(|theirs| theirs.starts_with("refused")).count() * 10 > theirs.len() * 9);
    Ok(())
}

/// One form only, and each proof once: what sigstore-python does not take we do not take, whatever it would prove.
#[test]
fn the_form_of_what_a_log_proves() -> anyhow::Result<()> {
    let world = World::new()?;
    let (sigstore, payload) = instance(&world)?;
    let v1 = sigstore.sign(&payload, IDENTITY, PROVIDER, Flaw::None)?;
    let v2 = sigstore.sign_v2(&payload, IDENTITY, PROVIDER)?;
    let twice = |value: &mut Value| {
        let list = value.as_array_mut().expect("a list");
        list.extend(list.clone());
    };
    let unpadded = |value: &mut Value| {
        // A length that needs padding.
        *value = openssl::base64::encode_block(b"1234").trim_end_matches('=').into();
    };
    let number = |value: &mut Value| *value = value.as_str().and_then(|text| text.parse::<u64>().ok()).into();
    let more = |value: &mut Value| value["more"] = 1.into();
    let space = |value: &mut Value| *value = format!("{} ", value.as_str().unwrap_or_default()).into();
    type Change<'a> = &'a dyn Fn(&mut Value);
    let entry = "/verificationMaterial/tlogEntries/0";
    let mut names = Vec::new();
    for (bundle, pointer, change, expected) in [
        (
            &v1,
            "/verificationMaterial/tlogEntries",
            &twice as Change<'_>,
            "2 transparency log entries instead of one",
        ),
        (
            &v2,
            "/verificationMaterial/timestampVerificationData/rfc3161Timestamps",
            &twice,
            "2 copies of a time stamp instead of one",
        ),
        (&v1, &format!("{entry}/logIndex"), &number, "expected a whole number in quotes"),
        (&v1, &format!("{entry}/integratedTime"), &number, "expected a whole number in quotes"),
        (&v1, &format!("{entry}/inclusionProof/treeSize"), &number, "expected a whole number in quotes"),
        (&v1, &format!("{entry}/inclusionProof/hashes/0"), &unpadded, "expected base64"),
        (&v1, &format!("{entry}/logId/keyId"), &unpadded, "expected base64"),
        (&v1, entry, &more, "unknown field `more`"),
        (&v1, &format!("{entry}/inclusionProof"), &more, "unknown field `more`"),
        (&v1, &format!("{entry}/inclusionProof/checkpoint"), &more, "unknown field `more`"),
        (&v1, &format!("{entry}/inclusionProof/checkpoint/envelope"), &space, "expected a signed note"),
    ] {
        let mut bundle = bundle.clone();
        change(bundle.pointer_mut(pointer).with_context(|| pointer.to_owned())?);
        let name = format!("form-{}.sig", names.len());
        world.write(&name, bundle.to_string())?;
        let arguments = VERIFY.map(|argument| if argument == "k.sig" { name.as_str() } else { argument });
        world.omsign_refuses(1, &arguments, &[expected]).with_context(|| pointer.to_owned())?;
        names.push(name);
    }
    Ok(())
}

/// One bit of what base64 stands for, or one character where it is not base64.
fn flipped(text: &str, random: &mut Random) -> String {
    match openssl::base64::decode_block(text) {
        Ok(mut bytes) if text.len() > 20 && !text.contains('\n') => {
            let position = random.below(bytes.len());
            bytes[position] ^= 1 << random.below(8);
            openssl::base64::encode_block(&bytes)
        }
        _ => {
            let mut characters: Vec<char> = text.chars().collect();
            let position = random.below(characters.len());
            characters[position] = if characters[position] == '7' { '8' } else { '7' };
            characters.into_iter().collect()
        }
    }
}
