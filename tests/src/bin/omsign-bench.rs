//! `./tests/bench NAME [--json]`

use std::io::Write as _;
use std::time::Duration;

use omsign_tests::bench::{device, hash, json, sign, table, verify};

fn main() -> anyhow::Result<()> {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let mut out = std::io::stdout().lock();
    if let Some(("measure", command)) = arguments.split_first().map(|(first, rest)| (first.as_str(), rest)) {
        return Ok(writeln!(out, "{}", hash::measure(command)?)?);
    }
    let quick = arguments.iter().any(|argument| argument == "--quick");
    let name = arguments.iter().find(|argument| !argument.starts_with("--"));
    // --quick only shows that the benchmark runs; its figures mean little.
    let (duration, rounds) =
        if quick { (Duration::from_millis(200), 1) } else { (Duration::from_secs(2), 3) };
    let rows = match name.map(String::as_str) {
        Some("sign") => match arguments.iter().position(|argument| argument == "--backend") {
            None => sign::run(duration, rounds)?,
            Some(at) => {
                let backend = arguments.get(at + 1).map(String::as_str).unwrap_or_default();
                device::run(backend.parse()?, duration, rounds, quick)?
            }
        },
        Some("hash") => hash::run(rounds, quick)?,
        Some("verify") => verify::run(rounds, quick)?,
        _ => anyhow::bail!(
            "usage: ./tests/bench hash | verify | sign [--backend {}] [--json] [--quick]",
            device::NAMES.join("|")
        ),
    };
    if arguments.iter().any(|argument| argument == "--json") {
        writeln!(out, "{}", json(name.map(String::as_str).unwrap_or_default(), &rows))?;
    } else {
        write!(out, "{}", table(&rows))?;
    }
    Ok(())
}
