//! The sigstore method: a private instance in miniature, judged by us and by sigstore-python.

use anyhow::{Context as _, ensure};
use omsign_tests::keyless::{IDENTITY, PROVIDER, VERIFY, instance, sigstore_python};
use omsign_tests::sigstore::Flaw;
use omsign_tests::world::World;
use serde_json::{Value, json};

#[test]
fn a_private_instance() -> anyhow::Result<()> {
    let world = World::new()?;
    let (sigstore, payload) = instance(&world)?;
    world.write("v1.sig", sigstore.sign(&payload, IDENTITY, PROVIDER, Flaw::None)?.to_string())?;
    world.write("v2.sig", sigstore.sign_v2(&payload, IDENTITY, PROVIDER, Flaw::None)?.to_string())?;
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
                "hint: `omsign verify MODEL --identity",
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
    // Rekor v2: the checkpoint of another log, an entry about something else, a stamp from before the certificate, and one
    // of something else.
    for (flaw, expected) in [
        (Flaw::NoSct, "has no valid signed certificate timestamp (RFC 6962, 3.2)"),
        (Flaw::OtherLog, "the transparency log does not prove the signature (OMS 8.2: Rekor)"),
        (Flaw::OtherEntry, "artifact hash mismatch for hashedrekord entry"),
        (Flaw::Late, "the Fulcio certificate is not accepted (OMS 8.2)"),
        (Flaw::OtherStamp, "no trusted time stamp proves when the signature was made (OMS 8.2)"),
    ] {
        let bundle = sigstore.sign_v2(&payload, IDENTITY, PROVIDER, flaw)?;
        world.write("k.sig", bundle.to_string())?;
        let theirs = sigstore_python(&world, &["k.sig".into()])?;
        ensure!(theirs[0].starts_with("refused"), "{theirs:?}");
        world.omsign_refuses(1, &VERIFY, &[expected])?;
    }
    // When it was signed is proven by the log's promise, or by a time stamp, whatever the log claims beside it.
    let mut bundle = sigstore.sign(&payload, IDENTITY, PROVIDER, Flaw::None)?;
    sigstore.stamp(&mut bundle)?;
    let entry = bundle["verificationMaterial"]["tlogEntries"][0].as_object_mut().context("an entry")?;
    entry.remove("inclusionPromise");
    entry.insert("integratedTime".into(), "4000000000".into());
    world.write("k.sig", bundle.to_string())?;
    ensure!(sigstore_python(&world, &["k.sig".into()])? == ["accepted"]);
    let said = world.omsign_ok(&VERIFY)?;
    ensure!(said.contains(", or before (RFC 3161 time stamp)"), "{said}");
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

/// One form only, and each proof once: what sigstore-python does not take we do not take, whatever it would prove.
#[test]
fn the_form_of_what_a_log_proves() -> anyhow::Result<()> {
    let world = World::new()?;
    let (sigstore, payload) = instance(&world)?;
    let v1 = sigstore.sign(&payload, IDENTITY, PROVIDER, Flaw::None)?;
    let v2 = sigstore.sign_v2(&payload, IDENTITY, PROVIDER, Flaw::None)?;
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

/// A log or an authority counts as long as the trusted root says so: what it proved before stays proven.
#[test]
fn a_trusted_root_that_ended() -> anyhow::Result<()> {
    let world = World::new()?;
    let (sigstore, payload) = instance(&world)?;
    world.write("v1.sig", sigstore.sign(&payload, IDENTITY, PROVIDER, Flaw::None)?.to_string())?;
    world.write("v2.sig", sigstore.sign_v2(&payload, IDENTITY, PROVIDER, Flaw::None)?.to_string())?;
    for (bundle, period, expected) in [
        ("v1.sig", "/tlogs/0/publicKey/validFor", "the transparency log does not prove the signature"),
        ("v1.sig", "/ctlogs/0/publicKey/validFor", "has no valid signed certificate timestamp"),
        ("v1.sig", "/certificateAuthorities/0/validFor", "the Fulcio certificate is not accepted"),
        ("v2.sig", "/timestampAuthorities/0/validFor", "no trusted time stamp proves when"),
    ] {
        std::fs::copy(world.path(bundle), world.path("k.sig"))?;
        for (end, fine) in [("2021-01-01T00:00:00Z", false), ("2049-01-01T00:00:00Z", true)] {
            let mut root = sigstore.trusted_root()?;
            root.pointer_mut(period).context("there")?["end"] = end.into();
            world.write("root.json", root.to_string())?;
            let theirs = sigstore_python(&world, &["k.sig".into()])?;
            if fine {
                ensure!(theirs == ["accepted"], "{theirs:?}");
                world.omsign_ok(&VERIFY)?;
            } else {
                // sigstore-python goes by the end of an authority's time only where it stamps.
                world.omsign_refuses(1, &VERIFY, &[expected])?;
            }
        }
    }
    Ok(())
}
