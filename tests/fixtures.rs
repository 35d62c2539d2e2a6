//! `omsign-fixtures with`: what contributors and users start stand-ins with.

use std::io::{BufRead as _, BufReader, Write as _};
use std::path::PathBuf;
use std::process::{Command, Output, Stdio};

use anyhow::{Context as _, ensure};
use omsign_fixtures::built;
use omsign_tests::agent::signal;
use rustix::process::Signal;

const ALL: &str = "softhsm,kryoptic,swtpm,piv,fault";

/// Runs a shell script with the stand-ins.
fn with(kinds: &str, script: &str) -> anyhow::Result<Output> {
    let fixtures = built("omsign-fixtures")?;
    let directory = fixtures.parent().map(std::path::Path::to_owned).unwrap_or_default();
    // As Debian's users have it, who are not root.
    let path = format!("{}:/usr/local/bin:/usr/bin:/bin", directory.display());
    let mut command = Command::new(&fixtures);
    command.args(["with", kinds, "--", "sh", "-euc", script]).env("PATH", path);
    Ok(command.output()?)
}

#[test]
fn a_key_and_a_certificate_on_each() -> anyhow::Result<()> {
    let script = r#"
        echo "$OMSIGN_FIXTURES"
        omsign-agent check-config --config "$OMSIGN_FIXTURES_CONFIG"
        omsign-agent serve 2>"$OMSIGN_FIXTURES/log" & agent=$!
        while [ ! -S "$OMSIGN_AGENT" ]; do kill -0 $agent; done
        cd "$OMSIGN_FIXTURES"
        mkdir model; echo weights >model/weights
        # A TPM keeps no certificates.
        for key in softhsm kryoptic piv fault; do
          omsign-agent key list | grep -q "$key.*certificate" || { omsign-agent key list; exit 1; }
        done
        for key in softhsm kryoptic swtpm piv fault; do
          omsign sign model --key $key --signature $key.sig
          omsign verify model --signature $key.sig --certificate-chain root.pem
        done
        # What goes wrong is what its file says.
        echo 'C_Sign 30 0' >"$OMSIGN_PROXY_FAULTS"
        if omsign sign model --key fault --signature none.sig; then exit 1; fi
        kill $agent; wait $agent
        # What the card attests, and an operator's command that takes its management key.
        omsign-agent key attest piv >piv.json
        omsign-agent key verify-attestation piv.json --roots piv-attestation.pem
        omsign-agent key import-certificate piv piv.pem
        exit 7"#;
    let output = with(ALL, script)?;
    let (said, errors) = (String::from_utf8(output.stdout)?, String::from_utf8_lossy(&output.stderr));
    ensure!(output.status.code() == Some(7), "{:?}: {said}{errors}", output.status);
    ensure!(said.matches("verified 1 file, 8 bytes, signed by the certificate CN=").count() == 5, "{said}");
    let directory = said.lines().next().unwrap_or_default();
    ensure!(!directory.is_empty() && !std::path::Path::new(directory).exists(), "{directory} is still there");
    Ok(())
}

/// Other programs find the devices, too.
#[test]
fn their_environment() -> anyhow::Result<()> {
    let script = r#"
        tpm2_getrandom 4 >/dev/null
        openssl pkey -provider tpm2 -provider default -propquery '?provider=tpm2' -in handle:0x81000010 -pubout -noout
        pkcs11-tool --module libomsign_fault_proxy.so --list-slots | grep 'token label *: fault'"#;
    let directory = built("libomsign_fault_proxy.so")?.parent().map(std::path::Path::to_owned);
    let proxy = directory.context("a directory")?.join("libomsign_fault_proxy.so").display().to_string();
    let output = with("swtpm,fault", &script.replace("libomsign_fault_proxy.so", &proxy))?;
    ensure!(output.status.success(), "{output:?}");
    Ok(())
}

#[test]
fn one_of_a_kind() -> anyhow::Result<()> {
    let output = with("softhsm,softhsm", "exit 7")?;
    let errors = String::from_utf8_lossy(&output.stderr);
    ensure!(output.status.code() == Some(1) && errors.contains("name it once"), "{errors}");
    Ok(())
}

#[test]
fn nothing_outlives_a_killed_one() -> anyhow::Result<()> {
    // The command kills what started it: it and the devices end with that, its files with the next one.
    let output = with("swtpm,piv", r#"echo "$OMSIGN_FIXTURES"; kill -KILL $PPID; exec sleep 1000"#)?;
    let said = String::from_utf8(output.stdout)?;
    let directory = said.trim();
    ensure!(output.status.code().is_none() && !directory.is_empty(), "{:?}: {said}", output.status);
    omsign_tests::agent::eventually("the end of the devices", || {
        let left = Command::new("pgrep").args(["-f", directory]).output()?;
        Ok(left.stdout.is_empty())
    })?;
    ensure!(with("softhsm", "true")?.status.success());
    ensure!(!std::path::Path::new(directory).exists(), "{directory} is still there");
    Ok(())
}

#[test]
fn one_that_is_told_to_end_cleans_up() -> anyhow::Result<()> {
    let mut command = Command::new(built("omsign-fixtures")?);
    let script = r#"trap 'echo told; exit 7' TERM; echo "$OMSIGN_FIXTURES"
        for turn in 1 2 3 4 5 6 7 8 9; do read -r line && echo "$line"; done"#;
    command.args(["with", "swtpm,piv", "--", "sh", "-uc", script]);
    let mut running = command.stdin(Stdio::piped()).stdout(Stdio::piped()).spawn()?;
    let mut typed = running.stdin.take().context("its input")?;
    let mut said = BufReader::new(running.stdout.take().context("its output")?).lines();
    let mut next = || said.next().context("a line")?.map_err(anyhow::Error::from);
    let directory = PathBuf::from(next()?);
    // At a terminal the command hears of it by itself.
    signal(running.id(), Signal::INT)?;
    writeln!(typed, "still here")?;
    ensure!(next()? == "still here" && directory.is_dir(), "an interrupt was passed on");
    signal(running.id(), Signal::TERM)?;
    ensure!(next()? == "told" && running.wait()?.code() == Some(7), "it was not passed on");
    ensure!(!directory.exists(), "{} is still there", directory.display());
    Ok(())
}

#[test]
fn several_side_by_side() -> anyhow::Result<()> {
    let script = "tpm2_getrandom 4 >/dev/null 2>&1 && yubico-piv-tool -r Yubico -a version";
    let started: Vec<_> = (0..3).map(|_| std::thread::spawn(move || with(ALL, script))).collect();
    for one in started {
        let output = one.join().map_err(|_| anyhow::anyhow!("a panic"))??;
        ensure!(output.status.success(), "{output:?}");
    }
    Ok(())
}
