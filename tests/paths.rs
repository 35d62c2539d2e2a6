//! Which certificates lead to a trusted one, by time stamps too: a PKI that also does what none should.

use std::fs;

use anyhow::{Context as _, ensure};
use omsign_tests::forge;
use omsign_tests::pki::{CA, Certificate, P256, Pki, SIGNER, TSA};
use omsign_tests::world::World;
use openssl::base64::encode_block;
use serde_json::{Value, json};

const FILES: [(&str, &str); 1] = [("weights.bin", "some weights")];

fn world() -> anyhow::Result<World> {
    let world = World::new()?;
    world.write("model/weights.bin", FILES[0].1)?;
    Ok(world)
}

/// A bundle by `NAME.key` with this chain, in `c.sig`; with time stamps.
fn sign(world: &World, name: &str, chain: &[&str], stamps: &[Vec<u8>]) -> anyhow::Result<Vec<u8>> {
    let payload = serde_json::to_vec(&forge::statement(&FILES))?;
    let signature = forge::sign(&forge::private_key(&world.path(&format!("{name}.key")))?, &payload)?;
    let chain = Pki::new(world).bundle("chain.pem", chain)?;
    write(world, &forge::chain_material(&chain)?, &payload, &signature, stamps)?;
    Ok(signature)
}

fn write(
    world: &World,
    material: &Value,
    payload: &[u8],
    signature: &[u8],
    stamps: &[Vec<u8>],
) -> anyhow::Result<()> {
    let mut material = material.clone();
    let stamps: Vec<_> =
        stamps.iter().map(|stamp| json!({ "signedTimestamp": encode_block(stamp) })).collect();
    if !stamps.is_empty() {
        material["timestampVerificationData"] = json!({ "rfc3161Timestamps": stamps });
    }
    world.write("c.sig", forge::bundle(&material, payload, signature).to_string()).map(drop)
}

fn with(extensions: &str) -> Certificate<'_> {
    Certificate { extensions, ..Certificate::default() }
}

const VERIFY: [&str; 6] = ["verify", "certificate", "model", "--signature", "c.sig", "--certificate-chain"];

fn verify<'a>(more: &[&'a str]) -> Vec<&'a str> {
    [&VERIFY[..], more].concat()
}

#[test]
fn algorithms_of_signers_and_authorities() -> anyhow::Result<()> {
    let world = world()?;
    let pki = Pki::new(&world);
    let rsa = "RSA -pkeyopt rsa_keygen_bits:2048";
    let root = |name: &str, key| {
        pki.issue(name, name, Certificate { key, extensions: CA, ..Certificate::default() })
    };
    root("ec", "EC -pkeyopt ec_paramgen_curve:P-384")?;
    root("rsa", rsa)?;
    root("ed", "ED25519")?;
    for (issuer, options) in [
        ("ec", "-md sha384"),
        ("rsa", "-md sha256"),
        ("rsa", "-md sha256 -sigopt rsa_padding_mode:pss -sigopt rsa_pss_saltlen:digest"),
        ("ed", "-md null"),
    ] {
        for key in [P256, "EC -pkeyopt ec_paramgen_curve:P-384", "EC -pkeyopt ec_paramgen_curve:P-521", rsa] {
            pki.issue("k", issuer, Certificate { key, issuer_options: options, ..Certificate::default() })?;
            sign(&world, "k", &["k"], &[])?;
            world
                .omsign_ok(&verify(&[&format!("{issuer}.pem")]))
                .with_context(|| format!("{issuer} {options} {key}"))?;
        }
    }
    Ok(())
}

#[test]
fn paths_that_are_broken() -> anyhow::Result<()> {
    let world = world()?;
    let pki = Pki::new(&world);
    pki.root("root")?;
    pki.root("other")?;
    let ca = Certificate { extensions: CA, ..Certificate::default() };
    pki.issue("issuing", "root", ca)?;
    pki.issue("good", "issuing", Certificate::default())?;
    sign(&world, "good", &["good", "issuing"], &[])?;
    let said = world.omsign_ok(&verify(&["root.pem"]))?;
    for part in [
        "signed by the certificate CN=good\n",
        "not checked  validity when it was signed, revocation (CRL)\n",
        "certificate  sha256:",
    ] {
        ensure!(said.contains(part), "{said}");
    }
    // An anchor may be anywhere on the way, the signer's own certificate included, and the root may come along.
    world.omsign_ok(&verify(&["issuing.pem"]))?;
    world.omsign_ok(&verify(&["good.pem"]))?;
    sign(&world, "good", &["good", "issuing", "root"], &[])?;
    world.omsign_ok(&verify(&["root.pem"]))?;

    // By whom, for which keys, when.
    let refuse = |name: &str, chain: &[&str], anchor: &str, expected: &str| -> anyhow::Result<()> {
        sign(&world, name, chain, &[])?;
        world.omsign_refuses(1, &verify(&[anchor]), &[expected]).with_context(|| name.to_owned())
    };
    refuse("good", &["good", "issuing"], "other.pem", "was not issued by a trusted certificate")?;
    refuse("good", &["good"], "root.pem", "was not issued by a trusted certificate")?;
    pki.issue("old", "issuing", Certificate { until: "20240101000000Z", ..Certificate::default() })?;
    refuse("old", &["old", "issuing"], "root.pem", "CN=old expired on Jan  1 00:00:00 2024 GMT, before 20")?;
    pki.issue("young", "issuing", Certificate { from: "20480101000000Z", ..Certificate::default() })?;
    refuse(
        "young",
        &["young", "issuing"],
        "root.pem",
        "CN=young is valid from Jan  1 00:00:00 2048 GMT only",
    )?;
    let expired_ca = Certificate { until: "20240101000000Z", ..ca };
    pki.issue("old-ca", "root", expired_ca)?;
    pki.issue("k", "old-ca", Certificate::default())?;
    refuse("k", &["k", "old-ca"], "root.pem", "CN=old-ca expired on")?;

    // Usage of the signer's key.
    let basic = "basicConstraints = critical, CA:FALSE\n";
    for (extensions, expected) in [
        (
            "keyUsage = critical, keyAgreement\nextendedKeyUsage = codeSigning\n",
            "KeyUsage has no digitalSignature (OMS 8.2)",
        ),
        (
            "keyUsage = digitalSignature\nextendedKeyUsage = serverAuth\n",
            "ExtendedKeyUsage has no codeSigning (OMS 8.2)",
        ),
        (
            "keyUsage = digitalSignature\nextendedKeyUsage = emailProtection, clientAuth\n",
            "has no codeSigning",
        ),
    ] {
        pki.issue("k", "root", with(&format!("{basic}{extensions}")))?;
        refuse("k", &["k"], "root.pem", expected)?;
    }
    for extensions in
        ["", "extendedKeyUsage = anyExtendedKeyUsage\n", "extendedKeyUsage = codeSigning, serverAuth\n"]
    {
        pki.issue("k", "root", with(&format!("{basic}{extensions}")))?;
        sign(&world, "k", &["k"], &[])?;
        world.omsign_ok(&verify(&["root.pem"])).context(extensions)?;
    }

    // Issuers that may not issue.
    for (name, extensions, expected) in [
        ("no-ca", "basicConstraints = critical, CA:FALSE\nkeyUsage = keyCertSign\n", "CN=no-ca is not a CA"),
        ("no-sign", "basicConstraints = critical, CA:TRUE\nkeyUsage = critical, cRLSign\n", "CN=no-sign"),
    ] {
        pki.issue(name, "root", with(extensions))?;
        pki.issue("k", name, Certificate::default())?;
        refuse("k", &["k", name], "root.pem", expected)?;
    }
    let narrow = "basicConstraints = critical, CA:TRUE, pathlen:0\nkeyUsage = critical, keyCertSign\n";
    pki.issue("narrow", "root", with(narrow))?;
    pki.issue("below", "narrow", ca)?;
    pki.issue("k", "below", Certificate::default())?;
    refuse("k", &["k", "below", "narrow"], "root.pem", "longer than a CA of it allows")?;
    pki.issue("k", "narrow", Certificate::default())?;
    sign(&world, "k", &["k", "narrow"], &[])?;
    world.omsign_ok(&verify(&["root.pem"]))?;

    // Names that an issuer may not certify.
    let constrained = format!("{CA}nameConstraints = critical, permitted;email:acme.com\n");
    pki.issue("constrained", "root", with(&constrained))?;
    for (address, fine) in [("release@acme.com", true), ("release@evil.com", false)] {
        pki.issue("k", "constrained", with(&format!("{SIGNER}subjectAltName = email:{address}\n")))?;
        if fine {
            sign(&world, "k", &["k", "constrained"], &[])?;
            world.omsign_ok(&verify(&["root.pem"]))?;
        } else {
            refuse("k", &["k", "constrained"], "root.pem", "has a name that its issuers may not certify")?;
        }
    }
    pki.issue("k", "root", with(&format!("{SIGNER}1.2.3.4 = critical, ASN1:UTF8String:x\n")))?;
    refuse("k", &["k"], "root.pem", "critical extension that is not understood")?;
    pki.issue("k", "root", with(&format!("{SIGNER}1.2.3.4 = ASN1:UTF8String:x\n")))?;
    sign(&world, "k", &["k"], &[])?;
    world.omsign_ok(&verify(&["root.pem"]))?;

    // Weak links.
    pki.issue("k", "root", Certificate { issuer_options: "-md sha1", ..Certificate::default() })?;
    refuse("k", &["k"], "root.pem", "less than 112 bits of security")?;
    let weak = "RSA -pkeyopt rsa_keygen_bits:1024";
    pki.issue("k", "root", Certificate { key: weak, ..Certificate::default() })?;
    refuse("k", &["k"], "root.pem", "the signing certificate: the key is an RSA key of 1024 bits")?;
    pki.issue("weak-ca", "root", Certificate { key: weak, ..ca })?;
    pki.issue("k", "weak-ca", Certificate::default())?;
    refuse("k", &["k", "weak-ca"], "root.pem", "CN=weak-ca has a key or a signature")?;
    pki.issue(
        "k",
        "root",
        Certificate { key: "EC -pkeyopt ec_paramgen_curve:secp256k1", ..Certificate::default() },
    )?;
    refuse("k", &["k"], "root.pem", "the key is on the curve secp256k1")?;

    // Forged: the issuer's name, but not its key.
    fs::rename(world.path("root.pem"), world.path("real-root.pem"))?;
    pki.root("root")?;
    pki.issue("k", "root", Certificate::default())?;
    sign(&world, "k", &["k", "root"], &[])?;
    world.omsign_refuses(1, &verify(&["real-root.pem"]), &["error: the signing certificate is not trusted"])
}

#[test]
fn a_certificate_can_be_pinned() -> anyhow::Result<()> {
    let world = world()?;
    let pki = Pki::new(&world);
    pki.root("root")?;
    let names = format!(
        "{SIGNER}subjectAltName = email:release@acme.com, URI:spiffe://acme/release, DNS:hsm.acme.com\n"
    );
    pki.issue("k", "root", Certificate { extensions: &names, ..Certificate::default() })?;
    sign(&world, "k", &["k"], &[])?;
    let json: Value = serde_json::from_str(&world.omsign_ok(&verify(&["root.pem", "--json"]))?)?;
    let fingerprint = json["certificate_fingerprint"].as_str().context("a fingerprint")?.to_owned();
    let colons = fingerprint.trim_start_matches("sha256:").to_uppercase();
    let colons: Vec<_> =
        colons.as_bytes().chunks(2).map(|pair| String::from_utf8_lossy(pair).into_owned()).collect();
    let colons = colons.join(":");
    for identity in
        ["CN=k", "release@acme.com", "spiffe://acme/release", "hsm.acme.com", &fingerprint, &colons]
    {
        world
            .omsign_ok(&verify(&["root.pem", "--certificate-identity", identity]))
            .context(identity.to_owned())?;
    }
    let other = "0".repeat(64);
    for identity in ["k", "CN=other", "acme.com", "*", &other] {
        let expected =
            format!("signed by CN=k ({fingerprint}), not by {identity} (OMS 8.2: certificate identity)");
        world.omsign_refuses(1, &verify(&["root.pem", "--certificate-identity", identity]), &[&expected])?;
    }
    let said = world.omsign(&verify(&["root.pem", "--log-fingerprints"]))?;
    ensure!(String::from_utf8_lossy(&said.stderr).contains(&format!("certificate CN=k: {fingerprint}")));
    Ok(())
}

#[test]
fn revoked_certificates() -> anyhow::Result<()> {
    let world = world()?;
    let pki = Pki::new(&world);
    pki.root("root")?;
    pki.issue("issuing", "root", Certificate { extensions: CA, ..Certificate::default() })?;
    pki.issue("k", "issuing", Certificate::default())?;
    pki.issue("bad", "issuing", Certificate::default())?;
    pki.revoke("issuing", "bad")?;
    pki.crl("root", "")?;
    pki.crl("issuing", "")?;
    let both = ["root.pem", "--crl", "root.crl", "--crl", "issuing.crl"];
    sign(&world, "k", &["k", "issuing"], &[])?;
    let said = world.omsign_ok(&verify(&both))?;
    ensure!(said.contains("certificates now, revocation (CRL)\n"), "{said}");
    // One file may hold all.
    let all = ["root.crl", "issuing.crl"].map(|name| fs::read_to_string(world.path(name)));
    let [root, issuing] = all;
    world.write("all.crl", root? + &issuing?)?;
    world.omsign_ok(&verify(&["root.pem", "--crl", "all.crl"]))?;
    // A certificate whose issuer says nothing is not known to be good.
    world.omsign_refuses(
        1,
        &verify(&["root.pem", "--crl", "root.crl"]),
        &["no CRL tells whether CN=k was revoked"],
    )?;
    sign(&world, "bad", &["bad", "issuing"], &[])?;
    world.omsign_refuses(1, &verify(&both), &["CN=bad was revoked by its issuer (RFC 5280, 6.3)"])?;
    pki.revoke("root", "issuing")?;
    pki.crl("root", "")?;
    sign(&world, "k", &["k", "issuing"], &[])?;
    world.omsign_refuses(1, &verify(&both), &["CN=issuing was revoked"])?;
    // A list of another CA, one that is over, and none.
    pki.root("other")?;
    pki.crl("other", "")?;
    world.omsign_refuses(1, &verify(&["root.pem", "--crl", "other.crl"]), &["no CRL tells whether"])?;
    pki.crl("root", "-crl_lastupdate 20200101000000Z -crl_nextupdate 20200201000000Z")?;
    world.omsign_refuses(
        2,
        &verify(&both),
        &["the CRL of CN=root is not of now", "hint: fetch the CRL anew"],
    )?;
    world.omsign_refuses(
        2,
        &verify(&["root.pem", "--crl", "root.pem"]),
        &["root.pem does not hold a CRL in PEM"],
    )
}

/// A signature made while the certificate was valid stays good, where somebody trusted saw it then.
#[test]
fn time_stamps() -> anyhow::Result<()> {
    let world = world()?;
    let mut pki = Pki::new(&world);
    pki.root("root")?;
    pki.issue("old", "root", Certificate { until: "20240101000000Z", ..Certificate::default() })?;
    let rsa = "RSA -pkeyopt rsa_keygen_bits:2048";
    let tsa = Certificate { extensions: TSA, ..Certificate::default() };
    for (name, key) in [("tsa-ec", P256), ("tsa-rsa", rsa)] {
        let root = format!("{name}-root");
        pki.issue(&root, &root, Certificate { key, extensions: CA, ..Certificate::default() })?;
        pki.issue(name, &root, Certificate { key, ..tsa })?;
    }
    let signature = sign(&world, "old", &["old"], &[])?;
    let payload = serde_json::to_vec(&forge::statement(&FILES))?;
    let chain = forge::chain_material(&world.path("chain.pem"))?;
    let stamped = |stamps: &[Vec<u8>]| write(&world, &chain, &payload, &signature, stamps);
    let then = Some("2023-06-01 12:00:00");
    let trusting = |root: &'static str| verify(&["root.pem", "--timestamp-root", root]);

    world.omsign_refuses(
        1,
        &verify(&["root.pem"]),
        &["CN=old expired", "hint: a time stamp in the bundle proves"],
    )?;
    for (name, root, options, digits) in [
        ("tsa-ec", "tsa-ec-root.pem", "-sha256 -cert", 0),
        ("tsa-rsa", "tsa-rsa-root.pem", "-sha384 -cert", 3),
        ("tsa-ec", "tsa-ec.pem", "-sha512", 6),
    ] {
        pki.fraction_digits = digits;
        stamped(&[pki.stamp(name, &signature, then, options)?])?;
        let said = world.omsign_ok(&trusting(root)).with_context(|| format!("{name} {options}"))?;
        ensure!(said.contains("signed at    2023-06-01T12:00:0"), "{said}");
        ensure!(said.contains("validity when it was signed") && !said.contains("certificates now"), "{said}");
    }
    pki.fraction_digits = 0;

    // A stamp that nobody was told to trust does not help.
    let good = pki.stamp("tsa-ec", &signature, then, "-sha256 -cert")?;
    stamped(std::slice::from_ref(&good))?;
    world.omsign_refuses(1, &verify(&["root.pem"]), &["CN=old expired"])?;
    let refuse = |stamps: &[Vec<u8>], root: &'static str, expected: &str| -> anyhow::Result<()> {
        stamped(stamps)?;
        world.omsign_refuses(1, &trusting(root), &[expected])
    };
    refuse(
        std::slice::from_ref(&good),
        "tsa-rsa-root.pem",
        "the time stamp's authority is not trusted: CN=tsa-ec",
    )?;
    refuse(&[], "tsa-ec-root.pem", "CN=old expired")?;
    // Each stamp has to be right, and the certificate valid at each.
    let late = pki.stamp("tsa-ec", &signature, Some("2024-06-01 12:00:00"), "-sha256 -cert")?;
    refuse(
        &[good.clone(), late],
        "tsa-ec-root.pem",
        "CN=old expired on Jan  1 00:00:00 2024 GMT, before 2024-06-01",
    )?;
    let early = pki.stamp("tsa-ec", &signature, Some("2019-06-01 12:00:00"), "-sha256 -cert")?;
    refuse(&[early], "tsa-ec-root.pem", "error: ")?;
    let other = pki.stamp("tsa-ec", b"another signature", then, "-sha256 -cert")?;
    refuse(
        &[other],
        "tsa-ec-root.pem",
        "the time stamp is of another signature (RFC 3161, 2.4.2: messageImprint)",
    )?;
    let weak = pki.stamp("tsa-ec", &signature, then, "-sha1 -cert")?;
    refuse(&[weak], "tsa-ec-root.pem", "the time stamp's hash is 1.3.14.3.2.26")?;
    let no_certificate = pki.stamp("tsa-ec", &signature, then, "-sha256")?;
    refuse(
        &[no_certificate],
        "tsa-ec-root.pem",
        "the certificate of the time stamp's signer is not at hand",
    )?;
    // A stamp from tomorrow. Nor is anybody an authority whose certificate does not say so, or is over.
    let future = pki.stamp("tsa-ec", &signature, Some("2047-01-01 12:00:00"), "-sha256 -cert")?;
    refuse(&[future], "tsa-ec-root.pem", "which is yet to come")?;
    let over = pki.stamp("tsa-old", &signature, then, "-sha256 -cert");
    ensure!(over.is_err(), "there is no such authority yet");
    pki.issue("tsa-old", "tsa-ec-root", Certificate { until: "20230101000000Z", ..tsa })?;
    let over = pki.stamp("tsa-old", &signature, then, "-sha256 -cert")?;
    refuse(&[over], "tsa-ec-root.pem", "CN=tsa-old expired on Jan  1 00:00:00 2023 GMT, before 2023-06-01")?;
    refuse(
        &[b"\x30\x03\x02\x01\x00".to_vec()],
        "tsa-ec-root.pem",
        "the time stamp is malformed (RFC 3161, 2.4.2)",
    )?;
    refuse(&[b"\x30\x05\x30\x03\x02\x01\x02".to_vec()], "tsa-ec-root.pem", "the time stamp is malformed")?;

    // Every bit of a token that is signed, or proves, counts.
    let mut random = omsign_tests::random::Random(2026);
    let mut accepted = 0;
    for _ in 0..300 {
        let mut flipped = good.clone();
        let position = random.below(flipped.len());
        flipped[position] ^= 1 << random.below(8);
        stamped(&[flipped])?;
        let output = world.omsign(&trusting("tsa-ec-root.pem"))?;
        ensure!(!String::from_utf8_lossy(&output.stderr).contains("panicked"), "{output:?}");
        match output.status.code() {
            // The response's status (granted, or granted with changes) and versions are outside of what is signed.
            Some(0) => accepted += 1,
            Some(1) => {}
            _ => anyhow::bail!("{output:?}"),
        }
    }
    ensure!(accepted <= 4, "{accepted} of 300 flips made no difference");

    // The same in bundles of the key method, whose keys do not expire: it says when.
    let key = forge::private_key(&world.path("old.key"))?;
    world.write("old.pub", key.public_key_to_pem()?)?;
    write(&world, &forge::key_material(&key)?, &payload, &signature, std::slice::from_ref(&good))?;
    let by_key = ["verify", "key", "model", "--signature", "c.sig", "--public-key", "old.pub"];
    let said = world.omsign_ok(&by_key)?;
    ensure!(said.contains("time stamps in the bundle (no --timestamp-root)"), "{said}");
    let said = world.omsign_ok(&[&by_key[..], &["--timestamp-root", "tsa-ec-root.pem"]].concat())?;
    ensure!(said.contains("signed at    2023-06-01T12:00:0"), "{said}");
    world.omsign_refuses(
        1,
        &[&by_key[..], &["--timestamp-root", "root.pem"]].concat(),
        &["authority is not trusted"],
    )
}

/// Nothing is signed with a chain that nobody could verify.
#[test]
fn chains_are_checked_before_they_are_signed_with() -> anyhow::Result<()> {
    let world = world()?;
    let pki = Pki::new(&world);
    pki.root("root")?;
    let ca = Certificate { extensions: CA, ..Certificate::default() };
    pki.issue("issuing", "root", ca)?;
    pki.issue("k", "issuing", Certificate::default())?;
    pki.issue("other", "issuing", Certificate::default())?;
    pki.issue("old", "issuing", Certificate { until: "20240101000000Z", ..Certificate::default() })?;
    pki.issue("old-ca", "root", Certificate { until: "20240101000000Z", ..ca })?;
    pki.issue("below-old", "old-ca", Certificate::default())?;
    pki.issue("no-ca", "issuing", Certificate::default())?;
    pki.issue("below-no-ca", "no-ca", Certificate::default())?;
    for (key, chain, expected) in [
        (
            "other",
            &["k", "issuing"][..],
            "the signing certificate is for another key than the one that signs",
        ),
        ("k", &["issuing", "k"], "the signing certificate is for another key"),
        (
            "k",
            &["k", "root", "issuing"],
            "the chain is not in order: CN=k was not issued by CN=root, which comes next",
        ),
        ("k", &["k", "other"], "the chain is not in order"),
        ("old", &["old", "issuing"], "CN=old expired on Jan  1 00:00:00 2024 GMT"),
        ("below-old", &["below-old", "old-ca", "root"], "CN=old-ca expired on"),
        ("below-no-ca", &["below-no-ca", "no-ca", "issuing"], "CN=no-ca is not a CA"),
    ] {
        pki.bundle("chain.pem", chain)?;
        let private = format!("{key}.key");
        let sign = ["sign", "model", "--private-key", &private, "--certificate-chain", "chain.pem"];
        world.omsign_refuses(2, &sign, &[expected]).with_context(|| format!("{chain:?}"))?;
    }
    pki.bundle("chain.pem", &["k", "issuing"])?;
    world.omsign_ok(&["sign", "model", "--private-key", "k.key", "--certificate-chain", "chain.pem"])?;
    world.omsign_ok(&["verify", "model", "--certificate-chain", "root.pem"]).map(drop)
}
