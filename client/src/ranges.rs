//! `trefoil check-ranges`: training steps in the clear on public or synthetic data, and how near each
//! layer comes to the bounds of the number format. Nothing is shared and no node is asked.

use std::path::PathBuf;

use anyhow::{Result, bail};
use clap::Args;
use ndarray::Array4;
use trefoil_consortium::config::simulation_coin_key;
use trefoil_models::job::{DatasetRef, JobKind, TrainSpec};
use trefoil_models::ranges::{self, Part, Report, Row, SPARE_BITS};
use trefoil_models::{Network, schedule};
use trefoil_protocol::prg::Prg;

use crate::data::{Dataset, Preprocess, permutation, subset};
use crate::experiment::{Experiment, read_network};
use crate::follow::bar;
use crate::operate::RecipeArgs;
use crate::simulate::tables::{Holding, tables};

/// Rows of synthetic data, at most, unless one batch has more.
const SYNTHETIC_ROWS: usize = 512;

/// Arguments of `trefoil check-ranges`.
#[derive(Debug, Args)]
pub struct RangesArgs {
    /// A shipped network's name or a network file.
    #[arg(value_name = "NAME|FILE", required_unless_present = "experiment")]
    network: Option<String>,
    /// Public data of the kind that will be trained on: digits, mnist, pneumonia, an .npz file, a
    /// folder of IDX files or pictures; or synthetic, which is noise.
    #[arg(long, value_name = "DATA", required_unless_present = "experiment")]
    data: Option<String>,
    /// Take network, data and hyper-parameters from this experiment file instead.
    #[arg(long, value_name = "FILE", conflicts_with_all = ["network", "data"])]
    experiment: Option<PathBuf>,
    /// Training steps to look at, at most.
    #[arg(long, default_value_t = 20)]
    steps: usize,
    /// Ring bits: 64 or 48.
    #[arg(long, default_value_t = 64)]
    ring_bits: u8,
    /// Print one JSON object.
    #[arg(long)]
    json: bool,
    #[command(flatten)]
    recipe: RecipeArgs,
}

/// What is looked at.
struct Subject {
    network: Network,
    spec: TrainSpec,
    train: Dataset,
    preprocess: Preprocess,
}

/// Uniform noise, one class after the other: no picture is as rough.
fn synthetic(network: &Network, rows: usize, seed: u64) -> Result<Dataset> {
    let [channels, height, width] = network.input;
    let pixels = permutation(rows * network.input_len(), seed);
    let bytes = pixels.iter().map(|pixel| (pixel % 256) as u8).collect();
    Ok(Dataset {
        images: Array4::from_shape_vec((rows, channels, height, width), bytes)?,
        labels: (0..rows).map(|row| (row % network.classes) as u8).collect(),
        classes: network.classes,
        class_names: (0..network.classes)
            .map(|class| class.to_string())
            .collect(),
        provenance: "synthetic".into(),
    })
}

fn from_experiment(experiment: Experiment) -> Result<Subject> {
    let loaded = experiment.load(None)?;
    for warning in &loaded.warnings {
        eprintln!("note: {warning}");
    }
    Ok(Subject {
        spec: loaded.experiment.training,
        network: loaded.network,
        train: loaded.splits.train,
        preprocess: loaded.preprocess,
    })
}

fn subject(args: &RangesArgs) -> Result<Subject> {
    if let Some(file) = &args.experiment {
        return from_experiment(Experiment::read(Some(file))?);
    }
    let (Some(name), Some(data)) = (&args.network, &args.data) else {
        bail!("give a network and --data, or --experiment FILE");
    };
    let spec = args.recipe.spec(args.ring_bits);
    if data != "synthetic" {
        let experiment = Experiment::with_training(name, data, spec)?;
        return from_experiment(experiment);
    }
    let network = read_network(name)?;
    spec.check_for(&network)?;
    // No more than the steps read: noise of large pictures takes longer than a step.
    let rows = args.steps.saturating_mul(spec.batch);
    let rows = rows.clamp(spec.batch, SYNTHETIC_ROWS.max(spec.batch));
    let train = synthetic(&network, rows, spec.seed)?;
    let preprocess = Preprocess::measure(&train)?;
    Ok(Subject {
        network,
        spec,
        train,
        preprocess,
    })
}

/// Looks at the steps of a job on this subject.
fn look(subject: Subject, steps: usize) -> Result<Report> {
    let Subject {
        network,
        spec,
        train,
        preprocess,
    } = subject;
    let job = JobKind::Train {
        network: network.to_toml(),
        spec: spec.clone(),
        dataset: DatasetRef {
            name: "public".into(),
            train_rows: train.len(),
            test_rows: 0,
            snapshot: [0; 32],
        },
        evaluate_each_epoch: false,
        save_as: "none".into(),
        reveal_weights: false,
    };
    let plan = schedule(&job)?;
    let holding = Holding {
        test: subset(&train, &[])?,
        train,
    };
    let tables = tables(&[&holding], &preprocess, spec.frac_bits)?;
    let coins = Prg::new(simulation_coin_key(spec.seed));
    let steps = steps.min(plan.steps.len());
    let bar = bar(steps as u64, "steps");
    bar.set_message("training in the clear");
    let report = ranges::check(&plan, &tables, Some(&coins), steps, |done| {
        bar.set_position(done as u64)
    });
    bar.finish_and_clear();
    Ok(report?)
}

/// Runs the command; an error if a bound is broken.
pub fn run(args: &RangesArgs) -> Result<()> {
    if args.steps == 0 {
        bail!("--steps 0: there is nothing to look at");
    }
    let subject = subject(args)?;
    let title = format!(
        "{}: {} rows of {}, {}",
        subject.network.name,
        subject.train.len(),
        subject.train.provenance,
        subject.spec.describe()
    );
    let frac_bits = subject.spec.frac_bits;
    let report = look(subject, args.steps)?;
    if args.json {
        println!("{}", serde_json::to_string(&report)?);
    } else {
        println!("{title}");
        print(&report);
    }
    if report.is_broken() {
        bail!(
            "a bound is broken: a secure run of these steps would give wrong numbers and would not notice. Use fewer fraction bits than {frac_bits}, smaller steps, or a smaller gradient scale"
        );
    }
    Ok(())
}

fn print(report: &Report) {
    let part = |part: Part| match part {
        Part::Input => "input",
        Part::State => "state",
        Part::Forward => "forward",
        Part::Backward => "backward",
    };
    println!(
        "{:<14} {:<9} {:>12} {:>12} {:>9}  operation",
        "layer", "part", "largest", "bound", "to spare"
    );
    for row in &report.rows {
        println!(
            "{:<14} {:<9} {:>12.6} {:>12.1} {:>9.1}  {}{}",
            row.layer,
            part(row.part),
            row.largest,
            row.bound,
            row.spare_bits,
            operation(row),
            verdict(row),
        );
    }
    println!(
        "{} training step(s); each line is the value with the fewest bits to spare",
        report.steps
    );
    if let Some(stopped) = &report.stopped {
        println!("{stopped}");
    }
}

fn operation(row: &Row) -> String {
    let short: String = row.operation.chars().take(32).collect();
    format!("{short} (step {})", row.step)
}

fn verdict(row: &Row) -> &'static str {
    match row.spare_bits {
        spare if spare < 0.0 => "  BROKEN",
        // What pixels may reach follows from the preprocessing.
        spare if spare < SPARE_BITS && row.part != Part::Input => {
            "  warning: other data may break this bound"
        }
        _ => "",
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;
    use std::path::Path;

    use clap::Parser;

    use super::*;

    #[derive(Parser)]
    struct Line {
        #[command(flatten)]
        args: RangesArgs,
    }

    fn check(words: &str) -> Result<()> {
        let words = std::iter::once("check-ranges").chain(words.split_whitespace());
        run(&Line::try_parse_from(words)?.args)
    }

    #[test]
    fn a_run_within_bounds_passes_and_one_that_is_not_fails() {
        check("logistic --data synthetic --steps 3").expect("in range");
        // A step size that throws the weights out of every format.
        let error = check("logistic --data synthetic --steps 9 --learning-rate 64 --frac-bits 24")
            .expect_err("out of range");
        assert!(error.to_string().contains("broken"), "{error:#}");
    }

    #[test]
    fn every_layer_of_a_large_network_is_reported_on_noise() {
        let words = "check-ranges alexnet --data synthetic --batch 4 --steps 2";
        let args = Line::try_parse_from(words.split(' ')).unwrap().args;
        let subject = subject(&args).unwrap();
        assert_eq!(subject.train.len(), 8, "as many rows as the steps read");
        let layers = subject.network.layers.iter();
        let names: Vec<String> = layers.map(|layer| layer.name.clone()).collect();
        let parameters = subject.network.parameters().into_iter();
        let learning: BTreeSet<String> = parameters
            .filter_map(|(name, _)| Some(name.split_once('.')?.0.to_owned()))
            .collect();
        assert!(
            names.len() > 15 && learning.len() == 10,
            "{names:?}, {learning:?}"
        );
        let report = look(subject, args.steps).unwrap();
        assert!(report.steps == 2 && !report.is_broken());
        // A ReLU behind a pooling has its backward part in that of the pooling.
        let kept = learning
            .iter()
            .flat_map(|name| [Part::State, Part::Backward].map(|part| (name, part)));
        for (name, part) in names.iter().map(|name| (name, Part::Forward)).chain(kept) {
            let mut rows = report.rows.iter();
            let row = rows.find(|row| row.layer == *name && row.part == part);
            let row = row.unwrap_or_else(|| panic!("{name} {part:?} is missing"));
            assert!(row.largest > 0.0 && row.largest < row.bound, "{row:?}");
        }
    }

    #[test]
    fn it_needs_a_subject_and_a_step() {
        assert!(check("").is_err());
        assert!(check("logistic").is_err());
        assert!(check("logistic --data synthetic --steps 0").is_err());
        assert!(check("logistic --data nowhere").is_err());
    }

    #[test]
    fn an_experiment_is_looked_at_as_it_stands() {
        let file = Path::new(env!("CARGO_MANIFEST_DIR")).join("../configs/training.toml");
        check(&format!("--experiment {} --steps 2", file.display())).expect("in range");
    }
}
