//! The crate's log lines, kept until somebody takes them.

use std::collections::VecDeque;
use std::fmt::{self, Write as _};
use std::sync::{Arc, Mutex, PoisonError};

use slog::{Drain, Key, Level, Logger, Never, OwnedKVList, Record, Serializer, KV};

const MAX_LINES: usize = 256;
const MAX_CHARACTERS: usize = 500;

type Kept = Arc<Mutex<VecDeque<(Level, String)>>>;

/// The newest lines of level `Info` and above.
#[derive(Default)]
pub struct Lines {
    kept: Kept,
}

struct Sink {
    kept: Kept,
}

struct Pairs<'a> {
    line: &'a mut String,
}

impl Serializer for Pairs<'_> {
    fn emit_arguments(&mut self, key: Key, value: &fmt::Arguments) -> slog::Result {
        write!(self.line, " {key}={value}").map_err(Into::into)
    }
}

impl Drain for Sink {
    type Ok = ();
    type Err = Never;

    fn log(&self, record: &Record, _: &OwnedKVList) -> Result<(), Never> {
        // Below this level stand times drawn at random that are replaced, and whole messages.
        if !record.level().is_at_least(Level::Info) {
            return Ok(());
        }
        let mut line = record.msg().to_string();
        // Writing to a string cannot fail.
        let _ = record
            .kv()
            .serialize(record, &mut Pairs { line: &mut line });
        push(&self.kept, record.level(), line);
        Ok(())
    }
}

fn push(kept: &Kept, level: Level, mut line: String) {
    if let Some((cut, _)) = line.char_indices().nth(MAX_CHARACTERS) {
        line.truncate(cut);
    }
    let mut kept = kept.lock().unwrap_or_else(PoisonError::into_inner);
    if kept.len() == MAX_LINES {
        kept.pop_front();
    }
    kept.push_back((level, line));
}

impl Lines {
    /// A logger that writes here.
    pub fn logger(&self) -> Logger {
        let kept = Arc::clone(&self.kept);
        Logger::root(Sink { kept }, slog::o!())
    }

    /// Add a line of our own.
    pub fn warn(&self, line: String) {
        push(&self.kept, Level::Warning, line);
    }

    /// Take all lines, oldest first.
    pub fn take(&self) -> Vec<(&'static str, String)> {
        let mut kept = self.kept.lock().unwrap_or_else(PoisonError::into_inner);
        kept.drain(..)
            .map(|(level, line)| (name(level), line))
            .collect()
    }
}

fn name(level: Level) -> &'static str {
    match level {
        Level::Critical => "critical",
        Level::Error => "error",
        Level::Warning => "warning",
        Level::Info | Level::Debug | Level::Trace => "info",
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn keeps_the_newest_lines_with_their_facts() {
        let lines = Lines::default();
        let logger = lines.logger();
        slog::debug!(logger, "not this");
        slog::info!(logger, "voted for {}", 2; "term" => 7);
        slog::error!(logger, "{}", "é".repeat(2 * MAX_CHARACTERS));
        let taken = lines.take();
        assert_eq!(taken[0], ("info", "voted for 2 term=7".to_string()));
        assert_eq!(taken[1].1.chars().count(), MAX_CHARACTERS);
        assert_eq!(taken.len(), 2);
        for i in 0..1000 {
            lines.warn(i.to_string());
        }
        let taken = lines.take();
        assert_eq!(taken.len(), MAX_LINES);
        assert_eq!(taken[MAX_LINES - 1], ("warning", "999".to_string()));
        assert!(lines.take().is_empty());
    }
}
