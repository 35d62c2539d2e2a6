//! What the documents show is what happens.

use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context as _, ensure};
use omsign_fixtures::softhsm::KeyType;
use omsign_fixtures::{built, model};
use omsign_tests::agent::Agent;
use omsign_tests::pki::Pki;
use omsign_tests::world::{World, key_section, token_section};

fn project(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).with_file_name(name)
}

/// A command of a transcript and what it prints; a last line `? N` is its exit status.
struct Step {
    command: String,
    output: Vec<String>,
    status: i32,
}

/// The steps of all console blocks.
fn steps(markdown: &str) -> Vec<Step> {
    let mut steps: Vec<Step> = Vec::new();
    let mut inside = false;
    for line in markdown.lines() {
        if line.starts_with("```") {
            inside = line == "```console";
        } else if let Some(command) = line.strip_prefix("$ ").filter(|_| inside) {
            steps.push(Step { command: command.to_owned(), output: Vec::new(), status: 0 });
        } else if let Some(step) = steps.last_mut().filter(|_| inside) {
            match line.strip_prefix("? ").and_then(|status| status.parse().ok()) {
                Some(status) => step.status = status,
                None => step.output.push(line.to_owned()),
            }
        }
    }
    steps
}

/// Whether a line is as shown; `…` stands for anything.
fn matches(shown: &str, actual: &str) -> bool {
    let mut parts = shown.split('…');
    let Some(mut rest) = parts.next().and_then(|first| actual.strip_prefix(first)) else { return false };
    let mut open = false;
    for part in parts {
        open = true;
        match rest.find(part) {
            Some(_) if part.is_empty() => rest = "",
            Some(at) => rest = rest.get(at + part.len()..).unwrap_or_default(),
            None => return false,
        }
    }
    rest.is_empty() || (open && shown.ends_with('…'))
}

#[test]
fn the_transcripts_of_the_readme() -> anyhow::Result<()> {
    let world = World::new()?;
    let mut fixtures = Command::new(built("omsign-fixtures")?);
    ensure!(fixtures.arg("softhsm").arg(world.path("")).status()?.success());
    model::create(&world.path("my-model"), 4, 16 << 20)?;
    let config = std::fs::read_to_string(world.path("agent.toml"))?;
    let _agent = Agent::start(&world, &config)?;
    let binaries = built("omsign")?;
    let binaries = binaries.parent().context("a directory")?;
    let steps = steps(&std::fs::read_to_string(project("README.md"))?);
    ensure!(steps.len() >= 10, "only {} steps found", steps.len());
    for step in steps {
        let mut shell = Command::new("sh");
        shell.args(["-c", &step.command]).current_dir(world.path(""));
        world.without_surprises(&mut shell);
        let path = format!("{}:{}", binaries.display(), std::env::var("PATH")?);
        let output = shell.env("PATH", path).output()?;
        let said = [output.stdout, output.stderr].concat();
        let said = String::from_utf8(said)?;
        ensure!(output.status.code() == Some(step.status), "{}: {:?}: {said}", step.command, output.status);
        let actual: Vec<&str> = said.lines().collect();
        let same =
            actual.len() == step.output.len() && step.output.iter().zip(&actual).all(|(s, a)| matches(s, a));
        ensure!(same, "{}\nshown:\n{}\nactual:\n{said}", step.command, step.output.join("\n"));
    }
    Ok(())
}

/// The policy in the manual is one, once the files that it names are there.
#[test]
fn the_policy_of_the_manual() -> anyhow::Result<()> {
    let world = World::new()?;
    let manual = std::fs::read_to_string(project("docs/verification.md"))?;
    let (_, rest) = manual.split_once("```toml\n").context("a policy")?;
    let (policy, _) = rest.split_once("```").context("its end")?;
    world.write("trust.toml", policy)?;
    let pki = Pki::new(&world);
    pki.root("acme-root")?;
    pki.root("tsa")?;
    pki.crl("acme-root", "")?;
    std::fs::rename(world.path("acme-root.crl"), world.path("acme.crl"))?;
    let list = world.omsign_ok(&["trust", "list", "--policy", "trust.toml"])?;
    ensure!(
        list.contains("bob           key") && list.contains("release-team  certificate  acme-*"),
        "{list}"
    );
    Ok(())
}

/// From no certificate at all to a signature over the network.
#[test]
fn the_manual_of_remote_signing() -> anyhow::Result<()> {
    let world = World::new()?;
    let token = world.token("release", "release", KeyType::P256)?;
    model::create(&world.path("my-model"), 2, 1 << 10)?;
    let manual = std::fs::read_to_string(project("docs/remote.md"))?;
    let here = manual.replace("signer.acme.example", "localhost");
    let blocks = |start: &str| -> Vec<&str> {
        let after = here.split(start).skip(1);
        after.filter_map(|rest| rest.split("```").next()).collect()
    };
    let run = |script: &str| {
        let binaries = built("omsign")?;
        let path =
            format!("{}:{}", binaries.parent().context("a directory")?.display(), std::env::var("PATH")?);
        let mut shell = Command::new("sh");
        world.without_surprises(shell.args(["-euc", script]).current_dir(world.path("")));
        let output = shell.env("PATH", path).output()?;
        ensure!(output.status.success(), "{script}: {output:?}");
        anyhow::Ok(String::from_utf8(output.stdout)?)
    };
    let [ca, server, caller, runner] = blocks("```sh\n")[..] else { anyhow::bail!("four scripts") };
    run(&[ca, server, caller].concat())?;
    let [config] = blocks("```toml\n")[..] else { anyhow::bail!("one configuration") };
    let config =
        config.replace("/run/omsign/agent.sock", "agent.sock").replace("0.0.0.0:7443", "127.0.0.1:0");
    let (listen, rule) = config.split_once("\n\n").context("two sections")?;
    let key = key_section("release", "release", "release");
    let key = key.split("\n[[").next().context("a key")?;
    let audit = "\n[audit]\ndirectory = \"audit\"\n";
    let config = format!("{listen}\n{audit}{}{key}\n{rule}", token_section("release", &token, ""));
    let agent = Agent::start(&world, &config)?;
    let url = agent.tls_url()?;
    let port = url.rsplit(':').next().context("a port")?;
    // Its address is taken for localhost's, which may be another family's first.
    let said = run(&runner.replace("localhost:7443", &format!("localhost:{port}")))?;
    ensure!(said.contains("token release: ready") && said.contains("key release: ready"), "{said}");
    let signed: serde_json::Value =
        serde_json::from_str(&std::fs::read_to_string(world.path("signed.json"))?)?;
    ensure!(signed["files"].as_u64() > Some(0), "{signed}");
    let audit = world.audit()?;
    let entry = audit.last().context("an entry")?;
    ensure!(entry["identity"]["certificate"]["uris"][0] == "spiffe://acme.example/ci/1", "{entry}");
    Ok(())
}

#[test]
fn every_example_configuration_is_valid() -> anyhow::Result<()> {
    let mut count = 0;
    for entry in std::fs::read_dir(project("hsm-config"))? {
        let path = entry?.path();
        if path.extension().is_none_or(|extension| extension != "toml") {
            continue;
        }
        let output =
            Command::new(built("omsign-agent")?).args(["check-config", "--config"]).arg(&path).output()?;
        // This machine may lack the device; everything else has to be right.
        let absent = [
            "is not a file; write the path of the device's PKCS#11 module",
            "none of the profile's libraries is installed",
        ];
        let errors = String::from_utf8(output.stderr)?;
        let wrong: Vec<_> =
            errors.lines().filter(|line| !absent.iter().any(|part| line.contains(part))).collect();
        ensure!(wrong.is_empty(), "{}: {wrong:?}", path.display());
        ensure!(output.status.success() || !errors.is_empty(), "{}", path.display());
        count += 1;
    }
    ensure!(count == 14, "{count} examples found");
    Ok(())
}

/// The golden file is what `check-config` prints; every line of it was read by a person.
#[test]
fn every_mistake_in_a_configuration_is_reported() -> anyhow::Result<()> {
    let golden = project("tests/golden");
    let mut check = Command::new(built("omsign-agent")?);
    let output =
        check.args(["check-config", "--config", "config-mistakes.toml"]).current_dir(&golden).output()?;
    ensure!(output.status.code() == Some(1) && output.stdout.is_empty());
    let expected = std::fs::read_to_string(golden.join("config-mistakes.stderr"))?;
    let actual = String::from_utf8(output.stderr)?;
    ensure!(actual == expected, "expected:\n{expected}\nactual:\n{actual}");
    ensure!(!actual.contains("1234"), "a PIN is never repeated");
    Ok(())
}

#[test]
fn wildcards_match_what_they_should() {
    assert!(matches("a … c", "a b c") && matches("a…", "abc") && matches("…", "") && matches("abc", "abc"));
    assert!(!matches("a … c", "a b d") && !matches("abc", "abcd") && !matches("a…c", "ab"));
}
