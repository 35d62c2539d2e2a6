//! `omsign-agent`: the signing daemon.

mod cli;
mod commands;
mod rotate;

use std::io::Write as _;
use std::process::ExitCode;

use anyhow::Context as _;
use clap::{CommandFactory as _, Parser as _};
use omsign_agent::config::Config;
use omsign_agent::doctor::{self, Level};
use omsign_agent::init::Init;
use omsign_agent::{host, log, pin, secret, serve};
use rustix::termios::{OptionalActions, tcsetattr};

use self::cli::{Cli, Command, ConfigFile};

fn main() -> ExitCode {
    let cli = Cli::parse();
    match run(cli.command) {
        Ok(code) => code,
        Err(error) => {
            commands::say(format_args!("error: {error:#}"));
            ExitCode::from(2)
        }
    }
}

fn run(command: Command) -> anyhow::Result<ExitCode> {
    match command {
        Command::TokenHost => {
            log::start();
            host::run()?;
        }
        Command::PrintsPin { words } => {
            return Ok(ExitCode::from(pin::run_command(&words).context("a PIN's command")?));
        }
        Command::Unlock { arguments } => anyhow::bail!(
            "that is a client's command: `omsign agent unlock {}`; a PIN that is blocked is set anew with `omsign-agent unblock`",
            arguments.join(" ")
        ),
        Command::Lock { arguments } => {
            anyhow::bail!("that is a client's command: `omsign agent lock {}`", arguments.join(" "))
        }
        Command::Status { .. } => anyhow::bail!("that is a client's command: `omsign agent status`"),
        Command::Serve(file) => serve(&file)?,
        Command::OneShot { uri } => {
            log::start();
            secret::harden_process();
            let socket = rustix::stdio::stdin().try_clone_to_owned()?;
            runtime()?.block_on(serve::one_shot(&uri, socket.into()))?;
        }
        Command::Completions { shell } => completions(shell)?,
        Command::CheckConfig(file) => return check(&file),
        Command::Key { command, file } => {
            secret::harden_process();
            return commands::key(command, &file.config, || load(&file));
        }
        Command::Unblock { token, file } => {
            secret::harden_process();
            let config = load(&file)?;
            commands::unblock(&config, token)?;
        }
        Command::Init { device, directory, name, key_type, subject } => {
            secret::harden_process();
            let apart = directory.is_some();
            let directory = directory.unwrap_or_else(omsign_agent::config::own_directory);
            let directory = std::path::absolute(directory)?;
            commands::init(&Init { directory, apart, name, key_type, subject, wish: device })?;
        }
        Command::Doctor { config: file, json } => return doctor(&file, json),
    }
    Ok(ExitCode::SUCCESS)
}

fn serve(file: &ConfigFile) -> anyhow::Result<()> {
    let config = load(file)?;
    log::start();
    secret::harden_process();
    may_open_many_files();
    let runtime = runtime()?;
    let terminal = rustix::termios::tcgetattr(rustix::stdio::stdin());
    let served = runtime.block_on(serve::serve(config, &file.config));
    // Somebody may still be asked for a PIN at the terminal, or a user database not answer.
    runtime.shutdown_background();
    if let Ok(before) = terminal
        && serve::is_in_the_foreground()
    {
        // What is typed next is seen again.
        let _ = tcsetattr(rustix::stdio::stdin(), OptionalActions::Now, &before);
    }
    Ok(served?)
}

fn completions(shell: clap_complete::Shell) -> anyhow::Result<()> {
    let all = Cli::command();
    let shown = all.get_subcommands().filter(|command| !command.is_hide_set()).cloned();
    let shown = clap::Command::new("omsign-agent").subcommands(shown);
    let mut shown = shown.version(env!("CARGO_PKG_VERSION")).args(all.get_arguments().cloned());
    let mut script = Vec::new();
    clap_complete::generate(shell, &mut shown, "omsign-agent", &mut script);
    Ok(std::io::stdout().write_all(&script)?)
}

fn check(file: &ConfigFile) -> anyhow::Result<ExitCode> {
    let config = match load(file) {
        // Found wrong, unless there is nothing to look at.
        Err(mistakes) if file.config.is_file() => {
            commands::say(format_args!("error: {mistakes}"));
            return Ok(ExitCode::FAILURE);
        }
        loaded => loaded?,
    };
    let (shown, tokens, keys) = (file.config.display(), config.tokens.len(), config.keys.len());
    writeln!(std::io::stdout(), "{shown}: no mistakes; {tokens} tokens, {keys} keys")?;
    Ok(ExitCode::SUCCESS)
}

fn doctor(file: &ConfigFile, json: bool) -> anyhow::Result<ExitCode> {
    secret::harden_process();
    let config = load(file)?;
    let findings = runtime()?.block_on(doctor::examine(&config));
    let healthy = findings.iter().all(|finding| finding.level != Level::Error);
    let mut out = std::io::stdout().lock();
    if json {
        let report = serde_json::json!({ "healthy": healthy, "findings": findings });
        writeln!(out, "{report}")?;
    } else {
        findings.iter().try_for_each(|finding| writeln!(out, "{finding}"))?;
    }
    Ok(if healthy { ExitCode::SUCCESS } else { ExitCode::FAILURE })
}

/// Reads the configuration. Its error is every mistake in it, a line each.
fn load(file: &ConfigFile) -> anyhow::Result<Config> {
    Config::load(&file.config).map_err(|mistakes| {
        let mistakes: Vec<_> = mistakes.iter().map(ToString::to_string).collect();
        anyhow::anyhow!(mistakes.join("\nerror: "))
    })
}

/// Connections of callers must not take the descriptors that a token's new process needs.
fn may_open_many_files() {
    use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};
    const ENOUGH: u64 = 8192;
    let Rlimit { current, maximum } = getrlimit(Resource::Nofile);
    if current.is_some_and(|current| current < ENOUGH) {
        let current = Some(maximum.unwrap_or(ENOUGH).min(ENOUGH));
        // With fewer it works, for fewer callers.
        let _ = setrlimit(Resource::Nofile, Rlimit { current, maximum });
    }
}

/// One thread runs the event loop: the work is in the tokens' processes, and handing requests from thread to
/// thread costs more than it brings (./tests/bench sign). The others ask the user database, and wait for PINs that are typed.
fn runtime() -> anyhow::Result<tokio::runtime::Runtime> {
    tokio::runtime::Builder::new_current_thread()
        .max_blocking_threads(4)
        .enable_all()
        .build()
        .context("cannot start the event loop")
}
