//! How `trefoil train` is told to learn; what each option means: docs/training.md.

use clap::{Args, ValueEnum};
use trefoil_models::job::{AdamSpec, Loss, LrSchedule, Optimiser, TrainSpec};
use trefoil_protocol::program::Rounding;

/// A loss by its name on the command line.
#[derive(Clone, Copy, Debug, ValueEnum)]
enum LossName {
    SoftmaxCrossEntropy,
    BinaryCrossEntropy,
    MeanSquaredError,
}

/// An optimiser by its name on the command line.
#[derive(Clone, Copy, Debug, ValueEnum)]
enum OptimiserName {
    Sgd,
    Adam,
    Amsgrad,
}

/// Hyper-parameters of `trefoil train`.
#[derive(Debug, Args)]
pub struct RecipeArgs {
    /// Images in a step.
    #[arg(long, default_value_t = 128)]
    batch: usize,
    /// Passes over the training rows.
    #[arg(long, default_value_t = 1)]
    epochs: usize,
    /// End after this many steps, in whichever epoch that is.
    #[arg(long, value_name = "STEPS")]
    max_steps: Option<usize>,
    /// Step size.
    #[arg(long, default_value_t = 0.0625)]
    learning_rate: f64,
    /// Multiply the step size by this ..
    #[arg(long, value_name = "FACTOR", requires = "decay_every")]
    decay: Option<f64>,
    /// .. after every so many epochs.
    #[arg(long, value_name = "EPOCHS", requires = "decay")]
    decay_every: Option<usize>,
    /// Let the step size fall along half a cosine to this part of it, 0 to 1.
    #[arg(long, value_name = "END_FACTOR", conflicts_with = "decay")]
    cosine: Option<f64>,
    /// How weights follow from gradients.
    #[arg(long, value_enum, default_value_t = OptimiserName::Sgd)]
    optimiser: OptimiserName,
    /// Part of the first moment that Adam keeps in a step; 0.9 without it.
    #[arg(long)]
    beta1: Option<f64>,
    /// Part of the second moment that Adam keeps in a step; 0.999 without it.
    #[arg(long)]
    beta2: Option<f64>,
    /// Gradients count as at least about this large with Adam; 1e-4 without it.
    #[arg(long)]
    epsilon: Option<f64>,
    /// Momentum, 0 for none.
    #[arg(long, default_value_t = 0.0)]
    momentum: f64,
    /// Use the momentum as Nesterov does.
    #[arg(long, requires = "momentum")]
    nesterov: bool,
    /// Pull every weight and bias towards 0 by this, times the step size, in each step.
    #[arg(long, default_value_t = 0.0)]
    weight_decay: f64,
    /// What is made small.
    #[arg(long, value_enum, default_value_t = LossName::SoftmaxCrossEntropy)]
    loss: LossName,
    /// A factor on the loss of each class's rows, in the classes' order, with commas: for classes of
    /// different size.
    #[arg(long, value_name = "FACTORS", value_delimiter = ',')]
    class_weights: Vec<f64>,
    /// Compute gradients 2^this times too large, so that small ones are not rounded away.
    #[arg(long, value_name = "BITS", default_value_t = 0)]
    gradient_scale_log2: u8,
    /// Seed of initial weights and batch order; public.
    #[arg(long, default_value_t = 1)]
    seed: u64,
    /// How training rounds: nearest, floor or stochastic.
    #[arg(long, default_value = "nearest", value_parser = parse_rounding)]
    rounding: Rounding,
    /// Fraction bits: those that the rows were shared with.
    #[arg(long, default_value_t = 16)]
    frac_bits: u8,
}

fn parse_rounding(text: &str) -> Result<Rounding, String> {
    match text {
        "nearest" => Ok(Rounding::Nearest),
        "floor" => Ok(Rounding::Floor),
        "stochastic" => Ok(Rounding::Stochastic),
        other => Err(format!("{other:?} is none of nearest, floor, stochastic")),
    }
}

impl RecipeArgs {
    fn optimiser(&self) -> Optimiser {
        let amsgrad = match self.optimiser {
            OptimiserName::Sgd => return Optimiser::Sgd,
            OptimiserName::Adam => false,
            OptimiserName::Amsgrad => true,
        };
        let usual = AdamSpec::default();
        Optimiser::Adam(AdamSpec {
            beta1: self.beta1.unwrap_or(usual.beta1),
            beta2: self.beta2.unwrap_or(usual.beta2),
            epsilon: self.epsilon.unwrap_or(usual.epsilon),
            amsgrad,
        })
    }

    /// As a job says it; not checked yet.
    pub fn spec(&self, ring_bits: u8) -> TrainSpec {
        let schedule = match (self.decay_every, self.decay, self.cosine) {
            (Some(every_epochs), Some(factor), _) => LrSchedule::Step {
                every_epochs,
                factor,
            },
            (_, _, Some(end_factor)) => LrSchedule::Cosine { end_factor },
            _ => LrSchedule::Constant,
        };
        TrainSpec {
            preparation: None,
            batch: self.batch,
            epochs: self.epochs,
            learning_rate: self.learning_rate,
            momentum: self.momentum,
            schedule,
            seed: self.seed,
            rounding: self.rounding,
            frac_bits: self.frac_bits,
            ring_bits,
            loss: match self.loss {
                LossName::SoftmaxCrossEntropy => Loss::SoftmaxCrossEntropy,
                LossName::BinaryCrossEntropy => Loss::BinaryCrossEntropy,
                LossName::MeanSquaredError => Loss::MeanSquaredError,
            },
            class_weights: self.class_weights.clone(),
            nesterov: self.nesterov,
            weight_decay: self.weight_decay,
            gradient_scale_log2: self.gradient_scale_log2,
            optimiser: self.optimiser(),
            max_steps: self.max_steps,
            start_from: None,
            early_stop: None,
        }
    }
}

#[cfg(test)]
mod tests {
    use clap::Parser;

    use super::*;

    #[derive(Parser)]
    struct Line {
        #[command(flatten)]
        recipe: RecipeArgs,
    }

    fn spec(words: &str) -> Result<TrainSpec, clap::Error> {
        let words = std::iter::once("train").chain(words.split_whitespace());
        Ok(Line::try_parse_from(words)?.recipe.spec(64))
    }

    #[test]
    fn without_options_a_job_has_the_defaults() {
        assert_eq!(spec("").unwrap(), TrainSpec::default());
    }

    #[test]
    fn every_option_reaches_the_job() {
        let spec = spec(
            "--batch 32 --epochs 3 --learning-rate 0.5 --cosine 0.1 --momentum 0.9 --nesterov \
             --weight-decay 0.001 --loss binary-cross-entropy --class-weights 0.5,2 \
             --gradient-scale-log2 3 --seed 4 --rounding floor --frac-bits 18 --max-steps 7",
        );
        let expected = TrainSpec {
            preparation: None,
            batch: 32,
            epochs: 3,
            learning_rate: 0.5,
            momentum: 0.9,
            schedule: LrSchedule::Cosine { end_factor: 0.1 },
            seed: 4,
            rounding: Rounding::Floor,
            frac_bits: 18,
            ring_bits: 64,
            loss: Loss::BinaryCrossEntropy,
            class_weights: vec![0.5, 2.0],
            nesterov: true,
            weight_decay: 0.001,
            gradient_scale_log2: 3,
            optimiser: Optimiser::Sgd,
            max_steps: Some(7),
            start_from: None,
            early_stop: None,
        };
        assert_eq!(spec.unwrap(), expected);
    }

    #[test]
    fn adam_and_amsgrad_have_their_numbers() {
        let adam = |amsgrad, epsilon| {
            Optimiser::Adam(AdamSpec {
                beta1: 0.8,
                amsgrad,
                epsilon,
                ..AdamSpec::default()
            })
        };
        let found = spec("--optimiser amsgrad --beta1 0.8 --epsilon 0.5").unwrap();
        assert_eq!(found.optimiser, adam(true, 0.5));
        let found = spec("--optimiser adam --beta1 0.8").unwrap();
        assert_eq!(found.optimiser, adam(false, 1e-4));
    }

    #[test]
    fn options_that_exclude_each_other_are_refused() {
        assert!(spec("--cosine 0 --decay 0.5 --decay-every 1").is_err());
        assert!(spec("--nesterov").is_err());
        assert!(spec("--decay 0.5").is_err());
    }
}
