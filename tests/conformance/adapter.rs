//! Speaks the command line of the public OMS conformance suite: `sign-model` and `verify-model`, exit status 0 or not.
//!
//! What it signs goes the way that users' signatures go: the suite's PEM key is imported into a fresh SoftHSM token,
//! and the real daemon signs with it.

use std::path::{Path, PathBuf};
use std::process::{Command, ExitCode};

use anyhow::{Context as _, bail, ensure};
use omsign_fixtures::built;
use omsign_fixtures::softhsm::{PIN, SoftHsm};
use omsign_tests::agent::Agent;
use omsign_tests::world::{World, key_section, text, token_section};

/// The suite's flags: each may come several times, in any order.
struct Flags(Vec<(String, String)>);

impl Flags {
    fn parse(arguments: &[String]) -> anyhow::Result<Self> {
        let mut flags = Vec::new();
        let mut rest = arguments.iter();
        while let Some(flag) = rest.next() {
            let name = flag.strip_prefix("--").with_context(|| format!("{flag} is no flag"))?;
            let value = match name {
                "ignore-unsigned-files" | "use-staging" => String::new(),
                _ => rest.next().with_context(|| format!("{flag} needs a value"))?.clone(),
            };
            flags.push((name.to_owned(), value));
        }
        Ok(Self(flags))
    }

    fn all(&self, name: &str) -> Vec<&str> {
        self.0.iter().filter(|(own, _)| own == name).map(|(_, value)| value.as_str()).collect()
    }

    fn one(&self, name: &str) -> anyhow::Result<&str> {
        match self.all(name).as_slice() {
            [only] => Ok(only),
            found => bail!("--{name} is there {} times", found.len()),
        }
    }
}

fn main() -> ExitCode {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let done = match arguments.split_first() {
        Some((command, rest)) if command == "sign-model" => Flags::parse(rest).and_then(|flags| sign(&flags)),
        Some((command, rest)) if command == "verify-model" => {
            Flags::parse(rest).and_then(|flags| verify(&flags))
        }
        _ => Err(anyhow::anyhow!("usage: omsign-conformance sign-model|verify-model …")),
    };
    match done {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("{error:#}");
            ExitCode::FAILURE
        }
    }
}

fn sign(flags: &Flags) -> anyhow::Result<()> {
    let method = flags.one("method")?;
    ensure!(method != "sigstore", "keyless signing needs an OIDC token, and is not what omsign does");
    let world = World::new()?;
    let token = SoftHsm::create(&world.path("token"), "conformance")?;
    import(&token, &world, Path::new(flags.one("private-key")?))?;
    let config = world.listen() + &token_section("t", &token, "") + &key_section("k", "t", "k");
    let _agent = Agent::start(&world, &config)?;
    let mut arguments =
        vec!["sign", flags.one("model-path")?, "--key", "k", "--signature", flags.one("output-bundle")?];
    if method == "certificate" {
        arguments.extend(["--signing-certificate", flags.one("signing-cert")?]);
        for certificate in flags.all("cert-chain") {
            arguments.extend(["--certificate-chain", certificate]);
        }
    }
    for path in flags.all("ignore-paths") {
        arguments.extend(["--ignore-paths", path]);
    }
    world.omsign_ok(&arguments).map(drop)
}

/// SoftHSM takes PKCS#8 only, from a file.
fn import(token: &SoftHsm, world: &World, key: &Path) -> anyhow::Result<()> {
    let pkcs8: PathBuf = world.path("k.pk8");
    let mut openssl = Command::new("openssl");
    openssl.args(["pkcs8", "-topk8", "-nocrypt", "-in"]).arg(key).arg("-out").arg(&pkcs8);
    ensure!(openssl.status()?.success(), "openssl pkcs8");
    let mut import = Command::new("softhsm2-util");
    import.args([
        "--import",
        &text(&pkcs8),
        "--token",
        &token.label,
        "--label",
        "k",
        "--id",
        "01",
        "--pin",
        PIN,
    ]);
    let output = import.env("SOFTHSM2_CONF", token.config()).output()?;
    ensure!(output.status.success(), "softhsm2-util: {}", String::from_utf8_lossy(&output.stderr));
    Ok(())
}

fn verify(flags: &Flags) -> anyhow::Result<()> {
    let method = flags.one("method")?;
    let mut arguments = vec!["verify", method, flags.one("model-path")?, "--signature", flags.one("bundle")?];
    match method {
        // The suite counts the bundle of release 0.2.0 among those that have to verify.
        "key" => arguments.extend(["--allow-legacy", "--public-key", flags.one("public-key")?]),
        "certificate" => {
            arguments.push("--allow-legacy");
            for certificate in flags.all("cert-chain") {
                arguments.extend(["--certificate-chain", certificate]);
            }
        }
        _ => {
            arguments.extend(["--identity", flags.one("identity")?]);
            arguments.extend(["--identity-provider", flags.one("identity-provider")?]);
            arguments.extend(flags.all("use-staging").first().map(|_| "--use-staging"));
        }
    }
    for path in flags.all("ignore-paths") {
        arguments.extend(["--ignore-paths", path]);
    }
    arguments.extend(flags.all("ignore-unsigned-files").first().map(|_| "--ignore-unsigned-files"));
    let status = Command::new(built("omsign")?).args(&arguments).env_remove("OMSIGN_POLICY").status()?;
    ensure!(status.success(), "not verified");
    Ok(())
}
