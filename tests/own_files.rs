//! What it writes and reads itself: not where that would make the signature wrong, and known before anything is hashed.

use std::ffi::OsStr;
use std::fs;
use std::os::unix::ffi::OsStrExt as _;

use anyhow::ensure;
use omsign_tests::certified;
use omsign_tests::hashed::{run, shell, world};
use omsign_tests::world::World;

/// Runs a script that has to fail with this status, and say this.
fn fails(world: &World, script: &str, status: i32, expected: &str) -> anyhow::Result<()> {
    let output = run(world, script)?;
    let all = String::from_utf8([output.stdout, output.stderr].concat())?;
    ensure!(output.status.code() == Some(status) && all.contains(expected), "{script}: {all}");
    Ok(())
}

#[test]
fn its_own_output_is_no_part_of_the_model() -> anyhow::Result<()> {
    let world = world()?;
    let sign = "omsign sign model --private-key k.pem";
    fails(&world, &format!("{sign} 2>&1 >model/log"), 2, "standard output is a file of the model")?;
    fails(
        &world,
        &format!("{sign} --progress plain 2>model/log || {{ cat model/log; exit 2; }}"),
        2,
        "standard error is a file",
    )?;
    fails(&world, "omsign digest model 2>&1 >model/log", 2, "standard output is a file of the model")?;
    ensure!(!world.path("model.sig").exists());
    shell(&world, &format!("{sign} --ignore-paths model/log >model/log"))?;
    shell(&world, "omsign verify model --public-key k.pub").map(drop)
}

#[test]
fn a_bundle_does_not_take_the_place_of_what_it_is_of() -> anyhow::Result<()> {
    let world = world()?;
    shell(&world, "omsign sign model --private-key k.pem")?;
    let before = fs::read(world.path("model.sig"))?;
    fails(&world, "omsign sign model.sig --private-key k.pem 2>&1", 2, "its name is the model's own")?;
    ensure!(fs::read(world.path("model.sig"))? == before);
    // Of another bundle there may be one.
    shell(&world, "omsign sign model.sig --private-key k.pem --signature other.sig").map(drop)
}

/// Before anything is hashed, or anybody has to touch anything.
#[test]
fn a_bundle_that_cannot_be_written() -> anyhow::Result<()> {
    ensure!(rustix::process::geteuid().is_root(), "this test becomes another user; run it as root");
    let world = world()?;
    shell(
        &world,
        "mkdir sticky closed && chmod 1777 sticky && chmod 0333 closed && chmod 0755 . && chmod -R a+rX . && chmod a+r k.pem",
    )?;
    shell(&world, "omsign sign model --private-key k.pem --signature sticky/model.sig")?;
    let nobody = "setpriv --reuid=65534 --regid=65534 --clear-groups";
    let sign = |bundle: &str| {
        format!("{nobody} omsign sign model --private-key k.pem --progress plain --signature {bundle} 2>&1")
    };
    let refused = run(&world, &sign("sticky/model.sig"))?;
    let said = String::from_utf8(refused.stdout)?;
    ensure!(refused.status.code() == Some(2) && said.contains("Operation not permitted"), "{said}");
    ensure!(!said.contains("hashed"), "it was hashed first: {said}");
    // One that does not let itself be read takes a file all the same.
    shell(&world, &sign("closed/model.sig"))?;
    shell(&world, "omsign verify model --public-key k.pub --signature closed/model.sig").map(drop)
}

#[test]
fn lists_that_no_model_has() -> anyhow::Result<()> {
    let world = world()?;
    shell(&world, "cd model && find . -type f -print0 | xargs -0 sha256sum > ../sums")?;
    let sign = "omsign sign --model-name m --private-key k.pem --manifest";
    fails(&world, &format!("{sign} sums --ignore-paths '*'"), 2, "other verifiers take for a pattern")?;
    fails(&world, &format!("{sign} - - < sums"), 2, "standard input can be read once only")?;
    fails(&world, "omsign sign model --model-name '' --private-key k.pem", 2, "a value is required")?;
    let long = format!("{}  {}\n", "0".repeat(64), "a/".repeat(4096) + "b");
    world.write("long", long)?;
    fails(&world, &format!("{sign} long"), 2, "a path of more than 4095 bytes")?;
    // Git's files are left out where nobody says otherwise, and the list has one.
    world.write("model/.gitattributes", "* text")?;
    shell(&world, "cd model && find . -type f -print0 | xargs -0 sha256sum > ../sums")?;
    fails(
        &world,
        &format!("{sign} sums"),
        2,
        "hint: git's own files are left out; make the list without it, or give --no-ignore-git-paths",
    )?;
    shell(&world, &format!("{sign} sums --no-ignore-git-paths")).map(drop)
}

/// Parts are made on machines where the model is at hand in many ways.
#[test]
fn a_digest_is_the_same_wherever_it_is_made() -> anyhow::Result<()> {
    let world = world()?;
    world.write("model/model.sig", "no bundle")?;
    let here = shell(&world, "cd model && omsign digest . --json --part 1/2 > ../1.json; omsign digest .")?;
    let there = shell(&world, "omsign digest model --json --part 2/2 > 2.json; omsign digest model")?;
    ensure!(here == there);
    // What `sign` leaves out where it writes it, `digest` leaves out there, too.
    shell(&world, "cd model/sub && omsign sign .. --private-key ../../k.pem --signature model.sig")?;
    let digest = shell(&world, "cd model/sub && omsign digest ..")?;
    let signed = shell(&world, "omsign inspect model/sub/model.sig --json")?;
    ensure!(signed.contains(digest.trim()), "{digest}: {signed}");
    fs::remove_file(world.path("model/sub/model.sig"))?;
    shell(&world, "omsign sign --manifest 1.json 2.json --private-key k.pem --signature b.sig")?;
    shell(&world, "omsign verify model --public-key k.pub --signature b.sig").map(drop)
}

/// What is left out has its name written as the name of something else is that is not UTF-8.
#[test]
fn a_name_that_stands_for_others() -> anyhow::Result<()> {
    let world = world()?;
    world.write("model/\u{fffd}/x", "left out")?;
    shell(&world, "omsign sign model --private-key k.pem --ignore-paths $(printf '\\357\\277\\275')")?;
    let verify = "omsign verify model --public-key k.pub 2>&1";
    shell(&world, verify)?;
    for byte in 0x80..=0xff_u8 {
        let path = world.path("model").join(OsStr::from_bytes(&[byte]));
        fs::write(&path, "added")?;
        fails(&world, verify, 1, "not valid UTF-8")?;
        fs::remove_file(&path)?;
    }
    shell(&world, verify).map(drop)
}

/// A model's directory may have any name, where another one is given.
#[test]
fn a_directory_whose_name_is_not_utf_8() -> anyhow::Result<()> {
    let world = world()?;
    let odd = world.path("").join(OsStr::from_bytes(b"odd\x80"));
    fs::rename(world.path("model"), &odd)?;
    fails(&world, "omsign sign odd* --private-key k.pem 2>&1", 2, "--model-name gives another")?;
    shell(
        &world,
        "omsign sign odd* --private-key k.pem --model-name m && omsign verify odd* --public-key k.pub",
    )
    .map(drop)
}

/// What is shown of a bundle is what was verified: it may be a pipe.
#[test]
fn a_bundle_is_read_once() -> anyhow::Result<()> {
    let world = certified::world()?;
    omsign_tests::pki::Pki::new(&world).root("root")?;
    omsign_tests::pki::Pki::new(&world).issue("k", "root", omsign_tests::pki::Certificate::default())?;
    certified::sign(&world, "k", &["k"])?;
    let verify = "omsign verify certificate model --certificate-chain root.pem --log-fingerprints";
    let said = shell(&world, &format!("cat c.sig | {verify} --signature /dev/stdin 2>&1"))?;
    ensure!(said.contains("certificate CN=k: ") && said.contains("verified"), "{said}");
    Ok(())
}
