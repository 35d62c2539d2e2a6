//! What may happen to a PKCS#11 token.

use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::ensure;
use omsign_fixtures::ca::Ca;
use omsign_fixtures::kryoptic::Kryoptic;
use omsign_fixtures::softhsm::SoftHsm;

use super::Mishaps;
use crate::agent::eventually;
use crate::world::{World, text};

impl Mishaps {
    /// Takes the objects of the token away: for whoever looks, its keys are deleted.
    pub(super) fn key_deleted(&mut self, pause: Duration) -> anyhow::Result<()> {
        let mut objects = Vec::new();
        for directory in std::fs::read_dir(self.soft.tokens())? {
            for file in std::fs::read_dir(directory?.path())? {
                let file = file?.path();
                // The token itself has its PINs in one.
                let name = file.file_name().unwrap_or_default().to_string_lossy().into_owned();
                if name.ends_with(".object") && name != "token.object" {
                    objects.push(file);
                }
            }
        }
        ensure!(!objects.is_empty(), "no key to delete");
        let away = |file: &Path| file.with_extension("away");
        objects.iter().try_for_each(|file| std::fs::rename(file, away(file)))?;
        self.kill("hsm")?;
        std::thread::sleep(pause);
        Ok(objects.iter().try_for_each(|file| std::fs::rename(away(file), file))?)
    }

    pub(super) fn token_removed(&mut self, pause: Duration) -> anyhow::Result<()> {
        let away = self.world.path("away");
        std::fs::rename(self.soft.tokens(), &away)?;
        std::thread::sleep(pause);
        Ok(std::fs::rename(&away, self.soft.tokens())?)
    }

    /// One of the same name without keys takes its place.
    pub(super) fn token_anew(&mut self, pause: Duration) -> anyhow::Result<()> {
        let away = self.world.path("away");
        std::fs::rename(self.soft.tokens(), &away)?;
        std::fs::create_dir(self.soft.tokens())?;
        self.soft.initialise()?;
        self.kill("hsm")?;
        std::thread::sleep(pause);
        std::fs::rename(self.soft.tokens(), self.world.path("anew"))?;
        std::fs::rename(&away, self.soft.tokens())?;
        Ok(std::fs::remove_dir_all(self.world.path("anew"))?)
    }

    pub(super) fn certificate_swapped(&mut self, pause: Duration) -> anyhow::Result<()> {
        let becomes = |file: &Path| {
            let id = hex::encode("hsm");
            self.soft.tool(&["--delete-object", "--type", "cert", "--label", "hsm"])?;
            let write = ["--write-object", &text(file), "--type", "cert", "--label", "hsm", "--id", &id];
            self.soft.tool(&write)
        };
        let [own, others] = &self.certificates;
        becomes(others)?;
        self.kill("hsm")?;
        std::thread::sleep(pause);
        becomes(own)
    }

    /// What the token has, and another that says nothing of its key.
    pub fn certificates(world: &World, soft: &SoftHsm) -> anyhow::Result<[PathBuf; 2]> {
        let own = world.path("own.der");
        soft.tool(&["--read-object", "--type", "cert", "--label", "hsm", "--output-file", &text(&own)])?;
        Ok([own, world.write("others.der", Ca::create("Others")?.certificate.to_der()?)?])
    }

    pub(super) fn hsm_told_wrong(&mut self, _: Duration) -> anyhow::Result<()> {
        self.refused[0] += self.told_wrong("hsm", &self.soft.pin_file(), b"wrong-pin-5714\n")?;
        Ok(())
    }

    pub(super) fn kry_told_wrong(&mut self, _: Duration) -> anyhow::Result<()> {
        self.refused[1] += self.told_wrong("kry", &self.kry.pin_file(), b"wrong-pin-5714\n")?;
        Ok(())
    }

    /// Somebody else has entered wrong PINs, of which it takes ten; then somebody comes with the security officer's. In a
    /// copy, which takes its place: whoever logs in with the right one meanwhile makes it forget them.
    pub(super) fn kry_pin(&mut self, pause: Duration, wrong: usize) -> anyhow::Result<()> {
        let copy = self.kry.copy(&self.world.path("copy"))?;
        let list = ["--login", "--pin", "not-the-pin-6", "--token-label", copy.label(), "--list-objects"];
        for _ in 0..wrong {
            ensure!(copy.tool(&list).is_err(), "a wrong PIN was taken");
        }
        let flag = if wrong < 10 { "final user PIN try" } else { "user PIN locked" };
        let slots = copy.tool(&["--list-slots"])?;
        ensure!(slots.contains(flag), "its flags do not say {flag}: {slots}");
        std::fs::rename(copy.store(), self.kry.store())?;
        self.kill("kry")?;
        eventually("it offers none", || self.is("kry", "locked"))?;
        std::thread::sleep(pause);
        self.kry.set_pin()
    }

    /// One of the same name without keys takes its place.
    pub(super) fn kry_anew(&mut self, pause: Duration) -> anyhow::Result<()> {
        let (away, other) = (self.world.path("kry-away"), self.world.path("kry-anew"));
        let other = Kryoptic::create(&other, self.kry.label())?;
        std::fs::rename(self.kry.store(), &away)?;
        std::fs::rename(other.store(), self.kry.store())?;
        self.kill("kry")?;
        std::thread::sleep(pause);
        std::fs::rename(&away, self.kry.store())?;
        // It may have the file open that was in between.
        self.kill("kry")
    }

    pub(super) fn kry_removed(&mut self, pause: Duration) -> anyhow::Result<()> {
        let away = self.world.path("kry-away");
        std::fs::rename(self.kry.store(), &away)?;
        self.kill("kry")?;
        std::thread::sleep(pause);
        Ok(std::fs::rename(&away, self.kry.store())?)
    }
}
