//! Which name is meant: one, or any that a pattern matches.

use std::fmt;

use globset::{GlobBuilder, GlobMatcher};

/// A name, or a pattern of names.
#[derive(Clone, Debug)]
pub enum Wanted {
    /// This one.
    Exactly(String),
    /// Those that this matches, as a whole: `*` is anything but `/`, `**` as a part between slashes any parts,
    /// `?`, `[…]` and `{…,…}` as in a shell.
    Pattern(GlobMatcher),
}

/// Not a pattern.
#[derive(Debug, thiserror::Error)]
#[error("{0:?} is not a pattern: {1}")]
pub struct PatternError(String, String);

impl Wanted {
    /// Parses a pattern.
    pub fn pattern(text: &str) -> Result<Self, PatternError> {
        let glob = GlobBuilder::new(text).literal_separator(true).build();
        let glob = glob.map_err(|error| PatternError(text.to_owned(), error.kind().to_string()))?;
        Ok(Self::Pattern(glob.compile_matcher()))
    }

    /// Whether this name is meant.
    pub fn is(&self, name: &str) -> bool {
        match self {
            Self::Exactly(wanted) => wanted == name,
            Self::Pattern(pattern) => pattern.is_match(name),
        }
    }
}

impl fmt::Display for Wanted {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Exactly(name) => f.write_str(name),
            Self::Pattern(pattern) => write!(f, "a match of {}", pattern.glob()),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn patterns_match_the_whole_name_and_stars_stop_at_slashes() {
        let workflow = "https://github.com/acme/models/.github/workflows/release.yml@refs/tags/v1";
        let matches = |pattern: &str, name: &str| Wanted::pattern(pattern).expect("a pattern").is(name);
        assert!(matches(
            "https://github.com/acme/models/.github/workflows/release.yml@refs/tags/*",
            workflow
        ));
        assert!(matches("https://github.com/acme/**", workflow));
        assert!(!matches("https://github.com/acme/*", workflow));
        assert!(!matches(
            "https://github.com/acme/models/.github/workflows/*@refs/tags/*",
            &format!("{workflow}/2")
        ));
        assert!(!matches("github.com/acme/**", workflow));
        assert!(matches("*@acme.com", "ann@acme.com"));
        for name in ["ann@acme.com.evil.org", "ann@evilacme.com", "x/ann@acme.com"] {
            assert!(!matches("*@acme.com", name), "{name}");
        }
        assert!(Wanted::pattern("a[").is_err());
        assert!(!Wanted::Exactly("*".into()).is("a"));
    }
}
