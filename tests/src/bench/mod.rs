//! Benchmarks: our figure beside its limit, both from the same run. Never asserted: machines are noisy.

pub mod device;
pub mod hash;
pub mod sign;
pub mod verify;

use std::fmt::Write as _;

/// One figure.
#[derive(Clone, Debug)]
pub struct Row {
    /// What was measured.
    pub what: String,
    /// The figure.
    pub figure: f64,
    /// Its unit.
    pub unit: &'static str,
    /// What it should be, if something was promised.
    pub limit: Option<Limit>,
}

/// What a figure should be.
#[derive(Clone, Copy, Debug)]
pub enum Limit {
    /// No less than this.
    AtLeast(f64),
    /// No more than this.
    AtMost(f64),
}

impl Row {
    /// A figure without a promise.
    pub fn plain(what: impl Into<String>, figure: f64, unit: &'static str) -> Self {
        Self { what: what.into(), figure, unit, limit: None }
    }

    /// A figure with one.
    pub fn limited(what: impl Into<String>, figure: f64, unit: &'static str, limit: Limit) -> Self {
        Self { limit: Some(limit), ..Self::plain(what, figure, unit) }
    }

    fn kept(&self) -> Option<bool> {
        self.limit.map(|limit| match limit {
            Limit::AtLeast(least) => self.figure >= least,
            Limit::AtMost(most) => self.figure <= most,
        })
    }
}

/// The rows as a table for people.
pub fn table(rows: &[Row]) -> String {
    let width = rows.iter().map(|row| row.what.chars().count()).max().unwrap_or(0);
    let mut text = String::new();
    for row in rows {
        let limit = match (row.limit, row.kept()) {
            (Some(Limit::AtLeast(least)), Some(kept)) => {
                format!("≥ {least} {}", if kept { "yes" } else { "NO" })
            }
            (Some(Limit::AtMost(most)), Some(kept)) => {
                format!("≤ {most} {}", if kept { "yes" } else { "NO" })
            }
            _ => String::new(),
        };
        let padding = " ".repeat(width - row.what.chars().count());
        let _ = writeln!(text, "{}{padding}  {:>10.2} {:<6} {limit}", row.what, row.figure, row.unit);
    }
    text
}

/// The rows for programs.
pub fn json(name: &str, rows: &[Row]) -> serde_json::Value {
    let row = |row: &Row| {
        let (least, most) = match row.limit {
            Some(Limit::AtLeast(least)) => (Some(least), None),
            Some(Limit::AtMost(most)) => (None, Some(most)),
            None => (None, None),
        };
        serde_json::json!({
            "what": row.what, "figure": row.figure, "unit": row.unit, "at_least": least, "at_most": most,
        })
    };
    serde_json::json!({ "bench": name, "rows": rows.iter().map(row).collect::<Vec<_>>() })
}
