//! Certificates that were revoked (RFC 5280, 6.3), and lists that say so.

use std::fs;

use anyhow::ensure;
use omsign_tests::certified::{sign, verify, world};
use omsign_tests::pki::{CA, Certificate, Pki};
use openssl::x509::X509Crl;

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
    sign(&world, "k", &["k", "issuing"])?;
    let said = world.omsign_ok(&verify(&both))?;
    ensure!(said.contains("certificates now, revocation (CRL)\n"), "{said}");
    // One file may hold all.
    let all = ["root.crl", "issuing.crl"].map(|name| fs::read_to_string(world.path(name)));
    let [root, issuing] = all;
    world.write("all.crl", root? + &issuing?)?;
    world.omsign_ok(&verify(&["root.pem", "--crl", "all.crl"]))?;
    // But each whole, and as a list: what is passed over may be the newest.
    let pem = |name: &str| fs::read_to_string(world.path(name));
    let der = |name: &str| anyhow::Ok(X509Crl::from_pem(pem(name)?.as_bytes())?.to_der()?);
    world.write("both.der", [der("root.crl")?, der("issuing.crl")?].concat())?;
    let (root, issuing) = (pem("root.crl")?, pem("issuing.crl")?);
    world.write("cut.crl", format!("{root}{}", &issuing[..issuing.len() - 30]))?;
    world.write("other.crl", root + &issuing.replace("X509 CRL", "CRL"))?;
    for name in ["both.der", "cut.crl", "other.crl"] {
        let arguments = ["root.pem", "--crl", "root.crl", "--crl", "issuing.crl", "--crl", name];
        world.omsign_refuses(2, &verify(&arguments), &[name, "CRL"])?;
    }
    world.write("one.der", der("root.crl")?)?;
    world.omsign_ok(&verify(&["root.pem", "--crl", "one.der", "--crl", "issuing.crl"]))?;
    // A certificate whose issuer says nothing is not known to be good.
    world.omsign_refuses(
        2,
        &verify(&["root.pem", "--crl", "root.crl"]),
        &["no CRL tells whether CN=k was revoked"],
    )?;
    sign(&world, "bad", &["bad", "issuing"])?;
    world.omsign_refuses(1, &verify(&both), &["CN=bad was revoked by its issuer (RFC 5280, 6.3)"])?;
    // Trusted itself, it is revoked all the same; where its issuer is not there, nobody can tell.
    let itself = ["bad.pem", "--crl", "issuing.crl"];
    world.omsign_refuses(1, &verify(&itself), &["CN=bad was revoked by its issuer"])?;
    sign(&world, "bad", &["bad"])?;
    let unknown = ["no CRL tells whether CN=bad was revoked", "it is trusted itself, and its issuer"];
    world.omsign_refuses(2, &verify(&itself), &unknown)?;
    let said = world.omsign_ok(&verify(&["bad.pem", "--crl", "root.crl"]))?;
    ensure!(said.contains("  not checked  validity when it was signed, revocation (CRL)"), "{said}");
    pki.revoke("root", "issuing")?;
    pki.crl("root", "")?;
    sign(&world, "k", &["k", "issuing"])?;
    world.omsign_refuses(1, &verify(&both), &["CN=issuing was revoked"])?;
    // Also by whoever is told to trust the whole chain; of an intermediate alone nobody could tell.
    let chain =
        ["root.pem", "--certificate-chain", "issuing.pem", "--crl", "root.crl", "--crl", "issuing.crl"];
    world.omsign_refuses(1, &verify(&chain), &["CN=issuing was revoked"])?;
    // However long the way to it is.
    pki.issue("sub", "issuing", Certificate { extensions: CA, ..Certificate::default() })?;
    pki.issue("below", "sub", Certificate { extensions: CA, ..Certificate::default() })?;
    pki.issue("far", "below", Certificate::default())?;
    ["sub", "below"].iter().try_for_each(|issuer| pki.crl(issuer, ""))?;
    pki.crl("issuing", "")?;
    sign(&world, "far", &["far", "below", "sub", "issuing"])?;
    let far = [&chain[..], &["--crl", "sub.crl", "--crl", "below.crl"]].concat();
    world.omsign_refuses(1, &verify(&far), &["CN=issuing was revoked"])?;
    sign(&world, "k", &["k", "issuing"])?;
    let alone = ["issuing.pem", "--crl", "root.crl", "--crl", "issuing.crl"];
    world.omsign_refuses(2, &verify(&alone), &["no CRL tells whether CN=issuing was revoked"])?;
    // A list of another CA, one that is over, and none.
    pki.root("other")?;
    pki.crl("other", "")?;
    world.omsign_refuses(2, &verify(&["root.pem", "--crl", "other.crl"]), &["no CRL tells whether"])?;
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

/// What OpenSSL would take, and does not say that all is well.
#[test]
fn lists_that_prove_nothing() -> anyhow::Result<()> {
    let world = world()?;
    let pki = Pki::new(&world);
    pki.root("root")?;
    pki.issue("issuing", "root", Certificate { extensions: CA, ..Certificate::default() })?;
    pki.issue("k", "issuing", Certificate::default())?;
    sign(&world, "k", &["k", "issuing"])?;
    pki.crl("issuing", "")?;
    fs::rename(world.path("issuing.crl"), world.path("before.crl"))?;
    pki.revoke("issuing", "k")?;
    pki.crl("root", "")?;
    pki.crl("issuing", "")?;
    let with = |lists: &[&'static str]| {
        let flags = lists.iter().flat_map(|list| ["--crl", *list]);
        verify(&["root.pem", "--crl", "root.crl"].into_iter().chain(flags).collect::<Vec<_>>())
    };
    world.omsign_refuses(1, &with(&["issuing.crl"]), &["CN=k was revoked"])?;
    fs::rename(world.path("issuing.crl"), world.path("revoked.crl"))?;
    // Of two that are of now, whichever says so.
    for lists in [["revoked.crl", "before.crl"], ["before.crl", "revoked.crl"]] {
        world.omsign_refuses(1, &with(&lists), &["CN=k was revoked"])?;
    }
    world.omsign_ok(&with(&["before.crl"]))?;
    // A delta that names nobody does not take back what the complete one says.
    pki.crl_with("issuing", "2.5.29.27 = critical, DER:020101\n2.5.29.20 = DER:020102\n", "")?;
    world.omsign_refuses(
        2,
        &with(&["revoked.crl", "issuing.crl"]),
        &["but a delta CRL (RFC 5280, 5.2.4)"],
    )?;
    world.omsign_refuses(2, &with(&["issuing.crl"]), &["but a delta CRL"])?;
    // A list that is signed with a broken hash.
    pki.crl("issuing", "-md sha1")?;
    world.omsign_refuses(
        2,
        &with(&["issuing.crl"]),
        &["does not hold a CRL that is signed with SHA-256 or better"],
    )?;
    // An old one beside a new one is no harm, nor is one of somebody else.
    pki.crl("issuing", "-crl_lastupdate 20200101000000Z -crl_nextupdate 20200201000000Z")?;
    fs::rename(world.path("issuing.crl"), world.path("old.crl"))?;
    world.omsign_refuses(1, &with(&["revoked.crl", "old.crl"]), &["CN=k was revoked"])?;
    pki.root("other")?;
    pki.crl("other", "-crl_lastupdate 20200101000000Z -crl_nextupdate 20200201000000Z")?;
    world.omsign_refuses(1, &with(&["revoked.crl", "other.crl"]), &["CN=k was revoked"])?;
    // Nobody has to say of the anchor that it is not revoked, whether it is self-signed or not.
    let anchored = verify(&["issuing.pem", "--crl", "revoked.crl"]);
    world.omsign_refuses(1, &anchored, &["CN=k was revoked"])?;
    pki.issue("k", "issuing", Certificate::default())?;
    sign(&world, "k", &["k", "issuing"])?;
    let said = world.omsign_ok(&anchored)?;
    ensure!(said.contains("revocation (CRL)\n"), "{said}");
    Ok(())
}

/// Of several lists of one issuer one is enough, whatever is with the others, and in whatever order they are given.
#[test]
fn a_list_beside_one_of_another_scope() -> anyhow::Result<()> {
    let world = world()?;
    let pki = Pki::new(&world);
    pki.root("root")?;
    pki.issue("k", "root", Certificate::default())?;
    sign(&world, "k", &["k"])?;
    pki.crl("root", "")?;
    fs::rename(world.path("root.crl"), world.path("whole.crl"))?;
    // issuingDistributionPoint: onlyContainsCACerts (RFC 5280, 5.2.5).
    pki.crl_with("root", "2.5.29.28 = critical, DER:30038201ff\n", "")?;
    let with = |lists: &[&'static str]| {
        let flags = lists.iter().flat_map(|list| ["--crl", *list]);
        verify(&["root.pem"].into_iter().chain(flags).collect::<Vec<_>>())
    };
    world.omsign_refuses(2, &with(&["root.crl"]), &["no CRL tells whether CN=k was revoked", "scope"])?;
    for lists in [["whole.crl", "root.crl"], ["root.crl", "whole.crl"]] {
        world.omsign_ok(&with(&lists))?;
    }
    Ok(())
}
