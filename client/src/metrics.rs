//! What a trained classifier is judged by: the confusion matrix and what
//! follows from it, and the area under the ROC curve.
//!
//! It takes plain predictions and labels; how they were opened, and to whom, is
//! not its business.

use std::fmt;

use ndarray::Array2;

/// Input that no figure can be computed from.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum MetricsError {
    /// Two lists that have to go together do not.
    #[error("{what}: expected {expected}, found {found}")]
    Length {
        /// Which list.
        what: &'static str,
        /// The other's length.
        expected: usize,
        /// Its length.
        found: usize,
    },
    /// A class that is not one.
    #[error("{what}, row {row}: expected a class from 0 to {}, found {found}", .classes - 1)]
    Class {
        /// Labels or predictions.
        what: &'static str,
        /// Which row.
        row: usize,
        /// How many classes there are.
        classes: usize,
        /// What was there.
        found: u8,
    },
    /// A score that cannot be ranked.
    #[error("scores, row {row}: not a number")]
    NotANumber {
        /// Which row.
        row: usize,
    },
    /// The area under the curve needs rows of both classes.
    #[error("rows of class {missing}: expected at least 1, found 0")]
    OneClass {
        /// The class without rows.
        missing: u8,
    },
}

/// How often rows of each class were given each class.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Confusion {
    counts: Array2<u64>,
    names: Vec<String>,
}

impl Confusion {
    /// Counts predictions against labels. There are as many classes as names.
    pub fn new(
        labels: &[u8],
        predicted: &[u8],
        names: &[String],
    ) -> Result<Confusion, MetricsError> {
        let (expected, found) = (labels.len(), predicted.len());
        if expected != found {
            return Err(MetricsError::Length {
                what: "predictions",
                expected,
                found,
            });
        }
        let classes = names.len();
        for (what, list) in [("labels", labels), ("predictions", predicted)] {
            if let Some(row) = list.iter().position(|class| usize::from(*class) >= classes) {
                return Err(MetricsError::Class {
                    what,
                    row,
                    classes,
                    found: list[row],
                });
            }
        }
        let mut counts = Array2::zeros((classes, classes));
        for (label, class) in labels.iter().zip(predicted) {
            counts[[usize::from(*label), usize::from(*class)]] += 1;
        }
        Ok(Confusion {
            counts,
            names: names.to_vec(),
        })
    }

    /// A matrix counted elsewhere: a row for each true class, a column for each predicted one.
    pub fn from_counts(counts: Array2<u64>, names: Vec<String>) -> Result<Confusion, MetricsError> {
        let classes = names.len();
        if let Some(found) = [counts.nrows(), counts.ncols()]
            .into_iter()
            .find(|n| *n != classes)
        {
            return Err(MetricsError::Length {
                what: "rows and columns of the confusion matrix",
                expected: classes,
                found,
            });
        }
        Ok(Confusion { counts, names })
    }

    /// The counts: a row for each true class, a column for each predicted one.
    pub fn counts(&self) -> &Array2<u64> {
        &self.counts
    }

    /// The classes' names.
    pub fn names(&self) -> &[String] {
        &self.names
    }

    /// All rows.
    pub fn total(&self) -> u64 {
        self.counts.sum()
    }

    /// The part of all rows that is right; `None` without rows.
    pub fn accuracy(&self) -> Option<f64> {
        ratio(self.counts.diag().sum(), self.total())
    }

    /// The mean recall over the classes that have rows: accuracy as if each
    /// class were as frequent as every other.
    pub fn balanced_accuracy(&self) -> Option<f64> {
        let recalls: Vec<f64> = (0..self.names.len())
            .filter_map(|class| self.recall(class))
            .collect();
        (!recalls.is_empty()).then(|| recalls.iter().sum::<f64>() / recalls.len() as f64)
    }

    /// Of the rows of a class, the part that was given it.
    pub fn recall(&self, class: usize) -> Option<f64> {
        ratio(self.counts[[class, class]], self.counts.row(class).sum())
    }

    /// Of the rows that were given a class, the part that is of it.
    pub fn precision(&self, class: usize) -> Option<f64> {
        ratio(self.counts[[class, class]], self.counts.column(class).sum())
    }
}

fn ratio(part: u64, whole: u64) -> Option<f64> {
    (whole > 0).then(|| part as f64 / whole as f64)
}

/// A table: true classes down, predicted ones across, recall and precision at
/// the edges.
impl fmt::Display for Confusion {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let percent =
            |value: Option<f64>| value.map_or("-".to_owned(), |v| format!("{:.1} %", 100.0 * v));
        let classes = self.names.len();
        let corner = "true \\ predicted";
        let mut rows = Vec::with_capacity(classes + 2);
        let mut heading = vec![corner.to_owned()];
        heading.extend(self.names.iter().cloned());
        heading.push("recall".to_owned());
        rows.push(heading);
        for class in 0..classes {
            let mut row = vec![self.names[class].clone()];
            row.extend(self.counts.row(class).iter().map(u64::to_string));
            row.push(percent(self.recall(class)));
            rows.push(row);
        }
        let mut last = vec!["precision".to_owned()];
        last.extend((0..classes).map(|class| percent(self.precision(class))));
        last.push(String::new());
        rows.push(last);
        let width = |column: usize| {
            rows.iter()
                .map(|row| row[column].chars().count())
                .max()
                .unwrap_or(0)
        };
        let widths: Vec<usize> = (0..classes + 2).map(width).collect();
        for (number, row) in rows.iter().enumerate() {
            let mut line = format!("{:<1$}", row[0], widths[0]);
            for (cell, width) in row.iter().zip(&widths).skip(1) {
                line += &format!("  {cell:>width$}");
            }
            if number > 0 {
                writeln!(f)?;
            }
            write!(f, "{}", line.trim_end())?;
        }
        Ok(())
    }
}

/// The area under the ROC curve: how often a row of class 1 has a higher score
/// than one of class 0, a tie counting half. By ranks, exact up to the final
/// division.
pub fn auc(scores: &[f64], labels: &[u8]) -> Result<f64, MetricsError> {
    let (expected, found) = (labels.len(), scores.len());
    if expected != found {
        return Err(MetricsError::Length {
            what: "scores",
            expected,
            found,
        });
    }
    if let Some(row) = labels.iter().position(|label| *label > 1) {
        return Err(MetricsError::Class {
            what: "labels",
            row,
            classes: 2,
            found: labels[row],
        });
    }
    if let Some(row) = scores.iter().position(|score| score.is_nan()) {
        return Err(MetricsError::NotANumber { row });
    }
    // + 0.0 makes -0 and 0 the tie that they are.
    let mut ranked: Vec<(f64, u8)> = scores
        .iter()
        .zip(labels)
        .map(|(score, label)| (score + 0.0, *label))
        .collect();
    ranked.sort_by(|a, b| a.0.total_cmp(&b.0));
    let (mut below, mut positives, mut twice) = (0u128, 0u128, 0u128);
    for tied in ranked.chunk_by(|a, b| a.0 == b.0) {
        let ones = tied.iter().filter(|row| row.1 == 1).count() as u128;
        let zeros = tied.len() as u128 - ones;
        twice += ones * (2 * below + zeros);
        below += zeros;
        positives += ones;
    }
    match (below, positives) {
        (0, _) => Err(MetricsError::OneClass { missing: 0 }),
        (_, 0) => Err(MetricsError::OneClass { missing: 1 }),
        _ => Ok(twice as f64 / (2 * below * positives) as f64),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn names(list: &[&str]) -> Vec<String> {
        list.iter().map(|name| name.to_string()).collect()
    }

    fn example() -> Confusion {
        let labels = [0, 0, 0, 0, 1, 1, 1, 1, 1, 1];
        let predicted = [0, 0, 0, 1, 1, 1, 1, 0, 0, 1];
        Confusion::new(&labels, &predicted, &names(&["normal", "pneumonia"])).unwrap()
    }

    #[test]
    fn the_figures_follow_from_the_counts() {
        let confusion = example();
        assert_eq!(confusion.counts(), &ndarray::arr2(&[[3, 1], [2, 4]]));
        assert_eq!(confusion.accuracy(), Some(0.7));
        assert_eq!(confusion.recall(0), Some(0.75));
        assert_eq!(confusion.recall(1), Some(4.0 / 6.0));
        assert_eq!(confusion.precision(0), Some(0.6));
        assert_eq!(confusion.precision(1), Some(0.8));
        assert_eq!(
            confusion.balanced_accuracy(),
            Some((0.75 + 4.0 / 6.0) / 2.0)
        );
    }

    #[test]
    fn a_class_without_rows_does_not_count() {
        let confusion = Confusion::new(&[0, 0, 2], &[0, 2, 2], &names(&["a", "b", "c"])).unwrap();
        assert_eq!(confusion.recall(1), None);
        assert_eq!(confusion.precision(1), None);
        assert_eq!(confusion.balanced_accuracy(), Some(0.75));
        let empty = Confusion::new(&[], &[], &names(&["a", "b"])).unwrap();
        assert_eq!((empty.accuracy(), empty.balanced_accuracy()), (None, None));
    }

    #[test]
    fn the_table_lines_up() {
        let expected = "\
true \\ predicted  normal  pneumonia  recall
normal                 3          1  75.0 %
pneumonia              2          4  66.7 %
precision         60.0 %     80.0 %";
        assert_eq!(example().to_string(), expected);
    }

    #[test]
    fn lists_that_do_not_go_together_are_refused() {
        let two = names(&["a", "b"]);
        let said = Confusion::new(&[0, 1], &[0], &two).unwrap_err().to_string();
        assert_eq!(said, "predictions: expected 2, found 1");
        let said = Confusion::new(&[0, 1], &[0, 2], &two)
            .unwrap_err()
            .to_string();
        assert_eq!(
            said,
            "predictions, row 1: expected a class from 0 to 1, found 2"
        );
    }

    #[test]
    fn auc_is_the_chance_of_the_right_order() {
        assert_eq!(auc(&[0.1, 0.2, 0.8, 0.9], &[0, 0, 1, 1]), Ok(1.0));
        assert_eq!(auc(&[0.9, 0.8, 0.2, 0.1], &[0, 0, 1, 1]), Ok(0.0));
        assert_eq!(auc(&[0.5; 6], &[0, 1, 0, 1, 1, 0]), Ok(0.5));
        assert_eq!(auc(&[-0.0, 0.0], &[1, 0]), Ok(0.5));
        assert_eq!(auc(&[0.1, 0.4, 0.35, 0.8], &[0, 0, 1, 1]), Ok(0.75));
        assert_eq!(auc(&[f64::NEG_INFINITY, f64::INFINITY], &[0, 1]), Ok(1.0));
    }

    #[test]
    fn auc_equals_the_count_over_all_pairs() {
        let mut state = 12345u32;
        let mut next = || {
            state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
            state >> 16
        };
        let scores: Vec<f64> = (0..200).map(|_| f64::from(next() % 40)).collect();
        let labels: Vec<u8> = (0..200).map(|_| (next() % 2) as u8).collect();
        let (mut halves, mut pairs) = (0, 0);
        for (one, _) in scores.iter().zip(&labels).filter(|row| *row.1 == 1) {
            for (zero, _) in scores.iter().zip(&labels).filter(|row| *row.1 == 0) {
                halves += if one > zero {
                    2
                } else {
                    i32::from(one == zero)
                };
                pairs += 2;
            }
        }
        assert_eq!(
            auc(&scores, &labels),
            Ok(f64::from(halves) / f64::from(pairs))
        );
    }

    #[test]
    fn auc_refuses_what_it_cannot_rank() {
        assert_eq!(
            auc(&[0.1, 0.2], &[1, 1]),
            Err(MetricsError::OneClass { missing: 0 })
        );
        assert_eq!(auc(&[], &[]), Err(MetricsError::OneClass { missing: 0 }));
        assert_eq!(
            auc(&[0.1, f64::NAN], &[0, 1]),
            Err(MetricsError::NotANumber { row: 1 })
        );
        assert!(auc(&[0.1, 0.2], &[0, 2]).is_err());
        assert!(auc(&[0.1], &[0, 1]).is_err());
    }
}
