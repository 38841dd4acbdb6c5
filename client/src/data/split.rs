//! Dividing rows: among hospitals, and into training, validation and test.
//!
//! Everything follows from a public seed by SplitMix64 and Fisher-Yates, in
//! integers, so that every machine and every release draws the same parts. It
//! is no source of secrets: keys and masks come from elsewhere.

use super::DataError;

/// SplitMix64 (Steele, Lea and Flood, 2014); `scripts/make-digits.py` holds the
/// same in Python.
struct SplitMix(u64);

impl SplitMix {
    fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9E37_79B9_7F4A_7C15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
        z ^ (z >> 31)
    }

    /// Uniform in `0..bound`: words from the incomplete last stretch are
    /// dropped. `bound` is not 0.
    fn below(&mut self, bound: u64) -> u64 {
        // 2^64 mod bound, the number of words in that stretch.
        let excess = (u64::MAX % bound + 1) % bound;
        loop {
            let word = self.next();
            if word <= u64::MAX - excess {
                return word % bound;
            }
        }
    }
}

/// The numbers `0..n` in an order that the seed decides.
pub fn permutation(n: usize, seed: u64) -> Vec<usize> {
    let mut order: Vec<usize> = (0..n).collect();
    let mut words = SplitMix(seed);
    for i in (1..n).rev() {
        let j = words.below(i as u64 + 1) as usize;
        order.swap(i, j);
    }
    order
}

/// Divides `rows` rows among hospitals: disjoint parts that together hold every
/// row once, whose sizes differ by one at most. Without a hospital there is no
/// part; with more hospitals than rows the last parts are empty.
pub fn split_among(rows: usize, hospitals: usize, seed: u64) -> Vec<Vec<usize>> {
    let order = permutation(rows, seed);
    let mut at = 0;
    (0..hospitals)
        .map(|hospital| {
            let size = rows / hospitals + usize::from(hospital < rows % hospitals);
            at += size;
            order[at - size..at].to_vec()
        })
        .collect()
}

/// Divides `rows` rows in the given proportions: positive numbers that sum to
/// one. The sizes are within one row of the exact proportion, every row is
/// given once, and no part may come out empty.
pub fn split_by_fractions(
    rows: usize,
    fractions: &[f64],
    seed: u64,
) -> Result<Vec<Vec<usize>>, DataError> {
    let setting = "fractions of the hospitals";
    if let Some(bad) = fractions
        .iter()
        .find(|fraction| !(**fraction > 0.0 && **fraction <= 1.0))
    {
        return Err(DataError::setting(
            setting,
            "each above 0 and at most 1",
            bad,
        ));
    }
    let sum: f64 = fractions.iter().sum();
    if (sum - 1.0).abs() > 1e-6 {
        return Err(DataError::setting(setting, "a sum of 1", sum));
    }
    let order = permutation(rows, seed);
    let (mut from, mut share) = (0, 0.0);
    let mut parts = Vec::with_capacity(fractions.len());
    for (hospital, fraction) in fractions.iter().enumerate() {
        share += fraction;
        let last = hospital + 1 == fractions.len();
        let to = if last {
            rows
        } else {
            ((share * rows as f64).round() as usize).min(rows)
        };
        if to <= from {
            let found = format!("{fraction} of {rows} rows for hospital {hospital}");
            return Err(DataError::setting(
                setting,
                "at least one row for each",
                found,
            ));
        }
        parts.push(order[from..to].to_vec());
        from = to;
    }
    Ok(parts)
}

/// The part of a data set that a row belongs to.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Part {
    /// Training.
    Train,
    /// Validation: never trained on, free to look at.
    Validation,
    /// Test.
    Test,
}

impl Part {
    /// As messages call it.
    pub fn name(self) -> &'static str {
        match self {
            Part::Train => "training",
            Part::Validation => "validation",
            Part::Test => "test",
        }
    }
}

/// Divides groups of rows 80 / 10 / 10: whole groups, in the seed's order, go
/// to the test set until it holds a tenth of the rows, then to validation, the
/// rest to training. Returns the part of each group. Rows without a group are
/// groups of one.
pub fn split_80_10_10(group_sizes: &[usize], seed: u64) -> Vec<Part> {
    let rows: usize = group_sizes.iter().sum();
    let tenth = (rows + 5) / 10;
    let mut parts = vec![Part::Train; group_sizes.len()];
    let (mut test, mut validation) = (0, 0);
    for group in permutation(group_sizes.len(), seed) {
        let size = group_sizes[group];
        if test < tenth {
            parts[group] = Part::Test;
            test += size;
        } else if validation < tenth {
            parts[group] = Part::Validation;
            validation += size;
        }
    }
    parts
}

#[cfg(test)]
mod tests {
    use super::*;

    fn sorted(parts: &[Vec<usize>]) -> Vec<usize> {
        let mut all = parts.concat();
        all.sort_unstable();
        all
    }

    #[test]
    fn the_generator_is_split_mix_64() {
        // The reference's first words for seed 1234567.
        let mut words = SplitMix(1_234_567);
        let expected = [
            6_457_827_717_110_365_317,
            3_203_168_211_198_807_973,
            9_817_491_932_198_370_423,
        ];
        assert_eq!([words.next(), words.next(), words.next()], expected);
    }

    #[test]
    fn the_order_is_the_scripts_order() {
        // `shuffle` of scripts/make-digits.py on range(10), seed 7.
        assert_eq!(permutation(10, 7), SCRIPT_ORDER);
    }

    const SCRIPT_ORDER: [usize; 10] = [8, 1, 5, 9, 0, 4, 3, 2, 6, 7];

    #[test]
    fn every_row_goes_to_exactly_one_hospital_and_sizes_differ_by_one_at_most() {
        for (rows, hospitals) in [(8000, 3), (10, 3), (3, 3), (2, 5), (0, 4), (1, 1)] {
            for seed in 0..5 {
                let parts = split_among(rows, hospitals, seed);
                assert_eq!(parts.len(), hospitals);
                assert_eq!(sorted(&parts), (0..rows).collect::<Vec<_>>());
                let sizes: Vec<usize> = parts.iter().map(Vec::len).collect();
                assert!(sizes.iter().max().unwrap() - sizes.iter().min().unwrap() <= 1);
            }
        }
        assert!(split_among(5, 0, 1).is_empty());
    }

    #[test]
    fn the_seed_decides_and_repeats() {
        assert_eq!(split_among(100, 3, 9), split_among(100, 3, 9));
        assert_ne!(split_among(100, 3, 9), split_among(100, 3, 10));
    }

    #[test]
    fn fractions_are_kept_to_the_row() {
        let parts = split_by_fractions(1000, &[0.5, 0.3, 0.2], 4).unwrap();
        assert_eq!(
            parts.iter().map(Vec::len).collect::<Vec<_>>(),
            [500, 300, 200]
        );
        assert_eq!(sorted(&parts), (0..1000).collect::<Vec<_>>());
        let thirds = split_by_fractions(100, &[1.0 / 3.0; 3], 4).unwrap();
        assert_eq!(sorted(&thirds), (0..100).collect::<Vec<_>>());
    }

    #[test]
    fn fractions_that_make_no_sense_are_refused() {
        for fractions in [
            &[0.5, 0.4][..],
            &[],
            &[1.5, -0.5],
            &[f64::NAN, 1.0],
            &[0.0, 1.0],
        ] {
            split_by_fractions(100, fractions, 1).unwrap_err();
        }
        let said = split_by_fractions(10, &[0.99, 0.01], 1)
            .unwrap_err()
            .to_string();
        assert!(said.contains("at least one row for each"), "{said}");
    }

    #[test]
    fn whole_groups_fall_on_one_side_near_80_10_10() {
        let sizes: Vec<usize> = (0..400).map(|group| 1 + group % 4).collect();
        let parts = split_80_10_10(&sizes, 3);
        let count = |part| {
            sizes
                .iter()
                .zip(&parts)
                .filter(|(_, of)| **of == part)
                .map(|(size, _)| size)
                .sum::<usize>()
        };
        assert!((100..104).contains(&count(Part::Test)));
        assert!((100..104).contains(&count(Part::Validation)));
        assert!((793..=800).contains(&count(Part::Train)));
    }
}
