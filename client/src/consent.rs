//! What a party's operator does on the party's host: see its jobs, approve, deny and cancel them,
//! check its audit log. The tool and the party speak through files in the party's home
//! (`trefoil_party::desk`); whoever may write there is the operator.

use std::io::{BufRead, Write};
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use clap::{Args, Subcommand};
use serde_json::json;
use trefoil_consortium::PartyConfig;
use trefoil_party::audit::{self, AUDIT_FILE};
use trefoil_party::desk::{self, Choice, Decision, JobRecord, JobState};
use trefoil_party::{now_s, time_text};

/// How long the party may take to act on a decision: it looks every second.
const TAKEN_WITHIN: Duration = Duration::from_secs(10);
/// Jobs that are over which a list shows, unless all are asked for.
const PAST_SHOWN: usize = 20;

/// Arguments of `trefoil approve`.
#[derive(Clone, Debug, Args)]
pub struct ApproveArgs {
    /// The job's hash, or its first digits, eight at least.
    pub job: String,
    /// The party's configuration file.
    #[arg(long, value_name = "FILE")]
    pub config: PathBuf,
    /// Turn the job down instead.
    #[arg(long)]
    pub deny: bool,
    /// Words for the requester and the audit log, for instance why not.
    #[arg(long, default_value = "", hide_default_value = true)]
    pub reason: String,
    /// Show the job's whole network as well.
    #[arg(long)]
    pub network: bool,
    /// Do not ask.
    #[arg(long)]
    pub yes: bool,
}

/// Arguments of `trefoil jobs`.
#[derive(Debug, Args)]
pub struct JobsArgs {
    /// The party's configuration file.
    #[arg(long, value_name = "FILE")]
    pub config: PathBuf,
    /// All jobs that are over, not the last twenty.
    #[arg(long)]
    pub all: bool,
    /// Print a JSON array.
    #[arg(long)]
    pub json: bool,
}

/// Arguments of `trefoil cancel`.
#[derive(Debug, Args)]
pub struct CancelArgs {
    /// The job's hash, or its first digits, eight at least.
    pub job: String,
    /// The party's configuration file.
    #[arg(long, value_name = "FILE")]
    pub config: PathBuf,
    /// Words for the requester and the audit log.
    #[arg(long, default_value = "", hide_default_value = true)]
    pub reason: String,
    /// Do not ask.
    #[arg(long)]
    pub yes: bool,
}

/// `trefoil audit`.
#[derive(Debug, Subcommand)]
pub enum AuditCommand {
    /// Check that no entry was changed, removed or moved; print their number and the last hash.
    Verify(VerifyArgs),
}

/// Arguments of `trefoil audit verify`.
#[derive(Debug, Args)]
pub struct VerifyArgs {
    /// The party's configuration file.
    #[arg(long, value_name = "FILE", required_unless_present = "file")]
    pub config: Option<PathBuf>,
    /// The log itself, for instance a copy of it.
    #[arg(long, value_name = "FILE", conflicts_with = "config")]
    pub file: Option<PathBuf>,
    /// A head that was noted earlier: it must be among the entries, or some were cut off or the log
    /// was written anew.
    #[arg(long, value_name = "HASH")]
    pub head: Option<String>,
    /// Print one JSON object.
    #[arg(long)]
    pub json: bool,
}

/// `trefoil approve`: shows the job in words, asks, and leaves the decision for the party.
///
/// # Errors
/// There is no such job, it is not held, or the party does not act.
pub fn approve(args: &ApproveArgs) -> Result<()> {
    let home = PartyConfig::load(&args.config)?.home;
    let record = find(&home, &args.job)?;
    let description = record.description().map_err(anyhow::Error::msg)?;
    let words = description.describe(&record.requester);
    eprint!("{}", printable(&words));
    eprintln!(
        "  asked      by {} (public key {}) on {}",
        record.requester,
        record.pin,
        time_text(record.submitted_s)
    );
    if let (true, Some(network)) = (args.network, description.network()) {
        eprintln!("  network:\n{}", printable(network));
    }
    ensure!(
        record.state == JobState::Held,
        "the job does not wait for approval here: it is {}{}",
        record.state,
        note(&record)
    );
    let (choice, question) = match args.deny {
        false => (Choice::Approve, "Let this job run?"),
        true => (Choice::Deny, "Turn this job down?"),
    };
    decide(&home, &record, choice, question, &args.reason, args.yes)
}

/// `trefoil cancel`: ends a job wherever it stands.
///
/// # Errors
/// There is no such job, it is over, or the party does not act.
pub fn cancel(args: &CancelArgs) -> Result<()> {
    let home = PartyConfig::load(&args.config)?.home;
    let record = find(&home, &args.job)?;
    ensure!(
        !record.state.over(),
        "the job is over: it is {}{}",
        record.state,
        note(&record)
    );
    eprintln!(
        "Job {} ({}) of {}: {}",
        record.name, record.job, record.requester, record.state
    );
    decide(
        &home,
        &record,
        Choice::Cancel,
        "End this job?",
        &args.reason,
        args.yes,
    )
}

fn find(home: &Path, prefix: &str) -> Result<JobRecord> {
    desk::find(home, prefix).map_err(anyhow::Error::msg)
}

/// Asks, leaves the decision, and waits until the party has acted on it.
fn decide(
    home: &Path,
    record: &JobRecord,
    choice: Choice,
    question: &str,
    reason: &str,
    yes: bool,
) -> Result<()> {
    if !yes && !agreed(question)? {
        bail!("nothing was decided");
    }
    let name = ["USER", "LOGNAME", "USERNAME"]
        .iter()
        .find_map(|key| std::env::var(key).ok());
    let by = name.unwrap_or_else(|| "unknown".into());
    desk::decide(home, &Decision::new(record, choice, &by, reason))?;
    let begun = Instant::now();
    while desk::undecided(home, &record.job) {
        ensure!(
            begun.elapsed() < TAKEN_WITHIN,
            "the decision is noted in {}, but the party has not taken it within {} s: is it running, as a user who may read it? It takes it when it starts",
            home.join("approvals").display(),
            TAKEN_WITHIN.as_secs()
        );
        std::thread::sleep(Duration::from_millis(100));
    }
    let now = find(home, &record.job)?;
    let done = match choice {
        Choice::Approve => !now.approved_by.is_empty(),
        Choice::Deny => now.state == JobState::Denied,
        // A running job takes a moment to end.
        Choice::Cancel => now.state == JobState::Cancelled || now.state == JobState::Running,
    };
    ensure!(
        done,
        "the decision came too late: the job is {}{}",
        now.state,
        note(&now)
    );
    match choice {
        Choice::Approve => println!(
            "job {} is approved; it runs when all three parties consent",
            now.job
        ),
        Choice::Deny => println!("job {} is denied", now.job),
        Choice::Cancel => println!("job {} is cancelled", now.job),
    }
    Ok(())
}

/// Asks on the terminal; everything but yes is no.
fn agreed(question: &str) -> Result<bool> {
    eprint!("{question} [y/N] ");
    std::io::stderr().flush().context("standard error")?;
    let mut line = String::new();
    std::io::stdin()
        .lock()
        .read_line(&mut line)
        .context("standard input")?;
    Ok(matches!(
        line.trim().to_ascii_lowercase().as_str(),
        "y" | "yes"
    ))
}

fn note(record: &JobRecord) -> String {
    match record.note.is_empty() {
        true => String::new(),
        false => format!(" ({})", printable(&record.note)),
    }
}

/// Others' words without what moves a terminal's cursor: nothing that a job says may hide what it
/// reveals.
fn printable(text: &str) -> String {
    let moves = |c: char| {
        (c.is_control() && c != '\n')
            || matches!(c, '\u{200b}'..='\u{200f}' | '\u{202a}'..='\u{202e}' | '\u{2060}'..='\u{2069}')
    };
    text.chars()
        .map(|c| if moves(c) { '?' } else { c })
        .collect()
}

/// `trefoil jobs`: one line a job, the oldest first; what needs a decision is named at the end.
///
/// # Errors
/// The home cannot be read.
pub fn jobs(args: &JobsArgs) -> Result<()> {
    let home = PartyConfig::load(&args.config)?.home;
    let mut records = desk::records(&home)?;
    if !args.all {
        let over = records.iter().filter(|record| record.state.over()).count();
        let mut hidden = over.saturating_sub(PAST_SHOWN);
        records.retain(|record| {
            let hide = record.state.over() && hidden > 0;
            hidden -= usize::from(hide);
            !hide
        });
    }
    let now_s = now_s();
    if args.json {
        let list: Vec<_> = records
            .iter()
            .map(|record| as_json(record, now_s))
            .collect();
        println!("{}", serde_json::to_string_pretty(&list)?);
        return Ok(());
    }
    if records.is_empty() {
        eprintln!("{}: no jobs", home.display());
        return Ok(());
    }
    println!(
        "{:<16} {:<9} {:>5} {:>5}  {:<16} {:<20} NOTE",
        "JOB", "STATE", "FOR", "AGE", "REQUESTER", "NAME"
    );
    for record in &records {
        println!(
            "{:<16} {:<9} {:>5} {:>5}  {:<16} {:<20} {}",
            &record.job[..16.min(record.job.len())],
            record.state,
            age(now_s.saturating_sub(record.since_s)),
            age(now_s.saturating_sub(record.submitted_s)),
            record.requester,
            record.name,
            printable(&record.note)
        );
    }
    let held = records
        .iter()
        .filter(|record| record.state == JobState::Held)
        .count();
    if held > 0 {
        eprintln!(
            "{held} held: see one and decide with `trefoil approve JOB --config {}`",
            args.config.display()
        );
    }
    Ok(())
}

fn as_json(record: &JobRecord, now_s: u64) -> serde_json::Value {
    json!({
        "job": record.job,
        "name": record.name,
        "requester": record.requester,
        "pin": record.pin.to_string(),
        "state": record.state,
        "submitted": time_text(record.submitted_s),
        "since": time_text(record.since_s),
        "age_s": now_s.saturating_sub(record.submitted_s),
        "rule": record.rule,
        "approved_by": record.approved_by,
        "note": record.note,
    })
}

/// A duration in its largest unit.
fn age(seconds: u64) -> String {
    match seconds {
        0..60 => format!("{seconds}s"),
        60..3_600 => format!("{}m", seconds / 60),
        3_600..86_400 => format!("{}h", seconds / 3_600),
        _ => format!("{}d", seconds / 86_400),
    }
}

/// `trefoil audit`.
///
/// # Errors
/// The log's chain does not hold, naming the line; a noted head is not in it.
pub fn audit(command: &AuditCommand) -> Result<()> {
    let AuditCommand::Verify(args) = command;
    let path = match (&args.file, &args.config) {
        (Some(file), _) => file.clone(),
        (None, Some(config)) => PartyConfig::load(config)?.home.join(AUDIT_FILE),
        (None, None) => bail!("name the log with --config or --file"),
    };
    let noted = args.head.as_ref().map(|head| head.to_ascii_lowercase());
    let mut found = false;
    let mut on_head = |head: &str| found |= noted.as_deref() == Some(head);
    let verified = audit::verify(&path, &mut on_head)?;
    if let (Some(noted), false) = (&noted, found) {
        bail!(
            "{}: the chain holds, but no entry has the noted hash {noted}: entries were cut off, or the log was written anew",
            path.display()
        );
    }
    if verified.torn_bytes > 0 {
        eprintln!(
            "warning: {} bytes of an unfinished entry at the end: it is being written now, or the party was killed and repairs it at its start",
            verified.torn_bytes
        );
    }
    if args.json {
        println!(
            "{}",
            json!({"entries": verified.entries, "head": verified.head, "torn_bytes": verified.torn_bytes})
        );
    } else {
        println!("{} entries, the chain holds", verified.entries);
        println!("head {}", verified.head);
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn words_of_others_cannot_move_the_cursor() {
        assert_eq!(printable("a\u{1b}[2Kb\rc\nd\u{202e}e"), "a?[2Kb?c\nd?e");
    }

    #[test]
    fn ages_have_one_unit() {
        let ages = [0, 59, 60, 3_599, 3_600, 86_399, 86_400, 8 * 86_400].map(age);
        assert_eq!(ages, ["0s", "59s", "1m", "59m", "1h", "23h", "1d", "8d"]);
    }
}
