//! Early stop: training ends before its last epoch when a figure that the parties open after each
//! epoch no longer grows, and the model is that of the best epoch.
//!
//! The figure is the number of right predictions on training rows that the job sets aside. It is a
//! whole number and the rule compares whole numbers, so that all nodes, the plain run and a session
//! that takes the job up again decide alike. What it reveals and to whom: `docs/training.md`.

use std::collections::BTreeMap;
use std::fmt;

use serde::{Deserialize, Serialize};
use trefoil_protocol::Tensor;

use crate::ModelError;
use crate::job::{check_range, job_error};

/// Longest wait for a better epoch.
const MAX_PATIENCE: usize = 1_000;
/// The output of a step that is opened to the parties.
pub const VALIDATION_RIGHT: &str = "validation_right";
/// Before the names of the best epoch's weights among the carried state.
const BEST: &str = "best/";

/// When training stops.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct EarlyStop {
    /// After so many epochs in a row that were no better; 1 to 1000.
    pub patience: usize,
    /// Better is more than this above the best accuracy so far; 0 to 0.5.
    #[serde(default)]
    pub min_delta: f64,
    /// Training rows that are set aside, by the job's seed: they are never trained on.
    pub validation_rows: usize,
}

impl EarlyStop {
    /// Checks every field's range; how many rows there are to set aside is the schedule's matter.
    pub(crate) fn check(&self) -> Result<(), ModelError> {
        check_range("early_stop.patience", self.patience, 1..=MAX_PATIENCE)?;
        check_range(
            "early_stop.validation_rows",
            self.validation_rows,
            1..=crate::schedule::MAX_AUC_ROWS,
        )?;
        if (0.0..=0.5).contains(&self.min_delta) {
            return Ok(());
        }
        Err(job_error(
            "early_stop.min_delta",
            self.min_delta,
            "0 to 0.5 are possible",
        ))
    }
}

impl fmt::Display for EarlyStop {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(
            f,
            "early stop after {} epochs without more than {} of accuracy gained on {} training rows set aside",
            self.patience, self.min_delta, self.validation_rows
        )
    }
}

/// Where a schedule may end its epochs.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Stopping {
    /// The rule.
    pub rule: EarlyStop,
    /// The step after the last epoch.
    pub end: usize,
}

/// The figures of a run so far, and what follows from them.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Validated {
    /// Right rows after each epoch.
    history: Vec<u64>,
    best: u64,
    waited: usize,
}

impl Validated {
    /// As after these epochs: what a checkpoint tells.
    pub fn after(rule: &EarlyStop, history: &[u64]) -> Validated {
        let mut validated = Validated::default();
        for right in history {
            validated.note(rule, *right);
        }
        validated
    }

    /// Right rows after each epoch so far.
    pub fn history(&self) -> &[u64] {
        &self.history
    }

    /// Whether the last epoch is the best one.
    pub fn is_best(&self) -> bool {
        !self.history.is_empty() && self.waited == 0
    }

    /// Takes an epoch's figure; whether it is the best epoch so far.
    fn note(&mut self, rule: &EarlyStop, right: u64) -> bool {
        let needed = (rule.min_delta * rule.validation_rows as f64) as u64;
        let better = self.history.is_empty() || right > self.best + needed;
        self.history.push(right);
        self.waited = if better { 0 } else { self.waited + 1 };
        if better {
            self.best = right;
        }
        better
    }

    /// After step `step` has opened `right`: keeps or brings back the best epoch's `save` among the
    /// carried `state`, and says which step is next. What is carried may be shares: they are copied.
    pub fn next(
        &mut self,
        stopping: &Stopping,
        step: usize,
        right: u64,
        save: &[String],
        state: &mut BTreeMap<String, Tensor>,
    ) -> usize {
        if self.note(&stopping.rule, right) {
            for name in save {
                if let Some(value) = state.get(name).cloned() {
                    state.insert(format!("{BEST}{name}"), value);
                }
            }
        }
        let stops = self.waited >= stopping.rule.patience || step + 1 >= stopping.end;
        if !stops {
            return step + 1;
        }
        for name in save {
            if let Some(value) = state.remove(&format!("{BEST}{name}")) {
                state.insert(name.clone(), value);
            }
        }
        stopping.end
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const RULE: EarlyStop = EarlyStop {
        patience: 2,
        min_delta: 0.01,
        validation_rows: 200,
    };

    fn state(value: u64) -> BTreeMap<String, Tensor> {
        BTreeMap::from([("w".to_owned(), Tensor::new(vec![1], vec![value]))])
    }

    #[test]
    fn it_stops_after_its_patience_and_the_best_epoch_comes_back() {
        // An epoch has 4 steps, the last of which opens the figure; 10 epochs.
        let stopping = Stopping {
            rule: RULE,
            end: 40,
        };
        let save = ["w".to_owned()];
        let mut validated = Validated::default();
        let mut carried = state(0);
        // 0.01 of 200 rows are 2: 103 is better than 100, 105 is not better than 103.
        for (epoch, right) in [100, 103, 105, 104].into_iter().enumerate() {
            carried.extend(state(epoch as u64));
            let step = 4 * epoch + 3;
            let next = validated.next(&stopping, step, right, &save, &mut carried);
            assert_eq!(next, if epoch == 3 { 40 } else { step + 1 });
            let taken_up = Validated::after(&RULE, validated.history());
            assert_eq!(taken_up, validated);
        }
        assert_eq!(carried, state(1), "and nothing else is carried");
    }

    #[test]
    fn without_a_stop_the_best_epoch_is_kept_too() {
        let stopping = Stopping { rule: RULE, end: 8 };
        let save = ["w".to_owned()];
        let mut validated = Validated::default();
        let mut carried = state(7);
        assert_eq!(validated.next(&stopping, 3, 50, &save, &mut carried), 4);
        carried.extend(state(8));
        assert_eq!(validated.next(&stopping, 7, 51, &save, &mut carried), 8);
        assert_eq!(carried, state(7));
    }

    #[test]
    fn a_rule_without_sense_is_refused() {
        let wrong: [fn(&mut EarlyStop); 5] = [
            |rule| rule.patience = 0,
            |rule| rule.patience = 1_001,
            |rule| rule.validation_rows = 0,
            |rule| rule.min_delta = -0.1,
            |rule| rule.min_delta = f64::NAN,
        ];
        for change in wrong {
            let mut rule = RULE;
            rule.check().unwrap();
            change(&mut rule);
            assert!(rule.check().is_err(), "{rule}");
        }
    }
}
