//! What may happen to a TPM and to a card.

use std::time::Duration;

use anyhow::ensure;
use omsign_fixtures::piv::{self, Faults};
use omsign_fixtures::swtpm::AUTH;
use rustix::process::Signal;

use super::Mishaps;
use crate::agent::{eventually, freeze, signal};

impl Mishaps {
    /// It counts a cut while a guarded key is in use as a wrong value, and lets nobody in after a few.
    fn forgive(&self, allowed: u32) -> anyhow::Result<()> {
        let counted = self.chip.failed_tries()?;
        ensure!(
            counted <= allowed,
            "the TPM was given {counted} wrong values, of which {allowed} are others'"
        );
        self.does("tpm2_dictionarylockout", &["-c"])
    }

    /// Whoever opens a simulator clears it of what others have loaded, and the agent may do that just now.
    fn does(&self, tool: &str, arguments: &[&str]) -> anyhow::Result<()> {
        let once = || {
            self.chip.tool(tool, |tool| {
                tool.args(arguments);
            })
        };
        eventually(tool, || Ok(once().is_ok()))
    }

    pub(super) fn tpm_off(&mut self, pause: Duration) -> anyhow::Result<()> {
        self.chip.kill()?;
        std::thread::sleep(pause);
        ensure!(self.chip.start()?, "the TPM's port is taken");
        self.forgive(1)
    }

    /// What is on its way to it, nobody answers.
    pub(super) fn tpm_cut(&mut self, pause: Duration) -> anyhow::Result<()> {
        freeze(self.chip.swtpm()?)?;
        std::thread::sleep(pause);
        self.tpm_off(pause)
    }

    /// And is as it was before, or it would have another key for good.
    pub(super) fn tpm_cleared(&mut self, pause: Duration) -> anyhow::Result<()> {
        self.chip.kill()?;
        let kept = self.chip.state()?;
        ensure!(self.chip.start()?, "the TPM's port is taken");
        self.does("tpm2_clear", &["-Q", "-c", "p"])?;
        std::thread::sleep(pause);
        self.chip.kill()?;
        self.chip.set_state(&kept)?;
        ensure!(self.chip.start()?, "the TPM's port is taken");
        self.forgive(1)
    }

    pub(super) fn tpm_reset(&mut self, pause: Duration) -> anyhow::Result<()> {
        self.chip.reset()?;
        std::thread::sleep(pause);
        // Whoever is first starts it.
        let _ = self.chip.tool("tpm2_startup", |tool| {
            tool.arg("-c");
        });
        self.forgive(1)
    }

    pub(super) fn tpm_still(&mut self, pause: Duration) -> anyhow::Result<()> {
        signal(self.chip.swtpm()?, Signal::STOP)?;
        std::thread::sleep(pause);
        signal(self.chip.swtpm()?, Signal::CONT)
    }

    /// It comes from the same seed: the same key, put back.
    pub(super) fn tpm_key_deleted(&mut self, pause: Duration) -> anyhow::Result<()> {
        self.does("tpm2_evictcontrol", &["-Q", "-C", "o", "-c", "0x81000010"])?;
        self.kill("tpm")?;
        std::thread::sleep(pause);
        eventually("its key", || Ok(self.chip.put_back("tpm", 0x8100_0010).is_ok()))
    }

    pub(super) fn tpm_lockout(&mut self, pause: Duration) -> anyhow::Result<()> {
        let (digest, unread) = (self.world.write("digest", [7; 32])?, self.world.path("unread"));
        // Three wrong values are all that it counts; then it takes no right one either.
        for value in ["wrong", "wrong", "wrong", AUTH] {
            let refused = self.chip.tool("tpm2_sign", |tool| {
                tool.args(["-Q", "-c", "0x81000010", "-p", value, "-g", "sha256", "-d", "-o"]);
                tool.arg(&unread).arg(&digest);
            });
            ensure!(refused.is_err(), "a value was taken");
        }
        std::thread::sleep(pause);
        self.forgive(3)
    }

    pub(super) fn card_pulled(&mut self, pause: Duration) -> anyhow::Result<()> {
        self.card.unplug();
        std::thread::sleep(pause);
        self.card.plug();
        Ok(())
    }

    pub(super) fn card_does(&mut self, pause: Duration, faults: Faults) -> anyhow::Result<()> {
        self.card.set(faults);
        std::thread::sleep(pause);
        self.card.set(Faults::default());
        Ok(())
    }

    /// Somebody else enters wrong PINs. Three block it until somebody comes with the PUK.
    pub(super) fn card_pin(&mut self, pause: Duration, wrong: usize) -> anyhow::Result<()> {
        self.card.enter_wrong_pins(wrong);
        self.wrong_pins += wrong;
        self.kill("card")?;
        std::thread::sleep(pause);
        // It may have been low before.
        let left = usize::from(self.card.pin_tries()?);
        ensure!(left <= 3 - wrong, "{left} tries are left after {wrong} wrong PINs");
        if left == 0 {
            self.card.tool(&["-a", "unblock-pin", "-P", "12345678", "-N", piv::PIN])?;
        }
        Ok(())
    }

    pub(super) fn card_key_deleted(&mut self, pause: Duration) -> anyhow::Result<()> {
        self.card.delete(0x9a);
        self.kill("card")?;
        std::thread::sleep(pause);
        self.put_card_key()
    }

    /// It has the factory's PIN then, and ours is wrong once.
    pub(super) fn card_reset(&mut self, pause: Duration) -> anyhow::Result<()> {
        self.card.reset()?;
        self.kill("card")?;
        eventually("its refusal", || self.is("card", "locked"))?;
        std::thread::sleep(pause);
        // It counts from nothing again.
        self.wrong_pins = self.card.wrong_pins();
        ensure!(self.wrong_pins <= 1, "it was shown {} wrong PINs", self.wrong_pins);
        self.card.change_pin()?;
        self.put_card_key()
    }

    /// The agent may use the card just now.
    fn put_card_key(&self) -> anyhow::Result<()> {
        eventually("its key", || Ok(self.card.import("9a", &self.card_key).is_ok()))
    }

    pub(super) fn card_and_reader_pulled(&mut self, pause: Duration) -> anyhow::Result<()> {
        self.card.kill_service()?;
        self.card.start_service_without_readers()?;
        std::thread::sleep(pause);
        self.pcscd_ends(Duration::ZERO)
    }

    pub(super) fn pcscd_ends(&mut self, pause: Duration) -> anyhow::Result<()> {
        self.card.kill_service()?;
        std::thread::sleep(pause);
        self.card.start_service()
    }

    /// More than it has room for, and a process that has to find room for what it loads.
    pub(super) fn tpm_full(&mut self, pause: Duration) -> anyhow::Result<()> {
        for _ in 0..4 {
            // Whoever opens a simulator clears it of what others have loaded.
            let _ = self.chip.tool("tpm2_createprimary", |tool| {
                tool.args(["-Q", "-C", "o", "-G", "ecc"]);
            });
        }
        self.kill("tpm")?;
        std::thread::sleep(pause);
        Ok(())
    }

    pub(super) fn tpm_value_wrong(&mut self, _: Duration) -> anyhow::Result<()> {
        self.told_wrong("tpm", &self.chip.pin_file(), b"wrong-auth-5714\n")?;
        self.forgive(1)
    }

    pub(super) fn card_told_wrong(&mut self, _: Duration) -> anyhow::Result<()> {
        self.wrong_pins += self.told_wrong("card", &self.card.pin_file(), b"97531864\n")?;
        Ok(())
    }
}
