//! An experiment file: which network, which data, how it is split among hospitals, how it trains,
//! what is predicted. `trefoil simulate` runs one; every shipped one is parsed by a test.

use std::path::{Path, PathBuf};

use anyhow::{Context, Result, bail};
use serde::Deserialize;
use trefoil_models::job::{PredictOutput, TrainSpec};
use trefoil_models::network::LayerSpec;
use trefoil_models::{Network, schedule};

use crate::data::{self, Crop, Dataset, Preprocess, Splits, Want};

/// The shipped default of `trefoil simulate`.
pub const QUICKSTART: &str = include_str!("../../configs/quickstart.toml");

/// A whole experiment, as written in its file.
#[derive(Clone, Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Experiment {
    /// A shipped network's name, or the path of a network file (from the experiment's folder).
    pub network: String,
    /// A layer in the place of each of the network's activations, as in a network file.
    pub activation: Option<LayerSpec>,
    /// The images.
    pub data: DataSection,
    /// How to train.
    #[serde(default)]
    pub training: TrainSpec,
    /// What to predict.
    #[serde(default)]
    pub predict: PredictSection,
}

/// Where the images come from and who holds which.
#[derive(Clone, Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct DataSection {
    /// `digits`, `mnist`, `fashion`, `pneumonia`, or the path of an IDX folder, an `.npz` file or a folder of
    /// pictures.
    pub source: String,
    /// Number of hospitals among which the rows are split.
    #[serde(default = "three")]
    pub hospitals: usize,
    /// Use the first so many training rows only.
    pub train_rows: Option<usize>,
    /// Use the first so many test rows only.
    pub test_rows: Option<usize>,
    /// Which rows the model is judged by. Choose hyper-parameters by the validation split, so that
    /// the test split stays unseen.
    #[serde(default)]
    pub evaluate: Judge,
    /// Pixel statistics; measured on the training split if absent.
    pub preprocess: Option<Preprocess>,
    /// Class names in order.
    #[serde(default)]
    pub class_names: Vec<String>,
}

/// A split that a model is judged by.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Judge {
    /// The test split.
    #[default]
    Test,
    /// The validation split, where the data has one.
    Validation,
}

/// The prediction at the end.
#[derive(Clone, Debug, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct PredictSection {
    /// Number of test images that one hospital has classified.
    pub images: usize,
    /// What it learns of each.
    pub output: PredictOutput,
}

impl Default for PredictSection {
    fn default() -> PredictSection {
        PredictSection {
            images: 10,
            output: PredictOutput::Class,
        }
    }
}

fn three() -> usize {
    3
}

/// An experiment with its network and data loaded and checked.
#[derive(Clone, Debug)]
pub struct Loaded {
    /// The file's content.
    pub experiment: Experiment,
    /// The network.
    pub network: Network,
    /// The images.
    pub splits: Splits,
    /// Pixel statistics.
    pub preprocess: Preprocess,
    /// Things the user should know about the data.
    pub warnings: Vec<String>,
}

impl Loaded {
    /// Whether the AUC is computed: two classes, and not too many rows to count.
    pub fn wants_auc(&self) -> bool {
        self.network.classes == 2 && self.splits.test.len() <= schedule::MAX_AUC_ROWS
    }
}

impl Experiment {
    /// Parses an experiment; `place` names it in errors.
    pub fn parse(text: &str, place: &str) -> Result<Experiment> {
        let experiment: Experiment =
            toml::from_str(text).with_context(|| format!("{place}: not an experiment file"))?;
        if !(1..=64).contains(&experiment.data.hospitals) {
            bail!(
                "{place}: data.hospitals is {}; 1 to 64 are possible",
                experiment.data.hospitals
            );
        }
        let of_jobs = [
            ("start_from", experiment.training.start_from.is_some()),
            ("early_stop", experiment.training.early_stop.is_some()),
        ];
        if let Some((key, _)) = of_jobs.iter().find(|(_, set)| *set) {
            bail!(
                "{place}: training.{key}: an experiment trains once, from seeded weights, to its end; `trefoil train` can do this"
            );
        }
        experiment
            .training
            .check()
            .with_context(|| format!("{place}: [training]"))?;
        Ok(experiment)
    }

    /// An experiment of one hospital without a file; `source` as in [`DataSection`].
    pub fn with_training(network: &str, source: &str, training: TrainSpec) -> Result<Experiment> {
        training.check()?;
        Ok(Experiment {
            network: network.into(),
            activation: None,
            data: DataSection {
                source: source.into(),
                hospitals: 1,
                train_rows: None,
                test_rows: None,
                evaluate: Judge::default(),
                preprocess: None,
                class_names: Vec::new(),
            },
            training,
            predict: PredictSection::default(),
        })
    }

    /// Reads an experiment file; the shipped quickstart without one.
    pub fn read(file: Option<&Path>) -> Result<Experiment> {
        match file {
            None => Experiment::parse(QUICKSTART, "configs/quickstart.toml"),
            Some(path) => {
                let text = std::fs::read_to_string(path)
                    .with_context(|| format!("cannot read the experiment {}", path.display()))?;
                let mut experiment = Experiment::parse(&text, &path.display().to_string())?;
                let beside = path
                    .parent()
                    .unwrap_or(Path::new("."))
                    .join(&experiment.network);
                if beside.is_file() {
                    experiment.network = beside.display().to_string();
                }
                Ok(experiment)
            }
        }
    }

    /// Loads network and data and checks that they fit each other.
    pub fn load(self, data: Option<&Path>) -> Result<Loaded> {
        let mut network = read_network(&self.network)?;
        if let Some(activation) = &self.activation {
            network = network.with_activation(activation).context("activation")?;
        }
        self.training.check_for(&network).context("[training]")?;
        let want = Want {
            shape: Some(network.input),
            classes: Some(network.classes),
            class_names: self.data.class_names.clone(),
            seed: self.training.seed,
            crop: Crop::None,
        };
        let (source, warnings) = data::resolve(&self.data.source, data, want)?;
        let mut splits = data::load(&source).with_context(|| {
            format!(
                "the data {:?} does not fit the network {}, which reads {:?} and tells {} classes apart",
                self.data.source, network.name, network.input, network.classes
            )
        })?;
        if self.data.evaluate == Judge::Validation {
            splits.test = splits
                .validation
                .take()
                .context("data.evaluate is \"validation\", but the data has no validation split")?;
        }
        splits.train = first(&splits.train, self.data.train_rows, "train")?;
        splits.test = first(&splits.test, self.data.test_rows, "test")?;
        if splits.train.len() < self.training.batch {
            bail!(
                "training.batch is {}, but there are {} training images: make the batch smaller",
                self.training.batch,
                splits.train.len()
            );
        }
        let preprocess = match self.data.preprocess {
            Some(given) => given,
            None => Preprocess::measure(&splits.train)?,
        };
        preprocess.check()?;
        let mut warnings = warnings;
        if network.classes == 2 && splits.test.len() > schedule::MAX_AUC_ROWS {
            warnings.push(format!(
                "no AUC: it counts at most {} test rows, there are {}",
                schedule::MAX_AUC_ROWS,
                splits.test.len()
            ));
        }
        let predict = self.predict.images.min(splits.test.len());
        let mut experiment = self;
        experiment.predict.images = predict;
        Ok(Loaded {
            experiment,
            network,
            splits,
            preprocess,
            warnings,
        })
    }
}

/// A network by shipped name or path.
pub fn read_network(name: &str) -> Result<Network> {
    if Network::shipped_text(name).is_some() {
        return Ok(Network::builtin(name)?);
    }
    let path = PathBuf::from(name);
    let text = std::fs::read_to_string(&path).with_context(|| {
        let shipped: Vec<&str> = Network::shipped().collect();
        format!(
            "{name:?} is neither a network file nor a shipped network ({})",
            shipped.join(", ")
        )
    })?;
    Network::parse(&text).with_context(|| format!("{}: not a network", path.display()))
}

fn first(data: &Dataset, rows: Option<usize>, split: &str) -> Result<Dataset> {
    match rows {
        None => Ok(data.clone()),
        Some(rows) if (1..=data.len()).contains(&rows) => {
            Ok(data::subset(data, &(0..rows).collect::<Vec<_>>())?)
        }
        Some(rows) => bail!(
            "data.{split}_rows is {rows}; the data has {} such rows",
            data.len()
        ),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn shipped_experiments_parse() {
        let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("../configs");
        for name in [
            "quickstart.toml",
            "pneumonia.toml",
            "pneumonia-logistic.toml",
            "digits-logistic.toml",
            "knn-mnist.toml",
            "mnist-lenet.toml",
            "minimal/experiment.toml",
            "training.toml",
        ] {
            let experiment = Experiment::read(Some(&folder.join(name))).expect(name);
            read_network(&experiment.network).expect(name);
        }
    }

    #[test]
    fn the_file_with_every_training_key_leaves_none_out() {
        let text = include_str!("../../configs/training.toml");
        let file: toml::Table = text.parse().expect("TOML");
        let spec = Experiment::parse(text, "training.toml")
            .expect("parses")
            .training;
        let all = toml::Table::try_from(&spec).expect("a table");
        let written = file["training"].as_table().expect("a table");
        for key in all.keys() {
            assert!(
                written.contains_key(key),
                "configs/training.toml lacks {key}"
            );
        }
    }

    #[test]
    fn an_unknown_key_is_an_error_that_names_file_line_and_key() {
        let text = "network = \"mlp\"\nepoch = 3\n[data]\nsource = \"digits\"\n";
        let error = format!(
            "{:#}",
            Experiment::parse(text, "my.toml").expect_err("unknown key")
        );
        for part in ["my.toml", "line 2", "epoch"] {
            assert!(error.contains(part), "{error}");
        }
    }

    #[test]
    fn a_network_that_does_not_fit_the_data_is_refused_with_both_shapes() {
        let text = "network = \"xray\"\n[data]\nsource = \"digits\"\n";
        let error = Experiment::parse(text, "my.toml")
            .expect("parses")
            .load(None)
            .expect_err("two classes");
        let error = format!("{error:#}");
        assert!(
            error.contains("2 classes") && error.contains("digits"),
            "{error}"
        );
    }
}
