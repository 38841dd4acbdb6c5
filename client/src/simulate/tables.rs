//! The rows as the three parties hold them, in the clear: what a simulation may know and the plain
//! reference reads. Order: by hospital in the order of the data set's contributions.

use anyhow::Result;
use trefoil_models::plain_run::{Table, Tables};
use trefoil_models::schedule;
use trefoil_protocol::Tensor;

use crate::data::{self, Dataset, Preprocess};
use crate::rows::{images, labels};

/// Which split of a holding.
type Split = fn(&Holding) -> &Dataset;

/// One hospital's rows.
#[derive(Clone, Debug)]
pub struct Holding {
    /// Its training rows.
    pub train: Dataset,
    /// Its test rows.
    pub test: Dataset,
}

/// Splits a data set among hospitals; every hospital holds rows of both splits.
pub fn holdings(splits: &data::Splits, hospitals: usize, seed: u64) -> Result<Vec<Holding>> {
    let train = data::split_among(splits.train.len(), hospitals, seed);
    let test = data::split_among(splits.test.len(), hospitals, seed);
    let mut out = Vec::new();
    for (train, test) in train.iter().zip(&test) {
        out.push(Holding {
            train: data::subset(&splits.train, train)?,
            test: data::subset(&splits.test, test)?,
        });
    }
    Ok(out)
}

fn joined(parts: impl Iterator<Item = Tensor>) -> Table {
    let mut table = Table {
        row_words: 0,
        words: Vec::new(),
    };
    for part in parts {
        table.row_words = part.shape()[1];
        table.words.extend(part.into_data());
    }
    table
}

/// The tables of a data set whose contributions come in the order of `holdings`.
pub fn tables(holdings: &[&Holding], preprocess: &Preprocess, frac_bits: u8) -> Result<Tables> {
    let mut tables = Tables::new();
    let splits: [(&str, &str, Split); 2] = [
        (schedule::TRAIN_IMAGES, schedule::TRAIN_LABELS, |h| &h.train),
        (schedule::TEST_IMAGES, schedule::TEST_LABELS, |h| &h.test),
    ];
    for (image_table, label_table, part) in splits {
        let parts: Result<Vec<Tensor>> = holdings
            .iter()
            .map(|h| images(part(h).images.view(), preprocess, frac_bits))
            .collect();
        tables.insert(image_table.into(), joined(parts?.into_iter()));
        tables.insert(
            label_table.into(),
            joined(holdings.iter().map(|h| labels(part(h)))),
        );
    }
    Ok(tables)
}

/// Rows of all hospitals one after the other.
pub fn concatenated(holdings: &[&Holding], part: Split) -> Result<(Vec<u8>, ndarray::Array4<u8>)> {
    let labels = holdings
        .iter()
        .flat_map(|h| part(h).labels.iter().copied())
        .collect();
    let images: Vec<_> = holdings.iter().map(|h| part(h).images.view()).collect();
    Ok((labels, ndarray::concatenate(ndarray::Axis(0), &images)?))
}
