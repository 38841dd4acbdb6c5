//! k-nearest-neighbour: secure equals plain bit for bit, and the plain run equals the definition,
//! written down in integers here.

mod common;

use common::{Synthetic, assert_secure_equals_plain, dataset, plain, seed};
use rand_chacha::ChaCha20Rng;
use rand_chacha::rand_core::{Rng, SeedableRng};
use trefoil_models::neighbours::Queries;
use trefoil_models::plain_run::Tables;
use trefoil_models::{JobKind, NeighbourSpec, Schedule, outcome, schedule};

/// Rows of few small values, so that many distances are equal.
fn rows(count: usize, row: usize, classes: usize, seed: u64) -> Synthetic {
    let mut rng = ChaCha20Rng::seed_from_u64(seed);
    let mut below = |n: usize| rng.next_u32() as usize % n;
    Synthetic {
        images: (0..count * row)
            .map(|_| below(5) as f32 / 4.0 - 0.5)
            .collect(),
        labels: (0..count).map(|_| below(classes) as u8).collect(),
        row,
        classes,
    }
}

/// The class of one image: rows by distance, then by number; most votes, then the nearest voter.
fn by_definition(train: &Synthetic, image: &[f32], k: usize) -> usize {
    // Values are multiples of 1/4: exact in integers.
    let integer = |x: f32| (4.0 * x) as i64;
    let mut order: Vec<(i64, usize)> = (0..train.rows())
        .map(|row| {
            let own = &train.images[row * train.row..][..train.row];
            let square = |(a, b): (&f32, &f32)| (integer(*a) - integer(*b)).pow(2);
            (own.iter().zip(image).map(square).sum(), row)
        })
        .collect();
    order.sort_unstable();
    let voters: Vec<usize> = order[..k]
        .iter()
        .map(|(_, row)| train.labels[*row].into())
        .collect();
    let votes = |class: usize| voters.iter().filter(|voter| **voter == class).count();
    let most = voters.iter().map(|class| votes(*class)).max().unwrap_or(0);
    // The first voter, hence the nearest, of a class with the most votes.
    voters
        .iter()
        .copied()
        .find(|class| votes(*class) == most)
        .expect("k is at least 1")
}

fn spec(train: &Synthetic, k: usize, queries: Queries, test_rows: usize) -> NeighbourSpec {
    NeighbourSpec {
        dataset: dataset(train.rows(), test_rows),
        input: [1, 1, train.row],
        classes: train.classes,
        k,
        frac_bits: 12,
        ring_bits: 64,
        queries,
    }
}

fn job(spec: NeighbourSpec) -> Schedule {
    schedule::schedule(&JobKind::Neighbours(spec)).expect("valid")
}

/// Classes of six images, plain, against the definition; secure too where `secure` says so.
fn classify(train_rows: usize, k: usize, classes: usize, secure: bool) {
    let seed = seed();
    let (train, new) = (
        rows(train_rows, 6, classes, seed),
        rows(6, 6, classes, seed + 1),
    );
    let mut tables = Tables::new();
    train.tables("train", 12, &mut tables);
    new.tables("upload", 12, &mut tables);
    let queries = Queries::Upload {
        rows: 6,
        upload: "u".into(),
    };
    let schedule = job(spec(&train, k, queries, 0));
    let run = match secure {
        true => assert_secure_equals_plain(&schedule, &tables, None, seed),
        false => plain(&schedule, &tables, None, seed),
    };
    let found = outcome::classes(&run.outputs[1..], 6).expect("classes");
    let expected: Vec<usize> = new
        .images
        .chunks(6)
        .map(|image| by_definition(&train, image, k))
        .collect();
    assert_eq!(
        found, expected,
        "{train_rows} rows, k = {k}, {classes} classes"
    );
}

#[test]
fn the_nearest_rows_vote_as_the_definition_says_with_ties_of_distances_and_of_votes() {
    for (train_rows, k, classes) in [
        (1, 1, 2),
        (2, 2, 2),
        (16, 1, 3),
        (16, 5, 3),
        (17, 5, 10),
        (31, 7, 4),
        (33, 8, 4),
        (70, 15, 5),
        (300, 5, 10),
        (1000, 4, 3),
    ] {
        classify(train_rows, k, classes, false);
    }
}

#[test]
fn a_secure_run_equals_the_plain_one_on_one_and_on_several_levels() {
    for (train_rows, k, classes) in [(1, 1, 2), (9, 3, 2), (17, 5, 10), (60, 3, 3), (40, 9, 3)] {
        classify(train_rows, k, classes, true);
    }
}

#[test]
fn the_test_split_gives_a_confusion_matrix_and_nothing_else() {
    let seed = seed();
    let (train, test) = (rows(40, 6, 3, seed), rows(7, 6, 3, seed + 1));
    let mut tables = Tables::new();
    train.tables("train", 12, &mut tables);
    test.tables("test", 12, &mut tables);
    let schedule = job(spec(&train, 3, Queries::Test, 7));
    let run = assert_secure_equals_plain(&schedule, &tables, None, seed);
    let revealed: usize = run.outputs.iter().map(|step| step.len()).sum();
    assert_eq!(revealed, 1);
    let counted = outcome::confusion(run.outputs.last().expect("steps")).expect("revealed");
    let mut expected = ndarray::Array2::<u64>::zeros((3, 3));
    for (image, label) in test.images.chunks(6).zip(&test.labels) {
        expected[[usize::from(*label), by_definition(&train, image, 3)]] += 1;
    }
    assert_eq!(counted, expected);
}

#[test]
fn what_cannot_be_is_refused_by_name() {
    let train = rows(10, 6, 3, 1);
    let good = spec(&train, 3, Queries::Test, 7);
    good.check().expect("valid");
    let with = |change: &dyn Fn(&mut NeighbourSpec)| {
        let mut spec = good.clone();
        change(&mut spec);
        spec.check().expect_err("out of range").to_string()
    };
    for (error, field) in [
        (with(&|spec| spec.k = 0), "k"),
        (with(&|spec| spec.k = 11), "k"),
        (with(&|spec| spec.classes = 1), "classes"),
        (with(&|spec| spec.dataset.test_rows = 0), "rows"),
        (with(&|spec| spec.input = [3, 4096, 4096]), "input"),
        (with(&|spec| spec.input = [usize::MAX, 2, 2]), "input"),
        (with(&|spec| spec.input = [1, 2048, 2048]), "train_rows"),
        (
            with(&|spec| (spec.ring_bits, spec.frac_bits, spec.input) = (48, 16, [1, 8, 8])),
            "frac_bits",
        ),
        (
            with(&|spec| (spec.input, spec.frac_bits) = ([1, 512, 512], 24)),
            "frac_bits",
        ),
    ] {
        assert!(error.contains(field), "{error:?} lacks {field}");
    }
}
