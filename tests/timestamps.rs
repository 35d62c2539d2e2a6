//! When a signature existed (RFC 3161): time stamps of OpenSSL's own authority, and of authorities that are none.

use anyhow::{Context as _, ensure};
use omsign_tests::certified::{sign, verify, world, write};
use omsign_tests::forge;
use omsign_tests::pki::{CA, Certificate, P256, Pki, TSA};

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
    let signature = sign(&world, "old", &["old"])?;
    let chain = forge::chain_material(&world.path("chain.pem"))?;
    let stamped = |stamps: &[Vec<u8>]| write(&world, &chain, &signature, stamps);
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
        "the time stamp's authority is not trusted (RFC 3161, 2.3): CN=tsa-ec",
    )?;
    refuse(&[], "tsa-ec-root.pem", "CN=old expired")?;
    // Each stamp has to be right, and the certificate valid at each.
    let late = pki.stamp("tsa-ec", &signature, Some("2024-06-01 12:00:00"), "-sha256 -cert")?;
    refuse(
        &[good.clone(), late],
        "tsa-ec-root.pem",
        "CN=old expired on 2024-01-01T00:00:00Z, before 2024-06-01",
    )?;
    let early = pki.stamp("tsa-ec", &signature, Some("2019-06-01 12:00:00"), "-sha256 -cert")?;
    refuse(&[early], "tsa-ec-root.pem", "CN=tsa-ec-root is valid from")?;
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
    refuse(&[over], "tsa-ec-root.pem", "CN=tsa-old expired on 2023-01-01T00:00:00Z, before 2023-06-01")?;
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
    write(&world, &forge::key_material(&key)?, &signature, std::slice::from_ref(&good))?;
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

/// A stamp is worth what its own signature is, and what its authority is.
#[test]
fn stamps_that_prove_less_than_they_say() -> anyhow::Result<()> {
    let world = world()?;
    let mut pki = Pki::new(&world);
    pki.root("root")?;
    pki.root("tsa-root")?;
    pki.issue("k", "root", Certificate { until: "20240101000000Z", ..Certificate::default() })?;
    pki.issue("tsa", "tsa-root", Certificate { extensions: TSA, ..Certificate::default() })?;
    let signature = sign(&world, "k", &["k"])?;
    let chain = forge::chain_material(&world.path("chain.pem"))?;
    let stamped = |pki: &Pki<'_>, time: &str| -> anyhow::Result<()> {
        let stamp = pki.stamp("tsa", &signature, Some(time), "-sha256 -cert")?;
        write(&world, &chain, &signature, &[stamp])
    };
    let arguments = verify(&["root.pem", "--timestamp-root", "tsa-root.pem"]);
    pki.signer_digest = "sha1";
    stamped(&pki, "2023-06-01 12:00:00")?;
    world.omsign_refuses(1, &arguments, &["signed with less than 112 bits of security"])?;
    pki.signer_digest = "sha256";
    stamped(&pki, "2023-06-01 12:00:00")?;
    world.omsign_ok(&arguments)?;
    // A clock that may be a day off, an hour before the certificate expired.
    pki.accuracy_seconds = 86_400;
    stamped(&pki, "2023-12-31 23:00:00")?;
    world.omsign_refuses(
        1,
        &arguments,
        &["CN=k expired on 2024-01-01T00:00:00Z, before 2024-01-01T23:00"],
    )?;
    stamped(&pki, "2023-06-01 12:00:00")?;
    let said = world.omsign_ok(&arguments)?;
    ensure!(said.contains("signed at    2023-06-02T12:00:0"), "{said}");
    pki.accuracy_seconds = 1;
    // An authority whose certificate was revoked proves nothing any more.
    stamped(&pki, "2023-06-01 12:00:00")?;
    pki.crl("root", "")?;
    pki.crl("tsa-root", "")?;
    let with = |lists: &[&'static str]| {
        let flags = lists.iter().flat_map(|list| ["--crl", *list]);
        arguments.iter().copied().chain(flags).collect::<Vec<_>>()
    };
    let said = world.omsign_ok(&with(&["root.crl"]))?;
    ensure!(said.contains("not checked  revocation of the time-stamp authority\n"), "{said}");
    pki.crl("tsa-root", "-crl_lastupdate 20200101000000Z -crl_nextupdate 20200201000000Z")?;
    let old = ["the CRL of CN=tsa-root is not of now", "hint: fetch the CRL anew"];
    world.omsign_refuses(2, &with(&["root.crl", "tsa-root.crl"]), &old)?;
    pki.crl("tsa-root", "")?;
    let said = world.omsign_ok(&with(&["root.crl", "tsa-root.crl"]))?;
    ensure!(!said.contains("not checked"), "{said}");
    pki.revoke("tsa-root", "tsa")?;
    pki.crl("tsa-root", "")?;
    world.omsign_refuses(1, &with(&["root.crl", "tsa-root.crl"]), &["CN=tsa was revoked"])?;
    Ok(())
}
