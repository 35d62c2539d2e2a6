//! The trust policy: who may sign which models, once for all.

use std::fs;
use std::os::unix::ffi::OsStrExt as _;
use std::process::{Command, Output};

use anyhow::{Context as _, ensure};
use omsign_fixtures::built;
use omsign_tests::forge;
use omsign_tests::hashed;
use omsign_tests::pki::{Certificate, Pki};
use omsign_tests::sigstore::{Flaw, Sigstore};
use omsign_tests::world::World;
use serde_json::Value;

const FILES: [(&str, &str); 1] = [("weights.bin", "some weights")];

/// A world with a model, its bundle in it by `release.key`, and a public key of somebody else.
fn world() -> anyhow::Result<World> {
    let world = World::new()?;
    world.write("model/weights.bin", FILES[0].1)?;
    let pki = Pki::new(&world);
    pki.root("root")?;
    for name in ["release", "other"] {
        pki.issue(name, "root", Certificate::default())?;
        let public = forge::private_key(&world.path(&format!("{name}.key")))?.public_key_to_pem()?;
        world.write(&format!("{name}.pub"), public)?;
    }
    world.omsign_ok(&["sign", "model", "--private-key", "release.key", "--signature", "model/model.sig"])?;
    Ok(world)
}

#[test]
fn who_signed_this_and_do_i_trust_them() -> anyhow::Result<()> {
    let world = world()?;
    let verify = ["verify", "model"];
    world.omsign_refuses(
        2,
        &verify,
        &["there is no trust policy", "hint: say whose: --public-key", "omsign trust add"],
    )?;
    let added = world.omsign_ok(&["trust", "add", "somebody", "--public-key", "other.pub"])?;
    ensure!(added.contains("added somebody to ") && added.contains("/.config/omsign/trust.toml"), "{added}");
    world.omsign_refuses(
        1,
        &verify,
        &["no signer of the trust policy is who signed, by the key method; somebody: the bundle was signed with another \
           key", "hint: `omsign inspect` shows who claims to have signed"],
    )?;
    world.omsign_ok(&[
        "trust",
        "add",
        "release",
        "--public-key",
        "release.pub",
        "--models",
        "model",
        "llama-*",
    ])?;
    // The policy holds the key itself: what happens to the file later does not matter.
    fs::remove_file(world.path("release.pub"))?;
    let said = world.omsign_ok(&verify)?;
    ensure!(said.contains("accepted by  release (") && said.contains("trust.toml)"), "{said}");
    let json: Value = serde_json::from_str(&world.omsign_ok(&["verify", "model", "--json"])?)?;
    ensure!(json["accepted_by"].as_str().is_some_and(|by| by.starts_with("release (")), "{json}");

    // Of its signer's models only.
    fs::rename(world.path("model"), world.path("gpt"))?;
    world.omsign_ok(&["sign", "gpt", "--private-key", "release.key", "--signature", "gpt/model.sig"])?;
    world.omsign_refuses(
        1,
        &["verify", "gpt"],
        &["release: the signer may sign models called model or llama-*, not \"gpt\""],
    )?;
    // What it is called is what the signer says, not what the directory is called.
    fs::rename(world.path("gpt"), world.path("llama-7"))?;
    world.omsign_refuses(1, &["verify", "llama-7"], &["not \"gpt\""])?;
    world.omsign_ok(&[
        "sign",
        "llama-7",
        "--private-key",
        "release.key",
        "--signature",
        "llama-7/model.sig",
    ])?;
    world.omsign_ok(&["verify", "llama-7", "--model-name", "llama-7"])?;
    world.omsign_refuses(
        1,
        &["verify", "llama-7", "--model-name", "llama-8"],
        &["the signature is of a model called \"llama-7\", not \"llama-8\" (OMS 6.5.1)"],
    )?;

    let list = world.omsign_ok(&["trust", "list"])?;
    ensure!(
        list.contains("release   key          model llama-*  the key sha256:")
            && list.contains("somebody  key          any model  the key sha256:"),
        "{list}"
    );
    world.omsign_refuses(2, &["trust", "test", "llama-7"], &["hint: name the bundle itself"])?;
    let json: Value = serde_json::from_str(&world.omsign_ok(&["trust", "list", "--json"])?)?;
    ensure!(json["signers"][0]["terms"]["models"] == serde_json::json!(["model", "llama-*"]), "{json}");
    let test = world.omsign_ok(&["trust", "test", "llama-7/model.sig"])?;
    ensure!(
        test.contains("release: accepts it\nsomebody: does not: the bundle was signed with another key"),
        "{test}"
    );
    ensure!(world.omsign_ok(&["trust", "remove", "release"])?.contains("removed release from"));
    world.omsign_refuses(2, &["trust", "remove", "release"], &["has no signer \"release\""])?;
    world.omsign_refuses(1, &["verify", "llama-7"], &["no signer of the trust policy"])?;
    let output = world.omsign(&["trust", "test", "llama-7/model.sig", "--json"])?;
    let json: Value = serde_json::from_slice(&output.stdout)?;
    ensure!(output.status.code() == Some(1) && json["accepted"] == false, "{json}");
    ensure!(json["signers"][0]["accepts"] == false && json["signers"][0]["why_not"].is_string(), "{json}");
    Ok(())
}

#[test]
fn signers_of_all_methods() -> anyhow::Result<()> {
    let world = world()?;
    let sigstore = Sigstore::new(&world)?;
    world.write("instance.json", serde_json::to_vec(&sigstore.trusted_root()?)?)?;
    let (identity, provider) =
        ("https://github.com/acme/models/release.yml@refs/tags/v1", "https://github.example");
    let payload = serde_json::to_vec(&forge::statement(&FILES))?;
    world.write("keyless.sig", sigstore.sign(&payload, identity, provider, Flaw::None)?.to_string())?;
    fs::remove_file(world.path("model/model.sig"))?;
    let sign = ["sign", "model", "--private-key", "release.key", "--signature"];
    world.omsign_ok(&[&sign[..], &["key.sig"]].concat())?;
    world.omsign_ok(&[&sign[..], &["certificate.sig", "--certificate-chain", "release.pem"]].concat())?;
    let policy = r#"
# Relative paths are relative to this file.
[signer.key]
public_key = "../release.pub"

[signer.pki]
roots = ["../root.pem"]
certificate_identity = "CN=release"
models = ["mod*"]

[signer.ci]
identity_pattern = "https://github.com/acme/**"
identity_provider = "https://github.example"
trusted_root = "../instance.json"
"#;
    world.write("policies/trust.toml", policy)?;
    for (bundle, by) in [("key.sig", "key"), ("certificate.sig", "pki"), ("keyless.sig", "ci")] {
        let verify = ["verify", "model", "--signature", bundle, "--policy", "policies/trust.toml"];
        let said = world.omsign_ok(&verify)?;
        ensure!(said.contains(&format!("accepted by  {by} (policies/trust.toml)\n")), "{said}");
        // Without this signer nobody is left of the method.
        world.write(
            "policies/less.toml",
            policy
                .replace(&format!("[signer.{by}]"), "[signer.x]")
                .replace("acme/**", "evil/**")
                .replace("CN=release", "CN=x")
                .replace("/release.pub", "/other.pub"),
        )?;
        world.omsign_refuses(
            1,
            &["verify", "model", "--signature", bundle, "--policy", "policies/less.toml"],
            &["; x: "],
        )?;
    }
    // What is added is written so that it is read the same.
    for arguments in [
        &["--public-key", "release.pub"][..],
        &["--certificate-chain", "root.pem", "--certificate-identity", "CN=release"],
        &["--identity", identity, "--identity-provider", provider, "--trusted-root", "instance.json"],
    ] {
        let name = format!("s{}", arguments.len());
        world.omsign_ok(&[&["trust", "add", &name, "--policy", "made/trust.toml"], arguments].concat())?;
    }
    for bundle in ["key.sig", "certificate.sig", "keyless.sig"] {
        world.omsign_ok(&["verify", "model", "--signature", bundle, "--policy", "made/trust.toml"])?;
    }
    let text = fs::read_to_string(world.path("made/trust.toml"))?;
    ensure!(text.contains("-----BEGIN PUBLIC KEY-----") && text.contains("/instance.json"), "{text}");
    Ok(())
}

#[test]
fn mistakes_in_a_policy() -> anyhow::Result<()> {
    let world = world()?;
    for (policy, expected) in [
        ("[signer.a]\npublic_kye = 'x'\n", "p.toml:2: unknown field `public_kye`"),
        ("[signer.a\n", "p.toml:1: "),
        ("[signer.a]\n", "p.toml: signer.a: give exactly one of a public key, roots of certificates"),
        ("[signer.a]\npublic_key = 'release.pub'\nroots = ['root.pem']\n", "give exactly one of"),
        ("[signer.a]\npublic_key = 'nowhere.pub'\n", "signer.a: cannot read nowhere.pub: No such file"),
        ("[signer.a]\nroots = ['release.pub']\n", "release.pub does not hold a certificate in PEM"),
        ("[signer.a]\nidentity = 'x'\n", "a keyless signer needs an identity and an identity provider"),
        ("[signer.a]\nidentity_pattern = 'x['\nidentity_provider = 'y'\n", "\"x[\" is not a pattern"),
        ("[signer.a]\npublic_key = 'release.pub'\nmodels = ['{']\n", "\"{\" is not a pattern"),
        (
            "[signer.a]\npublic_key = 'release.pub'\ncrls = ['x']\n",
            "a CRL says nothing about signers of the key method",
        ),
        ("[signer.'a b']\npublic_key = 'release.pub'\n", "\"a b\" is no name for a signer"),
        ("[signers.a]\n", "unknown field `signers`"),
        ("", "there is no trust policy, and nothing else says"),
    ] {
        world.write("p.toml", policy)?;
        world.omsign_refuses(2, &["verify", "model", "--policy", "p.toml"], &[expected])?;
    }
    world.omsign_refuses(
        2,
        &["verify", "model", "--policy", "q.toml"],
        &["cannot read q.toml: No such file"],
    )?;
    // What could not be used is not added, and what is there is not touched.
    let before = "# mine\n[signer.a] # his\npublic_key = 'release.pub'\n";
    world.write("p.toml", before)?;
    let add = |arguments: &[&str], expected: &str| {
        world.omsign_refuses(2, &[&["trust", "add", "--policy", "p.toml"], arguments].concat(), &[expected])
    };
    add(&["b"], "give exactly one of")?;
    add(&["b", "--public-key", "nowhere"], "cannot read nowhere")?;
    add(&["b", "--public-key", "root.pem"], "root.pem does not hold a public key in PEM, but: CERTIFICATE")?;
    add(&["a", "--public-key", "other.pub"], "p.toml has a signer \"a\" already")?;
    add(&["b/c", "--public-key", "other.pub"], "\"b/c\" is no name for a signer")?;
    add(&["b", "--public-key", "other.pub", "--models", "["], "\"[\" is not a pattern")?;
    // A policy holds absolute paths: below such a directory there is no path that TOML can hold.
    let odd = world.path("").join(std::ffi::OsStr::from_bytes(b"\xff"));
    fs::create_dir(&odd)?;
    let pki = Pki::new(&world);
    pki.root("listed")?;
    pki.crl("listed", "")?;
    fs::copy(world.path("listed.crl"), odd.join("x.crl"))?;
    let mut below = std::process::Command::new(omsign_fixtures::built("omsign")?);
    below.args(["trust", "add", "b", "--crl", "x.crl", "--certificate-chain"]).arg(world.path("listed.pem"));
    world.without_surprises(below.arg("--policy").arg(world.path("p.toml")).current_dir(&odd));
    let refused = below.output()?;
    let errors = String::from_utf8_lossy(&refused.stderr);
    ensure!(errors.contains("signer b names a file whose path is not UTF-8"), "{errors}");
    ensure!(refused.status.code() == Some(2), "{refused:?}");
    ensure!(fs::read_to_string(world.path("p.toml"))? == before);
    world.omsign_ok(&["trust", "add", "b", "--public-key", "other.pub", "--policy", "p.toml"])?;
    let after = fs::read_to_string(world.path("p.toml"))?;
    ensure!(after.starts_with(before) && after.contains("[signer.b]\npublic_key = "), "{after}");
    world.omsign_ok(&["verify", "model", "--policy", "p.toml"]).map(drop)
}

/// Runs `omsign` in a directory of the world.
fn omsign_in(world: &World, directory: &str, arguments: &[&str]) -> anyhow::Result<Output> {
    let mut command = Command::new(built("omsign")?);
    command.args(arguments).current_dir(world.path(directory));
    world.without_surprises(&mut command);
    Ok(command.output()?)
}

/// Whoever publishes a model, or a whole directory of them, does not get to say who may sign it.
#[test]
fn a_project_has_a_say_only_where_it_was_allowed_to() -> anyhow::Result<()> {
    let world = world()?;
    let policy = "[signer.them]\npublic_key = '../../release.pub'\n";
    world.write("project/.omsign/trust.toml", policy)?;
    fs::rename(world.path("model"), world.path("project/model"))?;
    let verify = || omsign_in(&world, "project", &["verify", "model"]);
    let output = verify()?;
    ensure!(output.status.code() == Some(2), "{output:?}");
    // With a policy of one's own, too, until it is allowed.
    world.omsign_ok(&["trust", "add", "somebody", "--public-key", "other.pub"])?;
    ensure!(verify()?.status.code() == Some(1));
    ensure!(world.omsign_ok(&["trust", "allow", "project"])?.contains(".omsign/trust.toml counts in "));
    let output = verify()?;
    ensure!(output.status.success(), "{output:?}");
    ensure!(
        String::from_utf8_lossy(&output.stdout).contains("accepted by  them (.omsign/trust.toml)"),
        "{output:?}"
    );
    // From a pipe, too.
    hashed::shell(
        &world,
        "cat release.pub | omsign trust add piped --public-key /dev/stdin --policy piped.toml",
    )?;
    world.omsign_ok(&[
        "verify",
        "project/model",
        "--policy",
        "piped.toml",
        "--signature",
        "project/model/model.sig",
    ])?;
    // As it is now: whoever changes it later, or a key that it names, is asked about again.
    let changed = |output: Output| {
        let errors = String::from_utf8_lossy(&output.stderr).into_owned();
        output.status.code() == Some(2) && errors.contains("is not what it was when you allowed it")
    };
    let key = fs::read(world.path("release.pub"))?;
    fs::copy(world.path("other.pub"), world.path("release.pub"))?;
    ensure!(changed(verify()?));
    fs::write(world.path("release.pub"), key)?;
    world.write("project/.omsign/trust.toml", format!("{policy}models = ['*']\n"))?;
    ensure!(changed(verify()?));
    world.write("project/.omsign/trust.toml", policy)?;
    ensure!(verify()?.status.success());
    // One that is gone trusts nobody, and one's own goes on.
    fs::rename(world.path("project/.omsign"), world.path("project/away"))?;
    ensure!(verify()?.status.code() == Some(1));
    fs::rename(world.path("project/away"), world.path("project/.omsign"))?;
    // Where there is none, there is nothing to agree with.
    world.write("nothing/x", "")?;
    world.omsign_refuses(2, &["trust", "allow", "nothing"], &[".omsign/trust.toml: No such file"])?;
    // There only: not from elsewhere, nor in a copy.
    world.omsign_refuses(1, &["verify", "project/model"], &["no signer of the trust policy"])?;
    ensure!(
        Command::new("cp").args(["-r", "project", "copy"]).current_dir(world.path("")).status()?.success()
    );
    ensure!(omsign_in(&world, "copy", &["verify", "model"])?.status.code() == Some(1));
    // Adding to it is allowing it, but not what somebody else put there.
    let add = ["trust", "add", "we", "--public-key", "../release.pub", "--project"];
    let output = omsign_in(&world, "copy", &add)?;
    ensure!(output.status.code() == Some(2), "{output:?}");
    ensure!(
        String::from_utf8_lossy(&output.stderr).contains("is there, and you did not allow it"),
        "{output:?}"
    );
    fs::remove_file(world.path("copy/.omsign/trust.toml"))?;
    ensure!(omsign_in(&world, "copy", &add)?.status.success());
    ensure!(omsign_in(&world, "copy", &["verify", "model"])?.status.success());
    // A model cannot say who may sign it, whoever was allowed to what.
    let inside = world.path("project/model/trust.toml");
    fs::copy(world.path("project/.omsign/trust.toml"), &inside).context("copied")?;
    let output = omsign_in(&world, "project", &["verify", "model", "--policy", "model/trust.toml"])?;
    let errors = String::from_utf8_lossy(&output.stderr);
    ensure!(
        output.status.code() == Some(2) && errors.contains("lies inside the model that it is to judge"),
        "{errors}"
    );
    // Nor by a link in it to a policy elsewhere, nor with a key of its own in a policy elsewhere.
    let refused = |policy: &str| -> anyhow::Result<()> {
        let output = omsign_in(&world, "project", &["verify", "model", "--policy", policy])?;
        let errors = String::from_utf8_lossy(&output.stderr);
        let inside = errors.contains("lies inside the model that it is to judge");
        ensure!(output.status.code() == Some(2) && inside, "{errors}");
        Ok(())
    };
    fs::rename(&inside, world.path("elsewhere.toml"))?;
    std::os::unix::fs::symlink(world.path("elsewhere.toml"), &inside)?;
    refused("model/trust.toml")?;
    fs::remove_file(&inside)?;
    fs::copy(world.path("other.pub"), world.path("project/model/key.pem"))?;
    world.write("project/p.toml", "[signer.a]\npublic_key = 'model/key.pem'\n")?;
    refused("p.toml")?;
    // Nor by a link in it on the way to a key elsewhere.
    std::os::unix::fs::symlink(world.path("other.pub"), world.path("project/model/.gitignore"))?;
    std::os::unix::fs::symlink("model/.gitignore", world.path("project/via.pub"))?;
    world.write("project/p.toml", "[signer.a]\npublic_key = 'via.pub'\n")?;
    refused("p.toml")?;
    // The model is the project's directory, so that its policy lies in it.
    let here = ["verify", ".", "--signature", "model/model.sig"];
    let output = omsign_in(&world, "project", &here)?;
    let errors = String::from_utf8_lossy(&output.stderr);
    ensure!(output.status.code() == Some(2) && errors.contains("lies inside the model"), "{errors}");
    Ok(())
}

/// What is added is what was meant, whatever else is in the file; and the policy stays whose it was.
#[test]
fn nothing_else_comes_along() -> anyhow::Result<()> {
    use std::os::unix::fs::{MetadataExt as _, PermissionsExt as _};
    let world = world()?;
    let text = Command::new("openssl")
        .args(["x509", "-text", "-in", "root.pem"])
        .current_dir(world.path(""))
        .output()?;
    let private = fs::read(world.path("release.key"))?;
    world.write("with-text.pem", [text.stdout, private.clone()].concat())?;
    world.write("both.pem", [private, fs::read(world.path("release.pub"))?].concat())?;
    world.write("mine/trust.toml", "")?;
    fs::set_permissions(world.path("mine/trust.toml"), fs::Permissions::from_mode(0o600))?;
    std::os::unix::fs::symlink("mine/trust.toml", world.path("trust.toml"))?;
    let add = |name: &str, flag: &str, file: &str| {
        world.omsign_ok(&["trust", "add", name, flag, file, "--policy", "trust.toml"])
    };
    add("ca", "--certificate-chain", "with-text.pem")?;
    add("key", "--public-key", "both.pem")?;
    let policy = fs::read_to_string(world.path("mine/trust.toml"))?;
    ensure!(policy.contains("BEGIN CERTIFICATE") && policy.contains("BEGIN PUBLIC KEY"), "{policy}");
    ensure!(!policy.contains("PRIVATE") && !policy.contains("Certificate:"), "{policy}");
    ensure!(fs::metadata(world.path("mine/trust.toml"))?.mode() & 0o777 == 0o600);
    ensure!(fs::symlink_metadata(world.path("trust.toml"))?.is_symlink());
    world.omsign_ok(&["verify", "model", "--policy", "trust.toml"])?;
    // Flags and a policy at once contradict each other; the environment's policy gives way, and an empty one is none.
    let both = ["verify", "model", "--policy", "trust.toml", "--public-key", "release.pub"];
    world.omsign_fails(2, &both)?;
    let mut command = Command::new(built("omsign")?);
    command.args(["verify", "model", "--public-key", "release.pub"]).current_dir(world.path(""));
    world.without_surprises(&mut command);
    for policy in ["", "nowhere.toml"] {
        ensure!(command.env("OMSIGN_POLICY", policy).output()?.status.success());
    }
    Ok(())
}
