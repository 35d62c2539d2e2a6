//! The examples in the help do what they say.

use std::process::Command;

use anyhow::{Context as _, ensure};
use omsign_fixtures::built;
use omsign_fixtures::ca::Ca;
use omsign_fixtures::piv::{self, VirtualPiv};
use omsign_fixtures::softhsm::KeyType;
use omsign_tests::agent::Agent;
use omsign_tests::forge;
use omsign_tests::terminal::Terminal;
use omsign_tests::world::{World, key_section, text, token_section};

/// A model, an agent with a key `release`, a card, and a key in a file with a certificate.
struct Place {
    world: World,
    card: VirtualPiv,
    _agent: Agent,
}

impl Place {
    fn new() -> anyhow::Result<Self> {
        let world = World::new()?;
        for name in ["config.json", "tokenizer/vocab.txt", "weights.bin"] {
            world.write(&format!("my-model/{name}"), name)?;
        }
        let token = world.token("t", "release", KeyType::P256)?;
        let config =
            world.listen() + &token_section("t", &token, "") + &key_section("release", "t", "release");
        let agent = Agent::start(&world, &config)?;
        let card = VirtualPiv::create(&world.path("card"), 11_223_344)?;
        card.change_pin()?;
        card.generate("9c", "ECCP256", &[])?;
        let mut make = Command::new("openssl");
        make.args(["ecparam", "-name", "prime256v1", "-genkey", "-noout", "-out"]);
        ensure!(make.arg(world.path("release.key")).status()?.success());
        let key = forge::private_key(&world.path("release.key"))?;
        let ca = Ca::create("Acme Root")?;
        world.write("release.pem", key.public_key_to_pem()?)?;
        world.write("leaf.pem", ca.code_signing("Model Release", &key)?.to_pem()?)?;
        world.write("root.pem", ca.certificate.to_pem()?)?;
        Ok(Self { world, card, _agent: agent })
    }

    fn shell(&self, line: &str) -> anyhow::Result<Command> {
        let binaries = built("omsign")?.parent().context("a directory")?.to_owned();
        let path = std::env::var("PATH").unwrap_or_default();
        let mut shell = Command::new("sh");
        shell.args(["-euc", line]).current_dir(self.world.path(""));
        self.world.without_surprises(&mut shell);
        shell.env("PATH", format!("{}:{path}", binaries.display()));
        shell.env("PCSCLITE_CSOCK_NAME", text(&self.card.socket()));
        Ok(shell)
    }

    /// Runs a line at a terminal, at which the PIN is typed when it is asked for.
    fn runs(&self, line: &str, status: i32) -> anyhow::Result<String> {
        Terminal::new(&[("PIN: ", piv::PIN)])?
            .runs(&self.shell(line)?, status)
            .with_context(|| line.to_owned())
    }

    /// The examples of a command.
    fn examples(&self, command: &str) -> anyhow::Result<Vec<String>> {
        let of_columns = |columns: &str| {
            let help = self.shell(&format!("omsign {command} --help"))?.env("COLUMNS", columns).output()?;
            let help = String::from_utf8(help.stdout)?;
            let (_, examples) = help.split_once("\nExamples:\n").context("no examples")?;
            anyhow::Ok(examples.to_owned())
        };
        let examples = of_columns("80")?;
        // No line is broken where it would not be typed so.
        ensure!(of_columns("200")? == examples, "{examples}");
        let examples = examples.replace("\\\n", "");
        Ok(examples.lines().map(|line| line.trim().to_owned()).collect())
    }
}

#[test]
fn examples() -> anyhow::Result<()> {
    let place = Place::new()?;
    let mut count = 0;
    for directory in [".local/share/bash-completion/completions", ".zfunc", ".config/fish/completions"] {
        std::fs::create_dir_all(place.world.path(directory))?;
    }
    for command in ["completions", "sign", "digest", "verify", "trust"] {
        // Each begins where nobody is trusted yet.
        let _ = std::fs::remove_dir_all(place.world.path(".config/omsign"));
        for example in place.examples(command)? {
            let by_certificate =
                if example.contains("root.pem") { " --signing-certificate leaf.pem" } else { "" };
            let before = format!("omsign sign my-model --private-key release.key{by_certificate}");
            place.runs(&before, 0)?;
            // Nobody here vouches for an identity: what it says of a bundle that has none is what can be seen of it.
            let status = i32::from(command == "verify" && example.contains("--identity "));
            let said = place.runs(&example, status)?;
            ensure!(status == 0 || said.contains("method"), "{example}: {said}");
            count += 1;
        }
    }
    ensure!(count == 19, "{count} examples");
    Ok(())
}

/// What bash completes.
#[test]
fn completions() -> anyhow::Result<()> {
    let place = Place::new()?;
    for (program, typed, expected) in [
        ("omsign", "verify --publ", "--public_key --public-key"),
        ("omsign", "sig", "sign"),
        ("omsign", "digest --hash-type bla", "blake2b blake3"),
        ("omsign-agent", "key gen", "generate"),
        ("omsign-agent", "--ver", "--version"),
        // What only the agent starts is not offered.
        ("omsign-agent", "tok", ""),
    ] {
        let line = format!(
            "eval \"$({program} completions bash)\"; COMP_WORDS=({program} {typed}); COMP_CWORD=$((${{#COMP_WORDS[@]}} - 1)); \
             f=$(complete -p {program}); f=${{f#*-F }}; \
             ${{f%% *}} {program} \"${{COMP_WORDS[-1]}}\" \"${{COMP_WORDS[-2]}}\" || :; echo \"${{COMPREPLY[*]}}\"",
        );
        let output = place.shell("exec bash -euc \"$LINE\"")?.env("LINE", &line).output()?;
        let errors = String::from_utf8_lossy(&output.stderr);
        ensure!(output.status.success(), "{program} {typed}: {errors}");
        let completed = String::from_utf8(output.stdout)?;
        ensure!(completed.trim() == expected, "{program} {typed}: {completed}");
    }
    Ok(())
}
