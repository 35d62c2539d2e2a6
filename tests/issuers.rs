//! What issuers may issue, the trusted root and those between it and the signer.

use anyhow::Context as _;
use omsign_tests::certified::{sign, verify, world};
use omsign_tests::pki::{CA, Certificate, Pki, SIGNER};

fn with(extensions: &str) -> Certificate<'_> {
    Certificate { extensions, ..Certificate::default() }
}

/// RFC 5280, 6.1.4 (k): whoever issues has to say that it is a CA.
#[test]
fn issuers_without_basic_constraints() -> anyhow::Result<()> {
    let world = world()?;
    let pki = Pki::new(&world);
    pki.root("root")?;
    for extensions in ["keyUsage = critical, keyCertSign\n", "", "nsCertType = objCA\n"] {
        pki.issue("issuing", "root", with(extensions))?;
        pki.issue("k", "issuing", Certificate::default())?;
        sign(&world, "k", &["k", "issuing"])?;
        world.omsign_refuses(1, &verify(&["root.pem"]), &["CN=issuing is not a CA"]).context(extensions)?;
    }
    Ok(())
}

/// What a trusted root says of itself binds, too.
#[test]
fn roots_with_limits() -> anyhow::Result<()> {
    let world = world()?;
    let pki = Pki::new(&world);
    let ca = with(CA);
    let constrained = format!("{CA}nameConstraints = critical, permitted;email:acme.com\n");
    let narrow = "basicConstraints = critical, CA:TRUE, pathlen:0\nkeyUsage = critical, keyCertSign\n";
    for (extensions, expected) in [
        ("basicConstraints = critical, CA:FALSE\n", "CN=root is not a CA"),
        (
            "basicConstraints = critical, CA:TRUE\nkeyUsage = critical, cRLSign\n",
            "the KeyUsage of CN=root, which issued a certificate, has no keyCertSign",
        ),
        (narrow, "longer than a CA of it allows"),
        (constrained.as_str(), "has a name that its issuers may not certify"),
        (
            &format!("{CA}extendedKeyUsage = serverAuth\n"),
            "the extended key usage of CN=root is for something else",
        ),
    ] {
        pki.issue("root", "root", with(extensions))?;
        pki.issue("issuing", "root", ca)?;
        pki.issue("k", "issuing", with(&format!("{SIGNER}subjectAltName = email:release@evil.com\n")))?;
        sign(&world, "k", &["k", "issuing"])?;
        world.omsign_refuses(1, &verify(&["root.pem"]), &[expected]).context(extensions.to_owned())?;
    }
    Ok(())
}

/// Critical extensions that OpenSSL knows and does not go by unless it is told to, and one that nobody knows.
#[test]
fn policies_and_what_is_not_understood() -> anyhow::Result<()> {
    let world = world()?;
    let pki = Pki::new(&world);
    let explicit = "policyConstraints = critical, requireExplicitPolicy:0\n";
    let asks = "an issuer of CN=k asks for explicit certificate policies";
    let (policy, another) = ("certificatePolicies = 1.2.3.4\n", "certificatePolicies = 1.2.3.5\n");
    for (root, issuing, signer, expected) in [
        ("", "", "", None),
        ("", policy, "", None),
        ("", &format!("{policy}{explicit}"), policy, Some(asks)),
        ("", &format!("{policy}{explicit}"), "", Some(asks)),
        ("", explicit, another, Some(asks)),
        (
            "",
            "1.2.3.4 = critical, ASN1:UTF8String:x\n",
            "",
            Some("critical extension that is not understood"),
        ),
        (
            "1.2.3.4 = critical, ASN1:UTF8String:x\n",
            "",
            "",
            Some("critical extension that is not understood"),
        ),
    ] {
        pki.issue("root", "root", with(&format!("{CA}{root}")))?;
        pki.issue("issuing", "root", with(&format!("{CA}{issuing}")))?;
        pki.issue("k", "issuing", with(&format!("{SIGNER}{signer}")))?;
        sign(&world, "k", &["k", "issuing"])?;
        let what = || format!("{root}{issuing}{signer}");
        match expected {
            Some(expected) => {
                world.omsign_refuses(1, &verify(&["root.pem"]), &[expected]).with_context(what)?
            }
            None => world.omsign_ok(&verify(&["root.pem"])).map(drop).with_context(what)?,
        }
    }
    Ok(())
}

/// The last certificate that is signed with has an issuer who is not in the chain: its link is as strong as the others.
#[test]
fn a_last_link_that_is_weak() -> anyhow::Result<()> {
    let world = world()?;
    let pki = Pki::new(&world);
    let rsa = "RSA -pkeyopt rsa_keygen_bits:2048";
    pki.issue("root", "root", Certificate { key: rsa, extensions: CA, ..Certificate::default() })?;
    let pss = |hash| format!("-md {hash} -sigopt rsa_padding_mode:pss -sigopt rsa_pss_saltlen:digest");
    for (options, strong) in [
        ("-md sha1".to_owned(), false),
        (pss("sha1"), false),
        (pss("sha256"), true),
        ("-md sha256".into(), true),
    ] {
        pki.issue(
            "issuing",
            "root",
            Certificate { extensions: CA, issuer_options: &options, ..Certificate::default() },
        )?;
        pki.issue("k", "issuing", Certificate::default())?;
        pki.bundle("chain.pem", &["k", "issuing"])?;
        let sign = ["sign", "model", "--private-key", "k.key", "--certificate-chain", "chain.pem"];
        if strong {
            world.omsign_ok(&sign).context(options)?;
        } else {
            world.omsign_refuses(2, &sign, &["CN=issuing has a key or a signature"]).context(options)?;
        }
    }
    Ok(())
}
