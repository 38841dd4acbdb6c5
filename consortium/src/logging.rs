//! Log lines of nodes: every line carries node, session, job, step and peer, `-` where there is
//! none, so that the logs of four institutions can be joined by column.

use std::fmt;
use std::io::{self, IsTerminal};
use std::sync::{Mutex, PoisonError};

use tracing::field::{Field, Visit};
use tracing::{Event, Level, Subscriber, span};
use tracing_subscriber::fmt::format::Writer;
use tracing_subscriber::fmt::time::{FormatTime, SystemTime};
use tracing_subscriber::fmt::{FmtContext, FormatEvent, FormatFields};
use tracing_subscriber::layer::{Context, SubscriberExt};
use tracing_subscriber::registry::LookupSpan;
use tracing_subscriber::util::SubscriberInitExt;
use tracing_subscriber::{EnvFilter, Layer};

use crate::meeting::unix_ms;

/// The fields that every line has, in this order. Spans that carry one are error spans, so that no
/// filter takes the field away.
const COLUMNS: [&str; 5] = ["node", "session", "job", "step", "peer"];

/// Logs to standard error; `RUST_LOG` goes before `filter`. Only the first call counts.
pub fn init(filter: &str) -> Result<(), String> {
    let filter = match std::env::var("RUST_LOG") {
        Ok(text) if !text.is_empty() => {
            EnvFilter::try_new(text).map_err(|err| format!("RUST_LOG: {err}"))
        }
        _ => EnvFilter::try_new(filter).map_err(|err| format!("log = {filter:?}: {err}")),
    }?;
    let lines = tracing_subscriber::fmt::layer()
        .with_writer(io::stderr)
        .with_ansi(io::stderr().is_terminal())
        .event_format(Line);
    // An error means that the process logs already.
    let _ = tracing_subscriber::registry()
        .with(filter)
        .with(Keep)
        .with(lines)
        .try_init();
    Ok(())
}

/// The last thing that this process logged as a warning or an error: when, in milliseconds since
/// 1970, and what.
pub fn last_trouble() -> Option<(u64, String)> {
    LAST.lock().unwrap_or_else(PoisonError::into_inner).clone()
}

static LAST: Mutex<Option<(u64, String)>> = Mutex::new(None);
/// Longest text of it that is kept.
const LAST_MAX_CHARS: usize = 400;

/// Values of the columns, and what else there is to say.
#[derive(Clone, Default)]
struct Columns {
    values: [Option<String>; COLUMNS.len()],
    message: String,
    others: String,
}

impl Visit for Columns {
    fn record_str(&mut self, field: &Field, value: &str) {
        // Of texts only the message and columns go without quotes.
        if field.name() == "message" || COLUMNS.contains(&field.name()) {
            self.record_debug(field, &format_args!("{value}"));
        } else {
            self.record_debug(field, &value);
        }
    }

    fn record_debug(&mut self, field: &Field, value: &dyn fmt::Debug) {
        use fmt::Write;
        let place = COLUMNS.iter().position(|column| *column == field.name());
        // Writing to a String cannot fail.
        let _ = match (place, field.name()) {
            (Some(place), _) => {
                self.values[place] = Some(format!("{value:?}"));
                Ok(())
            }
            (None, "message") => write!(self.message, "{value:?}"),
            (None, name) => write!(self.others, " {name}={value:?}"),
        };
    }
}

/// Keeps the columns of a span with it.
struct Keep;

impl<S: Subscriber + for<'a> LookupSpan<'a>> Layer<S> for Keep {
    fn on_new_span(&self, attributes: &span::Attributes<'_>, id: &span::Id, ctx: Context<'_, S>) {
        let mut columns = Columns::default();
        attributes.record(&mut columns);
        if let Some(span) = ctx.span(id) {
            span.extensions_mut().insert(columns);
        }
    }

    fn on_event(&self, event: &Event<'_>, _: Context<'_, S>) {
        if *event.metadata().level() > Level::WARN {
            return;
        }
        let mut said = Columns::default();
        event.record(&mut said);
        let peer = said.values[COLUMNS.len() - 1].take();
        let peer = peer.map_or(String::new(), |peer| format!("{peer}: "));
        let text = format!("{peer}{}{}", said.message, said.others);
        let text = text.chars().take(LAST_MAX_CHARS).collect();
        *LAST.lock().unwrap_or_else(PoisonError::into_inner) = Some((unix_ms(), text));
    }
}

/// `TIME LEVEL node=.. session=.. job=.. step=.. peer=.. target: message other=..`
struct Line;

impl<S, N> FormatEvent<S, N> for Line
where
    S: Subscriber + for<'a> LookupSpan<'a>,
    N: for<'a> FormatFields<'a> + 'static,
{
    fn format_event(
        &self,
        ctx: &FmtContext<'_, S, N>,
        mut writer: Writer<'_>,
        event: &Event<'_>,
    ) -> fmt::Result {
        let mut line = Columns::default();
        for span in ctx
            .event_scope()
            .into_iter()
            .flat_map(|scope| scope.from_root())
        {
            if let Some(kept) = span.extensions().get::<Columns>() {
                for (value, kept) in line.values.iter_mut().zip(&kept.values) {
                    *value = kept.clone().or(value.take());
                }
                line.others.push_str(&kept.others);
            }
        }
        event.record(&mut line);
        SystemTime.format_time(&mut writer)?;
        write!(writer, " {:>5}", event.metadata().level())?;
        for (column, value) in COLUMNS.iter().zip(&line.values) {
            write!(writer, " {column}={}", value.as_deref().unwrap_or("-"))?;
        }
        writeln!(
            writer,
            " {}: {}{}",
            event.metadata().target(),
            line.message,
            line.others
        )
    }
}

#[cfg(test)]
mod tests {
    use std::sync::{Arc, Mutex, PoisonError};

    use super::*;

    #[derive(Clone, Default)]
    struct Written(Arc<Mutex<Vec<u8>>>);

    impl io::Write for Written {
        fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
            self.0
                .lock()
                .unwrap_or_else(PoisonError::into_inner)
                .write(bytes)
        }

        fn flush(&mut self) -> io::Result<()> {
            Ok(())
        }
    }

    #[test]
    fn every_line_has_every_column_and_spans_fill_them_at_any_level() {
        let written = Written::default();
        let writer = written.clone();
        let lines = tracing_subscriber::fmt::layer()
            .with_writer(move || writer.clone())
            .with_ansi(false)
            .event_format(Line);
        let subscriber = tracing_subscriber::registry()
            .with(EnvFilter::new("warn"))
            .with(Keep)
            .with(lines);
        tracing::subscriber::with_default(subscriber, || {
            tracing::warn!(peer = %"P2", reason = "gone", "link closed");
            let _node = tracing::error_span!("party", node = %"P1").entered();
            let _job = tracing::error_span!("job", job = %"abc").entered();
            let _session = tracing::error_span!("session", session = "0123").entered();
            let _step = tracing::error_span!("step", step = 7).entered();
            tracing::error!("diverged");
            tracing::info!("not at this level");
        });
        let bytes = written
            .0
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .clone();
        let text = String::from_utf8(bytes).unwrap();
        let lines: Vec<&str> = text.lines().collect();
        assert_eq!(lines.len(), 2, "{text}");
        assert!(
            lines[0].contains(" WARN node=- session=- job=- step=- peer=P2 trefoil")
                && lines[0].ends_with(": link closed reason=\"gone\""),
            "{text}"
        );
        assert!(
            lines[1].contains("ERROR node=P1 session=0123 job=abc step=7 peer=- "),
            "{text}"
        );
    }
}
