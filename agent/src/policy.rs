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
    /// Exactly this certificate subject, by its parts, in either order.
    Subject(Vec<String>),
    /// A DNS name in the certificate, lower case.
    Dns(String),
    /// One in which `*` stands for one label, or some of it.
    DnsPattern(String),
    /// A URI in the certificate, such as a SPIFFE id.
    Uri(String),
    /// One in which `*` stands for what is between two slashes, or some of it.
    UriPattern(String),
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
            (Self::Subject(wanted), Identity::Certificate { subject, .. }) => {
                let own = subject_parts(subject);
                own == *wanted || own.iter().eq(wanted.iter().rev())
            }
            (Self::Dns(wanted), Identity::Certificate { dns, .. }) => dns.contains(wanted),
            (Self::DnsPattern(pattern), Identity::Certificate { dns, .. }) => {
                dns.iter().any(|name| fits(pattern, name, '.'))
            }
            (Self::Uri(wanted), Identity::Certificate { uris, .. }) => uris.contains(wanted),
            (Self::UriPattern(pattern), Identity::Certificate { uris, .. }) => {
                uris.iter().any(|uri| fits(pattern, uri, '/'))
            }
            (Self::Fingerprint(wanted), Identity::Certificate { fingerprint, .. }) => wanted == fingerprint,
            (Self::Uid(_) | Self::Gid(_), Identity::Certificate { .. }) | (_, Identity::Unix { .. }) => false,
        }
    }
}

/// The parts of a distinguished name as RFC 4514 writes it, each with its kind in capitals.
fn subject_parts(text: &str) -> Vec<String> {
    let mut escaped = false;
    let between = |character| {
        let splits = character == ',' && !escaped;
        escaped = character == '\\' && !escaped;
        splits
    };
    let part = |part: &str| match part.split_once('=') {
        Some((kind, value)) => format!("{}={value}", kind.to_ascii_uppercase()),
        None => part.to_owned(),
    };
    text.split(between).map(part).collect()
}

/// The same as somebody wrote it, with blanks around what is between commas and equals signs, and OpenSSL's names of kinds.
pub(crate) fn written_subject(text: &str) -> Vec<String> {
    const OTHERS: [(&str, &str); 3] = [("EMAILADDRESS", "EMAIL"), ("E", "EMAIL"), ("S", "ST")];
    let blank = |character| matches!(character, ' ' | '\t');
    let part = |part: String| {
        let (kind, value) = part.split_once('=').unwrap_or((&part, ""));
        let kind = kind.trim_matches(blank);
        let kind = OTHERS.iter().find(|(other, _)| *other == kind).map_or(kind, |(_, known)| known);
        let value = value.trim_start_matches(blank);
        // An escaped blank is one of the value's.
        let end = value.trim_end_matches(blank);
        let value = match end.ends_with('\\') {
            true => value.get(..=end.len()).unwrap_or(value),
            false => end,
        };
        format!("{kind}={value}")
    };
    subject_parts(text).into_iter().map(part).collect()
}

/// Whether a text is one of a pattern's, in which each `*` stands for one character or more, and none that `ends` it.
fn fits(pattern: &str, text: &str, ends: char) -> bool {
    let (mut patterns, mut texts) = (pattern.split(ends), text.split(ends));
    loop {
        match (patterns.next(), texts.next()) {
            (Some(pattern), Some(text)) if fits_part(pattern, text) => {}
            (None, None) => return true,
            _ => return false,
        }
    }
}

/// The same between two ends. Each part of the pattern is looked for once, where it comes first: names are long where
/// somebody chose them so.
fn fits_part(pattern: &str, text: &str) -> bool {
    let mut parts = pattern.split('*');
    let (first, last) = (parts.next().unwrap_or_default(), parts.next_back());
    let (Some(mut rest), Some(last)) = (text.strip_prefix(first), last) else { return pattern == text };
    for part in parts {
        match without_first(rest).and_then(|rest| rest.split_once(part)) {
            Some((_, after)) => rest = after,
            None => return false,
        }
    }
    without_first(rest).is_some_and(|rest| rest.ends_with(last))
}

fn without_first(text: &str) -> Option<&str> {
    let mut chars = text.chars();
    chars.next().map(|_| chars.as_str())
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
            names: [0; 32],
        };
        for (matches, wanted, other) in [
            (Match::Uid(7), &unix, &certificate),
            (Match::Gid(50), &unix, &certificate),
            (Match::Subject(vec!["CN=ci".into()]), &certificate, &unix),
            (Match::Dns("ci.example".into()), &certificate, &unix),
            (Match::DnsPattern("*.example".into()), &certificate, &unix),
            (Match::Uri("spiffe://acme/ci".into()), &certificate, &unix),
            (Match::UriPattern("spiffe://acme/c*".into()), &certificate, &unix),
            (Match::Fingerprint([9; 32]), &certificate, &unix),
        ] {
            assert!(matches.covers(wanted) && !matches.covers(other), "{matches:?}");
        }
        for matches in [
            Match::Uid(8),
            Match::Gid(51),
            Match::Subject(vec!["CN=c".into()]),
            Match::Dns("example".into()),
            Match::DnsPattern("*example".into()),
            Match::Uri("spiffe://acme/".into()),
            Match::UriPattern("spiffe://*".into()),
            Match::Fingerprint([8; 32]),
        ] {
            assert!(!matches.covers(&unix) && !matches.covers(&certificate), "{matches:?}");
        }
        assert!(allowed(&[], &unix).is_none());
    }

    #[test]
    fn subjects_in_either_order_and_patterns_within_their_part() {
        let named = |subject: &str| Identity::Certificate {
            subject: subject.into(),
            dns: Vec::new(),
            uris: Vec::new(),
            fingerprint: [0; 32],
            names: [0; 32],
        };
        let own = named("CN=ci\\, 1,OU=x,O=Acme");
        for (text, same) in [
            ("CN=ci\\, 1,OU=x,O=Acme", true),
            ("O = Acme, OU = x, CN = ci\\, 1", true),
            ("OU=x,O=Acme,CN=ci\\, 1", false),
            ("CN=ci\\, 1,OU=x", false),
            ("CN=ci,1,OU=x,O=Acme", false),
            ("cn=ci\\, 1,ou=x,o=Acme", true),
        ] {
            assert_eq!(Match::Subject(written_subject(text)).covers(&own), same, "{text}");
        }
        // Blanks are the writer's, never the certificate's.
        let rule = Match::Subject(written_subject("O = Acme, CN = ci "));
        assert!(rule.covers(&named("CN=ci,O=Acme")));
        assert!(!rule.covers(&named("CN=ci ,O=Acme")) && !rule.covers(&named("CN=ci\u{a0},O=Acme")));
        assert!(Match::Subject(written_subject("CN=ci\\ , O=Acme")).covers(&named("CN=ci\\ ,O=Acme")));
        assert!(!Match::Subject(written_subject("CN=ci\u{a0},O=Acme")).covers(&named("CN=ci,O=Acme")));
        assert!(Match::Subject(written_subject("CN=a, emailAddress=b@c")).covers(&named("EMAIL=b@c,CN=a")));
        for (pattern, text, expected) in [
            ("*.ci.acme.example", "r1.ci.acme.example", true),
            ("*.ci.acme.example", "a.r1.ci.acme.example", false),
            ("*.ci.acme.example", ".ci.acme.example", false),
            ("runner-*.acme.*", "runner-7.acme.example", true),
            ("runner-*.acme.*", "runner-.acme.example", false),
            ("*", "ä", true),
            ("a*b*c", "abc", false),
            ("a*b*c", "aäbbäc", true),
            ("a*b*c", "abbbc", true),
            ("a*bc", "abc", false),
            ("ci-*-*", "ci-7-", false),
            ("ci-*-*", "ci--7-9-", true),
        ] {
            assert_eq!(fits(pattern, text, '.'), expected, "{pattern} {text}");
        }
        assert!(fits("spiffe://acme/ci/*", "spiffe://acme/ci/7", '/'));
        assert!(!fits("spiffe://acme/ci/*", "spiffe://acme/ci/7/admin", '/'));
        // Somebody's own choice of a name is looked at once: each star once for each character would take minutes.
        let long = format!("spiffe://acme/ci-{}/x", "-".repeat(1 << 20));
        assert!(!fits("spiffe://acme/ci-*-*-*", &long, '/'));
    }
}
