//! The commands of a deployment: every institution's own machine, its own key, its own files.
//!
//! `init.rs` makes a key and a card, `consortium.rs` puts cards together; `share.rs`, `train.rs` and
//! `ask.rs` are a member's calls to the three parties, `watch.rs` finds a job again. Here: a member's
//! home and its connection. docs/operating.md goes through all of it.

mod ask;
mod consortium;
mod convert;
mod doctor;
mod figures;
mod import;
mod init;
mod knn;
mod look;
mod models;
mod npz;
mod place;
mod recipe;
mod record;
mod serve;
mod share;
mod status;
mod store;
mod train;
mod watch;
mod weights;
mod withdraw;

use std::fs::OpenOptions;
use std::io::Write;
use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::{Context, Result, bail};
use clap::Args;
use trefoil_consortium::config::RESUME_WAIT_S;
use trefoil_consortium::{
    ConsortiumFile, JobDescription, JobId, MemberConfig, MemberEntry, MemberRole, Role, identity,
    logging,
};
use trefoil_models::job::JobKind;
use trefoil_models::{Schedule, schedule};
use trefoil_transport::{Identity, TransportError};

use crate::follow::{Finished, follow};
use crate::remote::{Remote, RemoteError};
pub use ask::{EvaluateArgs, PredictArgs, evaluate, predict};
pub use consortium::{ConsortiumArgs, consortium};
pub use convert::{ConvertArgs, convert_model};
pub use doctor::{DoctorArgs, doctor};
pub use import::{ImportArgs, import_model};
pub use init::{InitArgs, init};
pub use knn::{KnnArgs, knn};
pub use models::{ModelsArgs, RevealArgs, models, reveal_model};
pub use recipe::RecipeArgs;
pub use serve::{ServeArgs, serve};
pub use share::{DatasetArgs, ShareArgs, dataset, share};
pub use status::{StatusArgs, status};
pub use store::{StoreArgs, store};
pub use train::{TrainArgs, train};
pub use watch::{WatchArgs, watch};
pub use withdraw::{WithdrawArgs, withdraw};

/// How long a party may be away while its job is watched: a little longer than the parties wait for
/// each other (resume_wait_s).
const WATCH_TIMEOUT: Duration = Duration::from_secs(RESUME_WAIT_S + 60);
/// The variable that names a member's home.
const HOME: &str = "TREFOIL_HOME";
/// A member's configuration in its home.
const MEMBER_FILE: &str = "member.toml";

/// Where a member's files are.
#[derive(Debug, Clone, Args)]
pub struct HomeArgs {
    /// The folder with member.toml; without it TREFOIL_HOME, else the current folder.
    #[arg(long, value_name = "DIR")]
    home: Option<PathBuf>,
}

/// What every job has.
#[derive(Debug, Clone, Args)]
pub struct JobArgs {
    /// The links between the nodes, which the programs are lowered for: lan, wan (40 ms round
    /// trip, 300 Mbit/s), or rtt_ms=40,mbit_per_s=300.
    #[arg(long, default_value = "lan", value_name = "LINK")]
    link: trefoil_cluster::Link,
    /// The session ends with an error after so many seconds.
    #[arg(long, value_name = "SECONDS")]
    wall_time: Option<u64>,
    /// Submit the job and end; `trefoil watch` shows its result later.
    #[arg(long)]
    detach: bool,
}

/// The folder that is given, else the variable's, else the current one.
fn home(given: Option<&Path>) -> PathBuf {
    let variable = std::env::var_os(HOME).filter(|value| !value.is_empty());
    match (given, variable) {
        (Some(given), _) => given.to_owned(),
        (None, Some(variable)) => variable.into(),
        (None, None) => ".".into(),
    }
}

/// A hospital or analyst at its own machine.
struct Member {
    home: PathBuf,
    config: MemberConfig,
    consortium: ConsortiumFile,
    identity: Identity,
    entry: MemberEntry,
}

impl Member {
    /// Reads the member's files and checks that they belong together.
    fn load(args: &HomeArgs) -> Result<Member> {
        // Only the first call counts, and a broken RUST_LOG is no reason not to work.
        let _ = logging::init("warn");
        let home = home(args.home.as_deref());
        let file = home.join(MEMBER_FILE);
        if !file.is_file() {
            bail!(
                "no {MEMBER_FILE} in {}: go to a member's folder, or name it with --home or {HOME}; \
                 `trefoil init hospital` and `trefoil init analyst` make one",
                home.display()
            );
        }
        let config = MemberConfig::load(&file)?;
        if !config.consortium.exists() {
            bail!(
                "{}: no such file: ask for the consortium file and put it there",
                config.consortium.display()
            );
        }
        let consortium = ConsortiumFile::load(&config.consortium)?;
        let identity = identity::load(&config.identity.certificate, &config.identity.key)?;
        let pin = identity::pin(&identity)?;
        let entry = match consortium.role(pin) {
            Some(Role::Member(entry)) => entry,
            Some(Role::Node(peer)) => bail!(
                "{}: this key is {peer}'s in {}; a party or dealer asks for nothing",
                config.identity.certificate.display(),
                config.consortium.display()
            ),
            None => bail!(
                "{}: no member has the public key {pin} of {}: send this member's card to whoever \
                 keeps the consortium file (trefoil consortium add), and ask for the new file",
                config.consortium.display(),
                config.identity.certificate.display()
            ),
        };
        Ok(Member {
            home,
            config,
            consortium,
            identity,
            entry,
        })
    }

    fn name(&self) -> &str {
        &self.entry.name
    }

    fn must_be_hospital(&self) -> Result<()> {
        match self.entry.role {
            MemberRole::Hospital => Ok(()),
            MemberRole::Analyst => bail!(
                "{} is an analyst in {} and brings no data",
                self.name(),
                self.config.consortium.display()
            ),
        }
    }

    async fn connect(&self) -> Result<Remote> {
        let seen = self.config.seen_from_here(self.consortium.clone());
        let remote = Remote::connect(&self.identity, &seen, None, &self.config.transport).await;
        let mut remote = remote.map_err(|err| advise(err, "cannot reach the parties"))?;
        remote.set_watch_timeout(WATCH_TIMEOUT);
        Ok(remote)
    }

    /// A job of this member.
    fn describe(&self, name: &str, kind: JobKind, args: &JobArgs) -> Result<JobDescription> {
        let mut job =
            JobDescription::new(name, self.entry.pin, kind).map_err(anyhow::Error::msg)?;
        job.link = args.link.profile();
        job.limits.wall_time_s = args.wall_time.unwrap_or(job.limits.wall_time_s);
        job.check()?;
        Ok(job)
    }

    /// Says the job in words, keeps a record of it, and submits it; returns its schedule.
    async fn submit(&self, remote: &Remote, record: &record::Record) -> Result<Schedule> {
        let plan = schedule(&record.job.kind)?;
        eprint!("{}", record.job.describe(self.name()));
        record.save(&self.home)?;
        match remote.submit(record.job.clone()).await {
            Ok(_) => Ok(plan),
            Err(err) => {
                record.forget(&self.home);
                Err(advise(err, "the job was not accepted"))
            }
        }
    }

    /// Says the job in words, keeps a record of it, submits it, and follows it unless it is
    /// detached: then there is no result yet.
    async fn run(
        &self,
        remote: &Remote,
        record: record::Record,
        message: &str,
        detach: bool,
    ) -> Result<Option<Finished>> {
        let job = record.job.clone();
        let plan = self.submit(remote, &record).await?;
        let id = job.id();
        if detach {
            println!("{id}");
            eprintln!("submitted; its result: trefoil watch {}", short(&id));
            return Ok(None);
        }
        let followed = follow(remote, id, job.kind, plan, message).await;
        let done = followed.map_err(|err| lost(err, &id))?;
        figures::note(&self.home, &job.name, id, &done, &record.show);
        Ok(Some(done))
    }
}

/// Enough of a job's hash to find it again.
fn short(id: &JobId) -> String {
    id.to_string()[..16].into()
}

/// What can be done about a job that is not followed any more.
fn lost(err: RemoteError, id: &JobId) -> anyhow::Error {
    let goes_on = matches!(
        err,
        RemoteError::Link { .. } | RemoteError::Timeout { .. } | RemoteError::Address { .. }
    );
    let place = format!("job {}", short(id));
    match goes_on {
        true => anyhow::Error::from(err).context(format!(
            "{place} is not followed any more; where the parties still run it, \
             `trefoil watch {}` goes on",
            short(id)
        )),
        false => anyhow::Error::from(err).context(place),
    }
}

/// An error of the parties, with what can be done about it.
fn advise(err: RemoteError, what: &str) -> anyhow::Error {
    let advice = match &err {
        RemoteError::Link { source, .. } => match source {
            TransportError::Refused { .. } => Some(
                "the party does not know this member's public key: it needs the consortium file \
                 with this member's card, or the member was removed there",
            ),
            TransportError::WrongCertificate { .. } => Some(
                "another node answers there, or the party has a new key: compare the pin with the \
                 party by phone before anything else",
            ),
            TransportError::Unreachable { .. } | TransportError::Connect { .. } => Some(
                "is the party running, and is its address in consortium.toml, or in [peers] of \
                 member.toml, the one to be reached from here?",
            ),
            _ => None,
        },
        RemoteError::Address { .. } => {
            Some("correct it in consortium.toml, or name another one in [peers] of member.toml")
        }
        RemoteError::Busy { .. } => Some("try again a little later"),
        _ => None,
    };
    match advice {
        Some(advice) => anyhow::anyhow!("{what}: {err}\n  {advice}"),
        None => anyhow::Error::from(err).context(what.to_owned()),
    }
}

/// One thread is enough for a member: it waits most of the time.
fn block_on<T>(doing: impl Future<Output = Result<T>>) -> Result<T> {
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()
        .context("the runtime cannot be started")?;
    runtime.block_on(doing)
}

/// Writes a file that is not there yet, for this user alone where it is `private`.
fn write_new(path: &Path, content: &[u8], private: bool) -> Result<()> {
    let mut options = OpenOptions::new();
    options.write(true).create_new(true);
    #[cfg(unix)]
    if private {
        std::os::unix::fs::OpenOptionsExt::mode(&mut options, 0o600);
    }
    let mut file = options
        .open(path)
        .with_context(|| format!("cannot make {}", path.display()))?;
    file.write_all(content)
        .and_then(|()| file.sync_all())
        .with_context(|| format!("cannot write {}", path.display()))
}

/// Replaces a file's content in one step: readers see the old or the new one.
fn replace(path: &Path, content: &[u8], private: bool) -> Result<()> {
    let mut name = path.file_name().unwrap_or_default().to_owned();
    name.push(format!(".{}.new", std::process::id()));
    let new = path.with_file_name(name);
    let done = write_new(&new, content, private).and_then(|()| {
        std::fs::rename(&new, path).with_context(|| format!("cannot replace {}", path.display()))
    });
    if done.is_err() {
        // What is left of the attempt is of no use; the error says what happened.
        let _ = std::fs::remove_file(&new);
    }
    done
}

/// Class names for tables: those given, else numbers.
fn class_names(given: &[String], classes: usize) -> Result<Vec<String>> {
    match given.len() {
        0 => Ok((0..classes).map(|class| class.to_string()).collect()),
        n if n == classes => Ok(given.to_vec()),
        n => bail!("--class-names gives {n} names; the network tells {classes} classes apart"),
    }
}
