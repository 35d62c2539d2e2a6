//! A key by its URI, with no agent running.

use omsign::agent::AgentError;
use omsign::oneshot::{self, PrivateAgent, split_pin, without_names};
use omsign_proto::v1::KeyState;
use zeroize::Zeroizing;

use crate::report;

/// Starts a private agent and sees to its PIN: from the URI, or from the person at the terminal.
pub(super) fn private_agent(uri: &str) -> Result<PrivateAgent, AgentError> {
    let (uri, pin) = split_pin(uri)?;
    if pin.is_some() && uri.contains("pin-source=") {
        // RFC 7512, 2.4; and one call must not offer two PINs.
        return Err(AgentError::Private("PKCS#11 URI: give pin-source or pin-value, not both".into()));
    }
    if pin.is_some() {
        report::warning(
            "pin-value in a URI is seen by everybody who sees the command line; use pin-source=/path/to/file",
        );
    }
    let private = PrivateAgent::start(&uri)?;
    let agent = private.agent();
    let key = match agent.get_key(oneshot::KEY) {
        Ok(key) => key,
        Err(error) => return Err(private.why(error)),
    };
    if key.state() == KeyState::Locked {
        let pin = match pin {
            Some(pin) => Some(pin),
            None if uri.split(['?', '&']).any(|part| part == "pin-source=device") => None,
            // It was read from there, and refused: asking for another would spend another try.
            None if uri.contains("pin-source=") => {
                let why = key.state_detail;
                let message =
                    format!("{why}; without pin-source in the URI you are asked for it at the terminal");
                return Err(AgentError::Private(message));
            }
            None => Some(Zeroizing::new(rpassword::prompt_password("PIN: ").map_err(|_| AgentError::NoPin)?)),
        };
        if pin.is_none() {
            report::say(format_args!("enter the PIN on the device"));
        }
        agent.unlock(oneshot::TOKEN, pin).map_err(without_names)?;
    }
    Ok(private)
}
