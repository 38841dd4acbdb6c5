//! `serve-20x25`: members who ask in one serving session at the same time, each one image after the
//! other, as the tool's `predict` does.

use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use indicatif::ProgressBar;
use tokio::task::{JoinSet, LocalSet};
use trefoil_cluster::Cluster;
use trefoil_consortium::{JobDescription, JobId, SERVE_MARGIN_S};
use trefoil_models::schedule::IMPORT_ROW_WORDS;
use trefoil_models::{JobKind, Network, PredictOutput, ServeSpec, import_words, weights};
use trefoil_protocol::ring::Tensor;
use trefoil_transport::Settings;

use super::{Bench, Measured, cpu_seconds, derive, inside, peak_rss_bytes};
use crate::experiment::read_network;
use crate::local;
use crate::remote::{Part, Remote, Upload};

/// How long the session may take to begin.
const BEGIN_MAX: Duration = Duration::from_secs(60);

impl Bench<'_> {
    /// `clients` members, each with `requests` requests that are counted and one that is not.
    pub(super) fn serve(
        &self,
        clients: usize,
        requests: usize,
        bar: &ProgressBar,
    ) -> Result<Measured> {
        let names: Vec<String> = (1..=clients).map(|n| format!("client-{n}")).collect();
        let start = Instant::now();
        let (cluster, settings) = self.cluster_for(u64::MAX, names.clone())?;
        let done = inside(self.serve_in(&cluster, &settings, &names, requests, start, bar));
        let measured = done.map_err(|error| local::blame(&cluster, error))?;
        cluster.stop();
        Ok(measured)
    }

    async fn serve_in(
        &self,
        cluster: &Cluster,
        settings: &Settings,
        names: &[String],
        requests: usize,
        start: Instant,
        bar: &ProgressBar,
    ) -> Result<Measured> {
        let network = read_network("mlp")?;
        let analyst = local::connect(cluster, "analyst", settings).await?;
        self.import(cluster, &analyst, &network).await?;
        let members = names.iter().map(|name| {
            let pin = cluster.member(name)?.identity.pin()?;
            Ok(*pin.as_bytes())
        });
        let mut members = members.collect::<Result<Vec<[u8; 32]>>>()?;
        members.sort_unstable();
        let spec = ServeSpec {
            model: "bench".into(),
            network: network.to_toml(),
            frac_bits: self.args.frac_bits,
            ring_bits: self.args.ring_bits,
            members,
            output: PredictOutput::Class,
            max_batch: 32,
            max_wait_ms: 2,
            max_pending: 256,
            rows_per_day: 0,
            duration_s: 3600,
        };
        let mut job = self.describe(JobKind::Serve(spec))?;
        job.requester = cluster.member("analyst")?.identity.pin()?;
        job.limits.wall_time_s = 3600 + SERVE_MARGIN_S;
        // One image's program: program 0 opens the weights.
        let cost = derive(&job)?.plans[1].cost();
        let id = analyst.submit(job).await?;
        let mut remotes = Vec::new();
        for name in names {
            remotes.push(local::connect(cluster, name, settings).await?);
        }
        begun(&remotes[0], id).await?;
        let startup_seconds = start.elapsed().as_secs_f64();

        let image = Tensor::zeros(&[1, network.input_len()]);
        for remote in &remotes {
            remote.served(id, &image).await?;
        }
        let before = cpu_seconds(cluster);
        let all = Instant::now();
        let local = LocalSet::new();
        let (seconds, remotes) = local
            .run_until(asked(remotes, id, image, requests, bar.clone()))
            .await?;
        let elapsed = all.elapsed().as_secs_f64();
        let cpu = cpu_seconds(cluster).zip(before);
        let cpu = cpu.map_or(f64::NAN, |(after, before)| after - before);
        analyst.stop_serving(id).await?;
        analyst.watch(id, &mut |_| {}).await?;
        for remote in remotes {
            remote.close().await;
        }
        analyst.close().await;
        Ok(Measured {
            startup_seconds,
            cpu_seconds: cpu / seconds.len() as f64,
            peak_rss_bytes: peak_rss_bytes(cluster),
            per_second: Some(seconds.len() as f64 / elapsed),
            seconds,
            rounds: cost.rounds,
            bytes_sent_per_party: cost.bytes_sent_per_party,
            dealer_bytes: cost.dealer_bytes,
            floor_seconds: self.rates.floor_seconds(&cost),
            party_memory: None,
        })
    }

    /// Untrained weights, kept as a model.
    async fn import(&self, cluster: &Cluster, remote: &Remote, network: &Network) -> Result<()> {
        let weights = weights::initial(network, 1, u32::from(self.args.frac_bits));
        let words = import_words(network, &weights)?;
        let rows = words.len() / IMPORT_ROW_WORDS;
        let upload = Upload {
            dataset: String::new(),
            part: Part::Predict,
            images: Tensor::new(vec![rows, IMPORT_ROW_WORDS], words),
            labels: None,
            shape: vec![1, 1, IMPORT_ROW_WORDS],
        };
        let receipt = remote.upload(upload, &mut |_| {}).await?;
        let kind = JobKind::ImportModel {
            network: network.to_toml(),
            frac_bits: self.args.frac_bits,
            ring_bits: self.args.ring_bits,
            upload: receipt.upload,
            save_as: "bench".into(),
            preparation: None,
        };
        let job = JobDescription {
            requester: cluster.member("analyst")?.identity.pin()?,
            ..self.describe(kind)?
        };
        let id = remote.submit(job).await?;
        remote.watch(id, &mut |_| {}).await?;
        Ok(())
    }
}

/// Waits until a session serves a member.
async fn begun(remote: &Remote, id: JobId) -> Result<()> {
    let start = Instant::now();
    while remote.servings().await?.iter().all(|s| s.job != id) {
        if start.elapsed() > BEGIN_MAX {
            bail!("nothing is served after {} s", BEGIN_MAX.as_secs());
        }
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
    Ok(())
}

/// All members ask at the same time; the latency of each request, in seconds.
async fn asked(
    remotes: Vec<Remote>,
    id: JobId,
    image: Tensor,
    requests: usize,
    bar: ProgressBar,
) -> Result<(Vec<f64>, Vec<Remote>)> {
    let mut clients = JoinSet::new();
    for remote in remotes {
        let (image, bar) = (image.clone(), bar.clone());
        clients.spawn_local(async move {
            let mut seconds = Vec::with_capacity(requests);
            for _ in 0..requests {
                let start = Instant::now();
                remote.served(id, &image).await?;
                seconds.push(start.elapsed().as_secs_f64());
                bar.inc(1);
            }
            Ok::<_, anyhow::Error>((seconds, remote))
        });
    }
    let (mut all, mut remotes) = (Vec::new(), Vec::new());
    while let Some(client) = clients.join_next().await {
        let (seconds, remote) = client.context("a client failed")??;
        all.extend(seconds);
        remotes.push(remote);
    }
    Ok((all, remotes))
}
