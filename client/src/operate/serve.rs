//! `trefoil serve`: a session in which members have images classified without a job of their own;
//! and how `trefoil predict` asks in one.

use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use clap::Args;
use trefoil_consortium::JobId;
use trefoil_consortium::wire::Serving;
use trefoil_models::ServeSpec;
use trefoil_models::job::{JobKind, PredictOutput};
use trefoil_protocol::ring::Tensor;

use super::models::known_model;
use super::record::{Record, Show};
use super::watch::present;
use super::{HomeArgs, JobArgs, Member, block_on, lost, short};
use crate::follow::{Predictions, bar, follow, predictions};
use crate::plan;
use crate::remote::{Remote, RemoteError};

/// How long a busy session is asked again.
const BUSY_MAX: Duration = Duration::from_secs(60);
const BUSY_PAUSE: Duration = Duration::from_millis(50);
/// Wall time of a job beyond what it serves.
const MARGIN_S: u64 = trefoil_consortium::SERVE_MARGIN_S;

/// Arguments of `trefoil serve`.
#[derive(Debug, Args)]
pub struct ServeArgs {
    #[command(flatten)]
    home: HomeArgs,
    /// The model's name at the parties; see `trefoil models`.
    #[arg(required_unless_present_any = ["stop", "list"])]
    model: Option<String>,
    /// The members who may ask, with commas.
    #[arg(long = "for", value_name = "MEMBERS", value_delimiter = ',')]
    members: Vec<String>,
    /// What each of them learns of its own images: class, probabilities or logits.
    #[arg(long, default_value = "class", value_parser = plan::parse_output)]
    output: PredictOutput,
    /// Images in one batch, and in one request, at most.
    #[arg(long, default_value_t = 32)]
    max_batch: usize,
    /// How long the first request of a batch waits for others.
    #[arg(long, value_name = "MS", default_value_t = 2)]
    max_wait_ms: u64,
    /// Requests that wait at a party, at most.
    #[arg(long, default_value_t = 256)]
    max_pending: usize,
    /// Images of one member on one day (UTC), at most; without it what each party allows.
    #[arg(long, default_value_t = 0)]
    rows_per_day: u64,
    /// How long it serves.
    #[arg(long, value_name = "SECONDS", default_value_t = 8 * 3600)]
    duration: u64,
    /// End a serving session of this member: the first digits of its job's hash, eight or more.
    #[arg(long, value_name = "JOB", conflicts_with_all = ["model", "list"])]
    stop: Option<String>,
    /// Show the serving sessions that this member may ask.
    #[arg(long, conflicts_with = "model")]
    list: bool,
    #[command(flatten)]
    job: JobArgs,
}

/// Opens, lists or ends serving sessions.
pub fn serve(args: &ServeArgs) -> Result<()> {
    let member = Member::load(&args.home)?;
    match (&args.model, &args.stop) {
        (Some(model), _) => open(args, &member, model),
        (None, Some(prefix)) => stop(&member, prefix),
        (None, None) => list(&member),
    }
}

fn list(member: &Member) -> Result<()> {
    block_on(async {
        let remote = member.connect().await?;
        let servings = remote.servings().await?;
        remote.close().await;
        if servings.is_empty() {
            println!("no session serves {}", member.name());
        }
        for serving in servings {
            println!(
                "{} serves {} ({}) until {}, {} images a request",
                short(&serving.job),
                serving.spec.model,
                output_name(serving.spec.output),
                trefoil_party::time_text(serving.until_s),
                serving.spec.max_batch
            );
        }
        Ok(())
    })
}

fn output_name(output: PredictOutput) -> &'static str {
    match output {
        PredictOutput::Class => "class",
        PredictOutput::Probabilities => "probabilities",
        PredictOutput::Logits => "logits",
    }
}

fn stop(member: &Member, prefix: &str) -> Result<()> {
    let Record { job, .. } = Record::find(&member.home, prefix)?;
    if job.serves().is_none() {
        bail!("job {} serves nothing", short(&job.id()));
    }
    block_on(async {
        let remote = member.connect().await?;
        remote.stop_serving(job.id()).await?;
        remote.close().await;
        println!("job {} ends", short(&job.id()));
        Ok(())
    })
}

fn open(args: &ServeArgs, member: &Member, model: &str) -> Result<()> {
    if args.members.is_empty() {
        bail!(
            "--for: name the members who may ask, such as --for {}",
            member.name()
        );
    }
    let pin = |name: &String| {
        let entries = &member.consortium.members;
        let entry = entries.iter().find(|entry| entry.name == *name);
        let entry = entry.with_context(|| {
            let file = member.config.consortium.display();
            format!("--for: {name:?} is no member in {file}")
        })?;
        Ok(*entry.pin.as_bytes())
    };
    let mut members = args.members.iter().map(pin).collect::<Result<Vec<_>>>()?;
    members.sort_unstable();
    members.dedup();
    block_on(async {
        let remote = member.connect().await?;
        let known = known_model(&remote, model).await?;
        let spec = ServeSpec {
            model: known.reference,
            network: known.network.to_toml(),
            frac_bits: known.frac_bits,
            ring_bits: member.consortium.core.ring_bits,
            members,
            output: args.output,
            max_batch: args.max_batch,
            max_wait_ms: args.max_wait_ms,
            max_pending: args.max_pending,
            rows_per_day: args.rows_per_day,
            duration_s: args.duration,
        };
        spec.check()?;
        let kind = JobKind::Serve(spec);
        let mut job_args = args.job.clone();
        job_args.wall_time = job_args.wall_time.or(Some(args.duration + MARGIN_S));
        let record = Record {
            job: member.describe("serve", kind, &job_args)?,
            show: Show::default(),
        };
        let job = record.job.clone();
        let plan = member.submit(&remote, &record).await?;
        let id = job.id();
        if args.job.detach {
            println!("{id}");
            eprintln!(
                "submitted; it ends with: trefoil serve --stop {}",
                short(&id)
            );
            return Ok(());
        }
        let mut stopping = false;
        let mut following = Box::pin(follow(&remote, id, job.kind, plan, "serving"));
        let done = loop {
            tokio::select! {
                done = &mut following => break done,
                interrupted = tokio::signal::ctrl_c() => {
                    interrupted.context("signals cannot be handled")?;
                    if stopping {
                        bail!("job {} is left to end by itself", short(&id));
                    }
                    stopping = true;
                    eprintln!("ends; once more to wait no longer");
                    if remote.stop_serving(id).await.is_err() {
                        // It has not started: then there is something to take back.
                        remote.withdraw(id).await?;
                    }
                }
            }
        };
        drop(following);
        remote.close().await;
        present(&done.map_err(|err| lost(err, &id))?, &Show::default())
    })
}

/// The session that serves a model to this member, and reveals what it wants.
pub async fn serving(
    remote: &Remote,
    model: &str,
    output: PredictOutput,
    job: Option<&str>,
) -> Result<Option<Serving>> {
    let fits = |serving: &Serving| serving.spec.model == model && serving.spec.output == output;
    let servings = remote.servings().await?;
    let Some(prefix) = job else {
        return Ok(servings.into_iter().find(fits));
    };
    let digits = prefix.to_ascii_lowercase();
    let named = |serving: &Serving| serving.job.to_string().starts_with(&digits);
    let Some(found) = servings.into_iter().find(named) else {
        bail!("--served: no session {prefix} serves this member now; see `trefoil serve --list`");
    };
    if !fits(&found) {
        bail!(
            "--served: session {} serves {} of model {}",
            short(&found.job),
            output_name(found.spec.output),
            found.spec.model
        );
    }
    Ok(Some(found))
}

/// Predictions for images `[rows, words]` in fixed point, request by request.
pub async fn predict_served(
    remote: &Remote,
    serving: &Serving,
    images: &Tensor,
) -> Result<Predictions> {
    let rows = images.shape()[0];
    let words = images.len() / rows.max(1);
    let bar = bar(rows as u64, "images");
    bar.set_message(format!("served by {}", short(&serving.job)));
    let mut steps = Vec::new();
    let mut done = 0;
    for chunk in images.data().chunks(words * serving.spec.max_batch) {
        let chunk = Tensor::new(vec![chunk.len() / words, words], chunk.to_vec());
        let tensor = patient(remote, serving.job, &chunk).await?;
        steps.push([(output_name(serving.spec.output).to_owned(), tensor)].into());
        done += chunk.shape()[0];
        bar.set_position(done as u64);
    }
    bar.finish_and_clear();
    predictions(&steps, rows, serving.spec.output, serving.spec.frac_bits)
}

/// Asks again while the session is busy.
async fn patient(remote: &Remote, job: JobId, images: &Tensor) -> Result<Tensor, RemoteError> {
    let start = Instant::now();
    loop {
        match remote.served(job, images).await {
            Err(RemoteError::Busy { .. }) if start.elapsed() < BUSY_MAX => {
                tokio::time::sleep(BUSY_PAUSE).await;
            }
            other => return other,
        }
    }
}
