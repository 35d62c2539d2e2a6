//! The configuration that is read anew while the agent runs.

use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use tokio::signal::unix::Signal;
use tokio::sync::{Semaphore, mpsc};
use tokio::time::timeout;
use tonic_health::server::HealthReporter;

use crate::agent::Agent;
use crate::audit::Entry;
use crate::config::{self, Config, Listen};
use crate::health;
use crate::identity::Identity;
use crate::listen::SocketFile;
use crate::operator::{self, Reloaded};
use crate::tls::Tls;
use crate::token::Token;

/// How long a configuration may take to be read, with its certificates and users.
const LOAD: Duration = Duration::from_secs(30);

/// How the configuration is read anew.
pub(crate) struct Reload {
    pub(crate) path: PathBuf,
    /// What cannot be changed while it runs, as it was at the start.
    pub(crate) listen: Listen,
    pub(crate) operators_file: Option<SocketFile>,
    pub(crate) audit: config::Audit,
    /// But not what is in these files.
    pub(crate) tls: Option<Arc<Tls>>,
    pub(crate) hangup: Signal,
    /// One at a time, also where the one before had its time and goes on.
    pub(crate) reading: Arc<Semaphore>,
    /// Operators who wait for it.
    pub(crate) asked: mpsc::Receiver<Reloaded>,
}

impl Reload {
    /// At each signal, and whenever an operator asks.
    pub(crate) async fn run(mut self, agent: Arc<Agent>, reporter: HealthReporter) {
        loop {
            tokio::select! {
                Some(()) = self.hangup.recv() => {
                    // Who may send us signals is root, or has our user.
                    let Ok(own) = tokio::task::spawn_blocking(operator::own_identity).await else { continue };
                    if let Err(mistakes) = self.recorded(&agent, &reporter, &own, None).await {
                        tracing::error!(mistakes, "the configuration is not reloaded");
                    }
                }
                Some(Reloaded { by, rule, done }) = self.asked.recv() => {
                    // An operator who hung up needs no answer.
                    let _ = done.send(self.recorded(&agent, &reporter, &by, Some(&rule)).await);
                }
                else => return,
            }
        }
    }

    /// Who may sign, and with what, may be another from then on.
    async fn recorded(
        &self,
        agent: &Arc<Agent>,
        reporter: &HealthReporter,
        by: &Identity,
        rule: Option<&str>,
    ) -> Result<Vec<String>, String> {
        let reloaded = self.once(agent, reporter).await;
        let reason = reloaded.as_ref().err().cloned().unwrap_or_default();
        let outcome = if reloaded.is_ok() { "done" } else { "failed" };
        let entry = Entry { action: "reload", rule, outcome, reason: &reason, ..Entry::about(by) };
        if let Err(error) = agent.audit.record_soon(&entry).await {
            // It is in force all the same; nothing is signed until the log can be written.
            tracing::error!(%error, "that the configuration was read anew is not recorded");
        }
        reloaded
    }

    /// A configuration with mistakes changes nothing.
    async fn once(&self, agent: &Arc<Agent>, reporter: &HealthReporter) -> Result<Vec<String>, String> {
        let (path, tls) = (self.path.clone(), self.tls.clone());
        let busy = |_| "the files of a reload before this one are still being read".to_owned();
        let reading = Arc::clone(&self.reading).try_acquire_owned().map_err(busy)?;
        // The user database may be a slow directory server.
        let loaded = tokio::task::spawn_blocking(move || {
            let config = Config::load(&path).map_err(|mistakes| {
                mistakes.iter().map(ToString::to_string).collect::<Vec<_>>().join("; ")
            })?;
            // Other files take a restart, and those of before may be gone.
            let tls = tls.filter(|tls| tls.is_for(config.listen.tls.as_ref()));
            let files = tls.map(|tls| tls.read()).transpose().map_err(|error| error.to_string())?;
            drop(reading);
            Ok::<_, String>((config, files))
        });
        let late =
            |_| "the configuration could not be read in time; the user database may not answer".to_owned();
        let (config, files) =
            timeout(LOAD, loaded).await.map_err(late)?.map_err(|error| error.to_string())??;
        if let Some((tls, files)) = self.tls.as_ref().zip(files) {
            tls.renew(files);
            tls.warn();
        }
        let mut notes = Vec::new();
        let sections = [("[listen]", config.listen != self.listen), ("[audit]", config.audit != self.audit)];
        for (section, _) in sections.iter().filter(|(_, changed)| *changed) {
            let note = format!("{section} changed, which takes a restart of the agent");
            tracing::warn!("{note}");
            notes.push(note);
        }
        if let Some(file) = &self.operators_file
            && let Err(error) = file.permit(operator::mode(&config.operators), None)
        {
            tracing::warn!(%error, "who can connect to the operators' socket could not be changed");
        }
        let (closed, new) = agent.reload(config);
        // A certificate may say now whose key it is.
        agent.setup().keys.values().for_each(|key| key.check());
        tracing::info!(closed = closed.len(), opened = new.len(), "the configuration is reloaded");
        let waits = |token: &&Arc<Token>| token.pin().is_by_hand() && token.locked_by_operator().is_none();
        for token in new.iter().filter(waits) {
            let note = format!("is opened anew and waits for its PIN: {}", token.how_to_unlock());
            tracing::warn!(token = %token.name, "it {note}");
            notes.push(format!("token {} {note}", token.name));
        }
        for token in closed {
            let (mut reporter, agent) = (reporter.clone(), Arc::clone(agent));
            tokio::spawn(async move {
                token.close().await;
                // There may be one of this name again.
                if !agent.setup().tokens.contains_key(&token.name) {
                    reporter.clear_service_status(&format!("token.{}", token.name)).await;
                }
            });
        }
        for token in new {
            tokio::spawn(health::of_token(token, Arc::clone(agent), reporter.clone()));
        }
        Ok(notes)
    }
}
