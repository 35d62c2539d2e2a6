//! Which certificates lead to a trusted one: a PKI that also does what none should.

use std::fs;

use anyhow::{Context as _, ensure};
use omsign_tests::certified::{sign, verify, world};
use omsign_tests::pki::{CA, Certificate, P256, Pki, SIGNER};
use serde_json::Value;

fn with(extensions: &str) -> Certificate<'_> {
    Certificate { extensions, ..Certificate::default() }
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
            sign(&world, "k", &["k"])?;
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
    sign(&world, "good", &["good", "issuing"])?;
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
    sign(&world, "good", &["good", "issuing", "root"])?;
    world.omsign_ok(&verify(&["root.pem"]))?;

    // By whom, for which keys, when.
    let refuse = |name: &str, chain: &[&str], anchor: &str, expected: &str| -> anyhow::Result<()> {
        sign(&world, name, chain)?;
        world.omsign_refuses(1, &verify(&[anchor]), &[expected]).with_context(|| name.to_owned())
    };
    refuse("good", &["good", "issuing"], "other.pem", "was not issued by a trusted certificate")?;
    refuse("good", &["good"], "root.pem", "was not issued by a trusted certificate")?;
    pki.issue("old", "issuing", Certificate { until: "20240101000000Z", ..Certificate::default() })?;
    refuse("old", &["old", "issuing"], "root.pem", "CN=old expired on 2024-01-01T00:00:00Z, before 20")?;
    pki.issue("young", "issuing", Certificate { from: "20480101000000Z", ..Certificate::default() })?;
    refuse("young", &["young", "issuing"], "root.pem", "CN=young is valid from 2048-01-01T00:00:00Z only")?;
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
        sign(&world, "k", &["k"])?;
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
    sign(&world, "k", &["k", "narrow"])?;
    world.omsign_ok(&verify(&["root.pem"]))?;

    // An issuer for something else cannot make signers.
    let server = format!("{CA}extendedKeyUsage = serverAuth\n");
    pki.issue("server-ca", "root", with(&server))?;
    pki.issue("k", "server-ca", Certificate::default())?;
    refuse(
        "k",
        &["k", "server-ca"],
        "root.pem",
        "the extended key usage of CN=server-ca is for something else",
    )?;

    // Names that an issuer may not certify.
    let constrained = format!("{CA}nameConstraints = critical, permitted;email:acme.com\n");
    pki.issue("constrained", "root", with(&constrained))?;
    for (address, fine) in [("release@acme.com", true), ("release@evil.com", false)] {
        pki.issue("k", "constrained", with(&format!("{SIGNER}subjectAltName = email:{address}\n")))?;
        if fine {
            sign(&world, "k", &["k", "constrained"])?;
            world.omsign_ok(&verify(&["root.pem"]))?;
        } else {
            refuse("k", &["k", "constrained"], "root.pem", "has a name that its issuers may not certify")?;
        }
    }
    pki.issue("k", "root", with(&format!("{SIGNER}1.2.3.4 = critical, ASN1:UTF8String:x\n")))?;
    refuse("k", &["k"], "root.pem", "critical extension that is not understood")?;
    pki.issue("k", "root", with(&format!("{SIGNER}1.2.3.4 = ASN1:UTF8String:x\n")))?;
    sign(&world, "k", &["k"])?;
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
    sign(&world, "k", &["k", "root"])?;
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
    sign(&world, "k", &["k"])?;
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
    let empty = verify(&["root.pem", "--certificate-identity", ""]);
    world.omsign_refuses(2, &empty, &["the certificate identity is empty"])?;
    let said = world.omsign(&verify(&["root.pem", "--log-fingerprints"]))?;
    ensure!(String::from_utf8_lossy(&said.stderr).contains(&format!("certificate CN=k: {fingerprint}")));
    Ok(())
}

/// A name of one kind is not one of another: what an issuer may certify is said for each kind.
#[test]
fn a_pin_is_a_name_of_its_kind() -> anyhow::Result<()> {
    let world = world()?;
    let pki = Pki::new(&world);
    pki.root("root")?;
    for (names, identity) in [
        ("URI:release@acme.com", "release@acme.com"),
        ("DNS:release@acme.com", "release@acme.com"),
        ("DNS:CN=release", "CN=release"),
        ("URI:hsm.acme.com", "hsm.acme.com"),
        ("DNS:spiffe://acme/release", "spiffe://acme/release"),
    ] {
        let extensions = format!("{SIGNER}subjectAltName = {names}\n");
        pki.issue("k", "root", with(&extensions))?;
        sign(&world, "k", &["k"])?;
        world.omsign_ok(&verify(&["root.pem"]))?;
        let pinned = verify(&["root.pem", "--certificate-identity", identity]);
        world.omsign_refuses(1, &pinned, &["(OMS 8.2: certificate identity)"]).context(names)?;
    }
    Ok(())
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
    let for_servers =
        "basicConstraints=critical,CA:TRUE\nkeyUsage=critical,keyCertSign\nextendedKeyUsage=serverAuth\n";
    pki.issue("servers", "root", Certificate { extensions: for_servers, ..Certificate::default() })?;
    pki.issue("below-servers", "servers", Certificate::default())?;
    pki.issue("sha1-ca", "root", Certificate { issuer_options: "-md sha1", ..ca })?;
    pki.issue("below-sha1", "sha1-ca", Certificate::default())?;
    for (key, chain, expected) in [
        ("below-servers", &["below-servers", "servers"][..], "the extended key usage of CN=servers is for"),
        (
            "below-sha1",
            &["below-sha1", "sha1-ca"],
            "CN=sha1-ca has a key or a signature of less than 112 bits",
        ),
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
        ("old", &["old", "issuing"], "CN=old expired on 2024-01-01T00:00:00Z"),
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
