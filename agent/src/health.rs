//! What the health service (grpc.health.v1) says of the agent and of its tokens.

use std::sync::Arc;
use std::time::Duration;

use tonic_health::ServingStatus;
use tonic_health::server::HealthReporter;

use crate::agent::Agent;
use crate::audit::Entry;
use crate::operator;
use crate::token::{State, Token};

/// Name of the service.
pub(crate) const SERVICE: &str = "omsign.v1.AgentService";

/// How long a log that cannot be written is left alone.
const TRY_AGAIN: Duration = Duration::from_secs(1);

/// Tells the health service what a token is doing, each time that changes, and operators when one was opened that holds
/// another key than the others.
pub(crate) async fn of_token(token: Arc<Token>, agent: Arc<Agent>, reporter: HealthReporter) {
    let name = format!("token.{}", token.name);
    loop {
        let change = token.watch();
        if token.is_over() {
            // Another one may have its name now.
            return;
        }
        let status = match token.state() {
            State::Ready(_) => {
                agent.setup().keys.values().filter(|key| key.is_on(&token.name)).for_each(|key| key.check());
                ServingStatus::Serving
            }
            State::Starting | State::Locked(_) | State::Down(_) => ServingStatus::NotServing,
        };
        reporter.set_service_status(&name, status).await;
        change.await;
    }
}

/// Tells the health service that all is over, and nothing more.
pub(crate) async fn ends(agent: &Agent, mut reporter: HealthReporter) {
    let tokens = agent.setup().tokens.keys().map(|name| format!("token.{name}")).collect::<Vec<_>>();
    for service in tokens.iter().map(String::as_str).chain(["", SERVICE]) {
        reporter.set_service_status(service, ServingStatus::NotServing).await;
        reporter.clear_service_status(service).await;
    }
}

/// Tells the health service when nothing can be signed since nothing can be recorded, and tries until it can.
pub(crate) async fn of_audit(agent: Arc<Agent>, reporter: HealthReporter) {
    let mut failing = agent.audit.watch();
    while failing.wait_for(|failing| *failing).await.is_ok() {
        for service in ["", SERVICE] {
            reporter.set_service_status(service, ServingStatus::NotServing).await;
        }
        // Not on the event loop: it asks the user database.
        let Ok(identity) = tokio::task::spawn_blocking(operator::own_identity).await else { return };
        while *failing.borrow_and_update() {
            tokio::time::sleep(TRY_AGAIN).await;
            let reason = "entries before this one could not be written, and nothing was signed";
            let entry = Entry { action: "audit", outcome: "resumed", reason, ..Entry::about(&identity) };
            let _ = agent.audit.record_soon(&entry).await;
        }
        for service in ["", SERVICE] {
            reporter.set_service_status(service, ServingStatus::Serving).await;
        }
    }
}
