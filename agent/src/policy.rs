//! May this identity use this key? Whatever no rule allows is denied.

use crate::identity::Identity;

/// One `[[key.NAME.allow]]` or `[[operator]]`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Rule {
    /// Its `name`, or its place in the file, such as `key.release.allow[0]`.
    pub name: String,
    /// Whom it lets in.
    pub matches: Match,
}

/// Whom a rule lets in.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Match {
    /// This Unix user.
    Uid(u32),
    /// Members of this Unix group.
    Gid(u32),
    /// Exactly this certificate subject, as RFC 4514 writes it.
    Subject(String),
    /// A DNS name in the certificate, lower case.
    Dns(String),
    /// A URI in the certificate, such as a SPIFFE id.
    Uri(String),
    /// This certificate, by its SHA-256.
    Fingerprint([u8; 32]),
}

/// The first rule that lets this identity in.
pub fn allowed<'a>(rules: &'a [Rule], identity: &Identity) -> Option<&'a Rule> {
    rules.iter().find(|rule| rule.matches.covers(identity))
}

impl Match {
    fn covers(&self, identity: &Identity) -> bool {
        match (self, identity) {
            (Self::Uid(wanted), Identity::Unix { uid, .. }) => wanted == uid,
            (Self::Gid(wanted), Identity::Unix { groups, .. }) => groups.contains(wanted),
            (Self::Subject(wanted), Identity::Certificate { subject, .. }) => wanted == subject,
            (Self::Dns(wanted), Identity::Certificate { dns, .. }) => dns.contains(wanted),
            (Self::Uri(wanted), Identity::Certificate { uris, .. }) => uris.contains(wanted),
            (Self::Fingerprint(wanted), Identity::Certificate { fingerprint, .. }) => wanted == fingerprint,
            (Self::Uid(_) | Self::Gid(_), Identity::Certificate { .. }) => false,
            (
                Self::Subject(_) | Self::Dns(_) | Self::Uri(_) | Self::Fingerprint(_),
                Identity::Unix { .. },
            ) => false,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_match_covers_its_identity_and_no_other() {
        let unix = Identity::Unix { uid: 7, user: None, pid: None, groups: vec![7, 50] };
        let certificate = Identity::Certificate {
            subject: "CN=ci".into(),
            dns: vec!["ci.example".into()],
            uris: vec!["spiffe://acme/ci".into()],
            fingerprint: [9; 32],
        };
        for (matches, wanted, other) in [
            (Match::Uid(7), &unix, &certificate),
            (Match::Gid(50), &unix, &certificate),
            (Match::Subject("CN=ci".into()), &certificate, &unix),
            (Match::Dns("ci.example".into()), &certificate, &unix),
            (Match::Uri("spiffe://acme/ci".into()), &certificate, &unix),
            (Match::Fingerprint([9; 32]), &certificate, &unix),
        ] {
            assert!(matches.covers(wanted) && !matches.covers(other), "{matches:?}");
        }
        for matches in [
            Match::Uid(8),
            Match::Gid(51),
            Match::Subject("CN=c".into()),
            Match::Dns("example".into()),
            Match::Uri("spiffe://acme/".into()),
            Match::Fingerprint([8; 32]),
        ] {
            assert!(!matches.covers(&unix) && !matches.covers(&certificate), "{matches:?}");
        }
        assert!(allowed(&[], &unix).is_none());
    }
}
