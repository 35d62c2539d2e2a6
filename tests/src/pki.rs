//! A PKI that can also do what none should: OpenSSL's own `ca`, `crl` and `ts` commands, in a test's directory.

use std::path::PathBuf;
use std::process::Command;

use anyhow::{Context as _, ensure};

use crate::world::World;

/// A PKI whose files `NAME.pem` and `NAME.key` lie in the world's directory.
pub struct Pki<'a> {
    world: &'a World,
    /// Digits of fractions of a second in time stamps.
    pub fraction_digits: u8,
    /// Hash of the authority's own signature.
    pub signer_digest: &'static str,
    /// What it says of its clock.
    pub accuracy_seconds: u32,
}

/// What to certify.
#[derive(Clone, Copy)]
pub struct Certificate<'a> {
    /// As `openssl genpkey` takes it: the algorithm and its options.
    pub key: &'a str,
    /// Lines of an extension section.
    pub extensions: &'a str,
    /// `YYYYMMDDhhmmssZ`.
    pub from: &'a str,
    /// `YYYYMMDDhhmmssZ`.
    pub until: &'a str,
    /// Hash of the issuer's signature, and further options of `openssl ca`.
    pub issuer_options: &'a str,
}

/// ECDSA P-256.
pub const P256: &str = "EC -pkeyopt ec_paramgen_curve:P-256";
/// Extensions of a CA.
pub const CA: &str = "basicConstraints = critical, CA:TRUE\nkeyUsage = critical, keyCertSign, cRLSign\n";
/// Extensions of a signer of models.
pub const SIGNER: &str = "basicConstraints = critical, CA:FALSE\nkeyUsage = critical, digitalSignature\nextendedKeyUsage = codeSigning\n";
/// Extensions of a time-stamp authority (RFC 3161, 2.3).
pub const TSA: &str = "basicConstraints = critical, CA:FALSE\nkeyUsage = critical, digitalSignature\nextendedKeyUsage = critical, timeStamping\n";

impl Default for Certificate<'_> {
    fn default() -> Self {
        Self {
            key: P256,
            extensions: SIGNER,
            from: "20200101000000Z",
            until: "20490101000000Z",
            issuer_options: "-md sha256",
        }
    }
}

impl<'a> Pki<'a> {
    /// In this world.
    pub fn new(world: &'a World) -> Self {
        Self { world, fraction_digits: 0, signer_digest: "sha256", accuracy_seconds: 1 }
    }

    fn openssl(&self, arguments: &str) -> anyhow::Result<()> {
        self.openssl_at(None, arguments)
    }

    /// Runs `openssl`, at another time where one is given.
    fn openssl_at(&self, time: Option<&str>, arguments: &str) -> anyhow::Result<()> {
        let mut command = match time {
            Some(time) => {
                let mut command = Command::new("faketime");
                command.args([time, "openssl"]);
                command
            }
            None => Command::new("openssl"),
        };
        let output = command.args(arguments.split_whitespace()).current_dir(self.world.path("")).output()?;
        ensure!(output.status.success(), "openssl {arguments}: {}", String::from_utf8_lossy(&output.stderr));
        Ok(())
    }

    /// Makes a self-signed CA.
    pub fn root(&self, name: &str) -> anyhow::Result<()> {
        self.issue(name, name, Certificate { extensions: CA, ..Certificate::default() })
    }

    /// Makes `NAME.key` and certifies it as `CN=NAME` in `NAME.pem`. An issuer of the same name makes it self-signed.
    pub fn issue(&self, name: &str, issuer: &str, certificate: Certificate<'_>) -> anyhow::Result<()> {
        let Certificate { key, extensions, from, until, issuer_options } = certificate;
        let config = format!(
            "[ca]\ndefault_ca = d\n[d]\ndatabase = {issuer}.index\nnew_certs_dir = .\nrand_serial = yes\n\
             policy = any\nunique_subject = no\ndefault_crl_days = 30\ncertificate = {issuer}.pem\n\
             private_key = {issuer}.key\ndefault_md = sha256\n[any]\ncommonName = optional\n\
             organizationName = optional\nemailAddress = optional\n[extensions]\nsubjectKeyIdentifier = hash\nauthorityKeyIdentifier = keyid\n{extensions}"
        );
        self.world.write(&format!("{issuer}.cnf"), config)?;
        if !self.world.path(&format!("{issuer}.index")).exists() {
            self.world.write(&format!("{issuer}.index"), "")?;
        }
        self.openssl(&format!("genpkey -algorithm {key} -out {name}.key"))?;
        self.openssl(&format!("req -new -key {name}.key -subj /CN={name} -out {name}.csr"))?;
        let selfsign = if name == issuer { "-selfsign" } else { "" };
        self.openssl(&format!(
            "ca -batch -notext -config {issuer}.cnf {selfsign} -startdate {from} -enddate {until} -in {name}.csr \
             -extensions extensions -out {name}.pem {issuer_options}"
        ))
    }

    /// Has a CA revoke a certificate.
    pub fn revoke(&self, issuer: &str, name: &str) -> anyhow::Result<()> {
        self.openssl(&format!("ca -batch -config {issuer}.cnf -revoke {name}.pem"))
    }

    /// Writes what a CA revoked to `ISSUER.crl`; `options` of `openssl ca -gencrl`.
    pub fn crl(&self, issuer: &str, options: &str) -> anyhow::Result<()> {
        self.crl_with(issuer, "", options)
    }

    /// The same with extensions of the list.
    pub fn crl_with(&self, issuer: &str, extensions: &str, options: &str) -> anyhow::Result<()> {
        let options = if extensions.is_empty() {
            options.to_owned()
        } else {
            let config = std::fs::read_to_string(self.world.path(&format!("{issuer}.cnf")))?;
            self.world.write(&format!("{issuer}.cnf"), format!("{config}\n[crl]\n{extensions}"))?;
            format!("-crlexts crl {options}")
        };
        self.openssl(&format!("ca -batch -config {issuer}.cnf -gencrl {options} -out {issuer}.crl"))
    }

    /// Puts certificates together in one file.
    pub fn bundle(&self, file: &str, names: &[&str]) -> anyhow::Result<PathBuf> {
        let mut pem = String::new();
        for name in names {
            pem +=
                &std::fs::read_to_string(self.world.path(&format!("{name}.pem"))).context("a certificate")?;
        }
        self.world.write(file, pem)
    }

    /// Has a time-stamp authority (certified with [`TSA`]) stamp a signature, at a time like `2021-06-01 12:00:00`.
    /// Returns its TimeStampResp. `options` of `openssl ts -query`.
    pub fn stamp(
        &self,
        tsa: &str,
        signature: &[u8],
        time: Option<&str>,
        options: &str,
    ) -> anyhow::Result<Vec<u8>> {
        self.world.write("stamped", signature)?;
        let config = format!(
            "[tsa]\ndefault_tsa = t\n[t]\nserial = ts.serial\ncrypto_device = builtin\nsigner_digest = {}\n\
             default_policy = 1.2.3.4.1\nother_policies = 1.2.3.4.1\ndigests = sha1, sha256, sha384, sha512\n\
             accuracy = secs:{}\nclock_precision_digits = {}\nordering = yes\ntsa_name = no\n\
             ess_cert_id_chain = no\ness_cert_id_alg = sha256\n",
            self.signer_digest, self.accuracy_seconds, self.fraction_digits
        );
        self.world.write("ts.cnf", config)?;
        self.openssl(&format!("ts -query -data stamped {options} -out stamp.tsq"))?;
        self.openssl_at(
            time,
            &format!(
                "ts -reply -config ts.cnf -queryfile stamp.tsq -signer {tsa}.pem -inkey {tsa}.key -out stamp.tsr"
            ),
        )?;
        Ok(std::fs::read(self.world.path("stamp.tsr"))?)
    }
}
