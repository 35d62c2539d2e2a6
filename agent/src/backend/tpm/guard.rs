//! What a key asks for before it signs: its authorization value, and PCRs as they were when it was made.

use tss_esapi::Context;
use tss_esapi::constants::{CapabilityType, SessionType};
use tss_esapi::handles::SessionHandle;
use tss_esapi::interface_types::algorithm::HashingAlgorithm;
use tss_esapi::interface_types::session_handles::{AuthSession, PolicySession};
use tss_esapi::structures::{
    CapabilityData, Digest, PcrSelection, PcrSelectionList, PcrSlot, SymmetricDefinition,
};

use super::super::{gone, refused};
use super::errors::{Code, classify, code, kept, using};
use crate::config::{Bank, Pcrs};
use crate::host::wire::{Class, Failure};

/// How often a use of a key begins again because some program extended a register meanwhile.
const AGAIN: usize = 10;

/// What a key asks for.
#[derive(Clone, Debug)]
pub(super) struct Guard {
    pub(super) pcrs: Option<Pcrs>,
    /// It has an authorization value, which its handle knows.
    pub(super) auth: bool,
}

impl Guard {
    /// Does something with the key, in a session that shows what it asks for.
    pub(super) fn with<T>(
        &self,
        context: &mut Context,
        what: &str,
        then: impl Fn(&mut Context) -> tss_esapi::Result<T>,
    ) -> Result<T, Failure> {
        let Some(pcrs) = &self.pcrs else {
            let done = context.execute_with_session(Some(AuthSession::Password), then);
            return done.map_err(|error| using(what, &error));
        };
        let mut left = AGAIN;
        let (done, ended) = loop {
            let session = self.session(context, pcrs, SessionType::Policy)?;
            let done = context.execute_with_session(Some(session.into()), &then);
            let ended = flush(context, session);
            match &done {
                Err(error) if code(error) == Some(Code::PcrChanged) && left > 0 => left -= 1,
                _ => break (done, ended),
            }
        };
        let done = done.map_err(|error| match using(what, &error) {
            failure if failure.class == Class::Refused => refused(format!(
                "the PCRs {pcrs} are not as they were when the key was made, or it was made for others: {}",
                failure.message
            )),
            failure => failure,
        })?;
        ended.map(|()| done)
    }

    /// The policy of a new key (TPM 2.0 Part 1, 19.7); none where an authorization value alone guards it.
    pub(super) fn policy(&self, context: &mut Context) -> Result<Option<Digest>, Failure> {
        let Some(pcrs) = &self.pcrs else { return Ok(None) };
        self.holds(context)?;
        let session = self.session(context, pcrs, SessionType::Trial)?;
        let digest = context.policy_get_digest(session);
        let ended = flush(context, session);
        let digest = digest.map_err(|error| of_session("make the policy", &error))?;
        ended.map(|()| Some(digest))
    }

    /// Whether the TPM has these registers: those that it has not it leaves out of a policy, which then guards nothing.
    pub(super) fn holds(&self, context: &mut Context) -> Result<(), Failure> {
        let Some(pcrs) = &self.pcrs else { return Ok(()) };
        let failed = |error: tss_esapi::Error| classify("ask which PCRs there are", &error);
        let asked = context
            .execute_without_session(|context| context.get_capability(CapabilityType::AssignedPcr, 0, 1));
        let CapabilityData::AssignedPcr(there) = asked.map_err(failed)?.0 else {
            return Err(gone("the TPM does not say which PCRs it has".into()));
        };
        let has = |wanted: &PcrSelection| {
            let bank = |found: &&PcrSelection| found.hashing_algorithm() == wanted.hashing_algorithm();
            let there = there.get_selections().iter().find(bank);
            wanted.selected().into_iter().all(|slot| there.is_some_and(|found| found.is_selected(slot)))
        };
        match selection(pcrs).map_err(failed)?.get_selections().iter().all(has) {
            true => Ok(()),
            false => Err(refused(format!(
                "the TPM has no PCRs {pcrs}: that bank is not allocated, as `tpm2_getcap pcrs` shows"
            ))),
        }
    }

    fn session(
        &self,
        context: &mut Context,
        pcrs: &Pcrs,
        kind: SessionType,
    ) -> Result<PolicySession, Failure> {
        let failed = |error: tss_esapi::Error| classify("begin a policy session", &error);
        let selection = selection(pcrs).map_err(failed)?;
        let symmetric = SymmetricDefinition::AES_128_CFB;
        let session = context
            .execute_without_session(|context| {
                context.start_auth_session(None, None, None, kind, symmetric, HashingAlgorithm::Sha256)
            })
            .map_err(failed)?;
        let session = session.ok_or_else(|| gone("the TPM began no session".into()))?;
        let session = PolicySession::try_from(session).map_err(failed)?;
        // The values that they have now.
        let shown = context.policy_pcr(session, Digest::default(), selection);
        let shown = shown.and_then(|()| if self.auth { context.policy_auth_value(session) } else { Ok(()) });
        if let Err(error) = shown {
            // Why it failed says more than that it cannot be ended.
            let _ = flush(context, session);
            return Err(of_session("begin a policy session", &error));
        }
        Ok(session)
    }
}

/// Of a command whose only handle is a session's: somebody may have ended that.
fn of_session(what: &str, error: &tss_esapi::Error) -> Failure {
    match classify(what, error) {
        failure if code(error) == Some(Code::ReferenceH0) => Failure { class: Class::Busy, ..failure },
        failure => failure,
    }
}

/// Ends a session. Without a resource manager, others may have done so.
fn flush(context: &mut Context, session: PolicySession) -> Result<(), Failure> {
    match context.flush_context(SessionHandle::from(session).into()) {
        Err(error) if code(&error) != Some(Code::Handle) => Err(kept("end the session", &error)),
        _ => Ok(()),
    }
}

fn selection(pcrs: &Pcrs) -> tss_esapi::Result<PcrSelectionList> {
    let bank = match pcrs.bank {
        Bank::Sha256 => HashingAlgorithm::Sha256,
        Bank::Sha384 => HashingAlgorithm::Sha384,
    };
    let slots: Vec<_> =
        pcrs.registers.iter().map(|number| PcrSlot::try_from(1_u32 << number)).collect::<Result<_, _>>()?;
    PcrSelectionList::builder().with_selection(bank, &slots).build()
}
