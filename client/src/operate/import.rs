//! `trefoil import-model`: the owner's weights become shares at the three parties, staged and
//! committed like a hospital's rows, and a job keeps them as a model. No party sees them.
//!
//! Names, shapes and values are checked against the network before the first share leaves.

use std::collections::BTreeMap;
use std::path::PathBuf;

use anyhow::{Result, bail};
use clap::Args;
use trefoil_consortium::check_name;
use trefoil_exchange::Weights;
use trefoil_models::job::{JobKind, Preparation};
use trefoil_models::schedule::IMPORT_ROW_WORDS;
use trefoil_models::{Network, import_words};
use trefoil_protocol::fixed::encode;
use trefoil_protocol::ring::Tensor;

use super::convert::{Input, parse_input, understand};
use super::record::{Record, Show};
use super::share::Normalise;
use super::watch::present;
use super::{HomeArgs, JobArgs, Member, advise, block_on, weights};
use crate::experiment::read_network;
use crate::follow::bar;
use crate::remote::{Part, Upload};

/// The end of a variance's name.
const VARIANCE: &str = ".variance";
/// Running statistics lie between minus this and this.
const STATISTICS_BOUND: f64 = 256.0;
/// Weights are below 2 to the power of this: the programs presume it.
const INTEGER_BITS: u32 = trefoil_models::programs::WEIGHT_INTEGER_BITS as u32;

/// Arguments of `trefoil import-model`.
#[derive(Debug, Args)]
pub struct ImportArgs {
    #[command(flatten)]
    home: HomeArgs,
    /// An ONNX model, network and weights in one; `convert-model` shows what is understood of it.
    #[arg(value_name = "MODEL.ONNX", required_unless_present = "weights", conflicts_with_all = ["network", "weights"])]
    model: Option<PathBuf>,
    /// Channels, height and width of the images, where the ONNX model leaves them open.
    #[arg(long, value_name = "C,H,W", value_parser = parse_input, requires = "model")]
    input: Option<Input>,
    /// The network: a shipped name or a network file.
    #[arg(long, value_name = "NAME|FILE", requires = "weights")]
    network: Option<String>,
    /// The weights: an .npz or .safetensors file with an array for each parameter, such as `train
    /// --reveal-weights` and `reveal-model` write.
    #[arg(long, value_name = "FILE", requires = "network")]
    weights: Option<PathBuf>,
    /// The name under which the parties keep their shares of the weights.
    #[arg(long, value_name = "MODEL")]
    save_as: String,
    /// Fraction bits of the model.
    #[arg(long, default_value_t = 16)]
    frac_bits: u8,
    /// How the images were normalised that it was trained on: kept with the model, so that
    /// predictions apply it.
    #[arg(long, value_name = "mean=M,std=S")]
    preprocess: Option<Normalise>,
    #[command(flatten)]
    job: JobArgs,
}

/// Weights in fixed point, checked against the network; `place` is their file.
fn fixed_weights(
    place: &str,
    mut arrays: Weights,
    network: &Network,
    frac_bits: u8,
) -> Result<BTreeMap<String, Tensor>> {
    let mut weights = BTreeMap::new();
    let bound = 2f64.powi(INTEGER_BITS as i32);
    let statistics = network.statistics();
    for (name, shape) in network.kept() {
        let own_bits = network.kept_frac_bits(&name, frac_bits);
        // Running statistics have a wider range than weights; a variance is not negative.
        let (low, high) = match statistics.iter().any(|(known, _)| *known == name) {
            false => (-bound, bound),
            true if name.ends_with(VARIANCE) => (0.0, STATISTICS_BOUND - 2f64.powi(-9)),
            true => (-STATISTICS_BOUND, STATISTICS_BOUND),
        };
        let Some(array) = arrays.remove(&name) else {
            bail!(
                "{}: there is no array {name}, which network {} has with shape {shape:?}",
                place,
                network.name
            );
        };
        if array.shape() != shape {
            bail!(
                "{}: array {name} has shape {:?}, network {} has {shape:?}",
                place,
                array.shape(),
                network.name
            );
        }
        let outside = array
            .iter()
            .position(|value| !(low..high).contains(value) || *value == -high);
        if let Some(at) = outside {
            bail!(
                "{}: array {name}: value number {at} is {}; values from {low} to {high} are possible, without {high} itself",
                place,
                array.iter().nth(at).copied().unwrap_or(f64::NAN)
            );
        }
        let words = array
            .iter()
            .map(|value| encode(*value, u32::from(own_bits)));
        weights.insert(name, Tensor::new(shape, words.collect()));
    }
    if let Some(unknown) = arrays.keys().next() {
        bail!(
            "{}: network {} has no parameter {unknown}",
            place,
            network.name
        );
    }
    Ok(weights)
}

/// Shares weights and keeps them as a model.
pub fn import_model(args: &ImportArgs) -> Result<()> {
    check_name(&args.save_as).map_err(anyhow::Error::msg)?;
    let (path, network, arrays) = match (&args.model, &args.network, &args.weights) {
        (Some(model), ..) => {
            let understood = understand(model, args.input)?;
            (model, understood.network, understood.weights)
        }
        (None, Some(network), Some(path)) => (path, read_network(network)?, weights::read(path)?),
        _ => bail!("an ONNX model, or --network and --weights, are needed"),
    };
    let place = path.display().to_string();
    let weights = fixed_weights(&place, arrays, &network, args.frac_bits)?;
    let member = Member::load(&args.home)?;
    let words = import_words(&network, &weights)?;
    let upload = Upload {
        dataset: String::new(),
        part: Part::Predict,
        images: Tensor::new(
            vec![words.len() / IMPORT_ROW_WORDS, IMPORT_ROW_WORDS],
            words,
        ),
        labels: None,
        shape: vec![1, 1, IMPORT_ROW_WORDS],
    };
    let job = |upload: String| {
        let kind = JobKind::ImportModel {
            network: network.to_toml(),
            frac_bits: args.frac_bits,
            ring_bits: member.consortium.core.ring_bits,
            upload,
            save_as: args.save_as.clone(),
            preparation: args.preprocess.map(|Normalise(p)| Preparation {
                mean: p.mean,
                std: p.std,
            }),
        };
        trefoil_models::schedule(&kind)?;
        member.describe("import-model", kind, &args.job)
    };
    // A job that cannot be is found before a weight is shared.
    job("unnamed".into())?;
    block_on(async {
        let remote = member.connect().await?;
        let bar = bar(upload.images.shape()[0] as u64, "kilowords");
        bar.set_message("sharing the weights");
        let sent = remote
            .upload(upload, &mut |done| bar.set_position(done as u64))
            .await;
        bar.finish_and_clear();
        let receipt = sent.map_err(|err| advise(err, "the weights were not shared"))?;
        let record = Record {
            job: job(receipt.upload)?,
            show: Show::default(),
        };
        let done = member
            .run(&remote, record, "keeping the weights", args.job.detach)
            .await?;
        remote.close().await;
        match done {
            Some(done) => present(&done, &Show::default()),
            None => Ok(()),
        }
    })
}

#[cfg(test)]
mod tests {
    use super::super::npz;
    use super::*;

    fn network() -> Network {
        let toml =
            "name = \"linear\"\ninput = [1, 2, 2]\nclasses = 2\n[[layer]]\nkind = \"dense\"\n";
        Network::parse(toml).unwrap()
    }

    type Array<'a> = (&'a str, Vec<usize>, Vec<f64>);

    /// What is said of these arrays.
    fn read(arrays: &[Array<'_>]) -> Result<BTreeMap<String, Tensor>> {
        let arrays: Vec<_> = arrays
            .iter()
            .map(|(name, shape, values)| ((*name).to_owned(), shape.clone(), values.clone()))
            .collect();
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("w.npz");
        std::fs::write(&path, npz::archive(&arrays).unwrap()).unwrap();
        fixed_weights("w.npz", weights::read(&path)?, &network(), 16)
    }

    #[test]
    fn weights_that_fit_are_read_to_the_last_bit_and_others_are_named() {
        let names: Vec<String> = network().parameters().into_iter().map(|p| p.0).collect();
        let [weight, bias] = [names[0].as_str(), names[1].as_str()];
        let shape = network().parameters()[0].1.clone();
        let good = [
            (
                weight,
                shape.clone(),
                (0..8).map(|i| f64::from(i) / 65536.0 - 15.0).collect(),
            ),
            (bias, vec![2], vec![-1.0 / 65536.0, 15.99]),
        ];
        let read_good = read(&good).unwrap();
        assert_eq!(read_good[weight].data()[1], (-15i64 * 65536 + 1) as u64);
        assert_eq!(read_good[bias].data()[0], -1i64 as u64);
        let fault = |change: fn(&mut Vec<Array<'_>>)| {
            let mut arrays = good.to_vec();
            change(&mut arrays);
            format!("{:#}", read(&arrays).unwrap_err())
        };
        let missing = fault(|arrays| drop(arrays.pop()));
        assert!(
            missing.contains("there is no array") && missing.contains(bias),
            "{missing}"
        );
        let shaped = fault(|arrays| arrays[1].1 = vec![1, 2]);
        assert!(shaped.contains("has shape [1, 2]"), "{shaped}");
        for wrong in [16.0, -16.0, f64::NAN, f64::INFINITY] {
            let mut arrays = good.to_vec();
            arrays[1].2[1] = wrong;
            let said = format!("{:#}", read(&arrays).unwrap_err());
            assert!(said.contains("value number 1 is"), "{said}");
        }
        let more = fault(|arrays| arrays.push(("other", vec![1], vec![0.0])));
        assert!(more.contains("no parameter other"), "{more}");
    }

    #[test]
    fn a_running_variance_below_zero_is_refused_and_a_running_mean_is_not() {
        let toml = "name = \"normed\"\ninput = [1, 2, 2]\nclasses = 2\n[[layer]]\nkind = \"batch_norm\"\n[[layer]]\nkind = \"dense\"\n";
        let network = Network::parse(toml).unwrap();
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("w.npz");
        let read = |mean: f64, variance: f64| {
            let arrays = network.kept().into_iter().map(|(name, shape)| {
                let value = match name.rsplit('.').next() {
                    Some("mean") => mean,
                    Some("variance") => variance,
                    _ => 0.5,
                };
                let len = shape.iter().product();
                (name, shape, vec![value; len])
            });
            let arrays: Vec<_> = arrays.collect();
            let has = |end: &str| arrays.iter().any(|(name, ..)| name.ends_with(end));
            assert!(has(".mean") && has(VARIANCE));
            std::fs::write(&path, npz::archive(&arrays).unwrap()).unwrap();
            let arrays = weights::read(&path).unwrap();
            fixed_weights("w.npz", arrays, &network, 16).map_err(|err| format!("{err:#}"))
        };
        read(-3.0, 0.0).unwrap();
        let said = read(-3.0, -1.0 / 512.0).unwrap_err();
        assert!(
            said.contains(VARIANCE) && said.contains("values from 0 to"),
            "{said}"
        );
    }
}
