//! Helpers of the end-to-end tests: the tool as a process, synthetic experiments.

use std::path::{Path, PathBuf};
use std::process::{Command, Output};

use tempfile::TempDir;
use trefoil_client::data::Dataset;

/// The `trefoil` tool.
pub fn trefoil() -> Command {
    Command::new(env!("CARGO_BIN_EXE_trefoil-under-test"))
}

/// Runs the tool; whether it succeeded, stdout and stderr.
pub fn run(command: &mut Command) -> (bool, String, String) {
    let (code, stdout, stderr) = output(command);
    (code == Some(0), stdout, stderr)
}

/// Runs the tool; its exit code (none where a signal ended it), stdout and stderr.
pub fn output(command: &mut Command) -> (Option<i32>, String, String) {
    let Output {
        status,
        stdout,
        stderr,
    } = command.output().expect("the tool starts");
    let text = |bytes: Vec<u8>| String::from_utf8_lossy(&bytes).into_owned();
    (status.code(), text(stdout), text(stderr))
}

/// A folder of two classes of grey 28x28 pictures that differ in where they are bright, split into
/// train and test.
pub fn pictures(folder: &Path, train: usize, test: usize) -> PathBuf {
    let root = folder.join("pictures");
    for (split, count) in [("train", train), ("test", test)] {
        for (class, bright_left) in [("left", true), ("right", false)] {
            let place = root.join(split).join(class);
            std::fs::create_dir_all(&place).expect("a temporary folder");
            for i in 0..count / 2 {
                let pixel = |x: u32, y: u32| {
                    if (x, y) == (0, 0) {
                        // No picture is there twice, not even in another split.
                        let number = i + if split == "test" { train / 2 } else { 0 };
                        return image::Luma([number as u8]);
                    }
                    let noise = (x * 31 + y * 17 + i as u32 * 101) % 97;
                    let bright = (x < 14) == bright_left;
                    image::Luma([(noise + if bright { 120 } else { 0 }) as u8])
                };
                let picture = image::GrayImage::from_fn(28, 28, pixel);
                picture
                    .save(place.join(format!("{i:04}.png")))
                    .expect("a picture is written");
            }
        }
    }
    root
}

/// Writes an experiment file.
pub fn experiment(folder: &TempDir, name: &str, text: &str) -> PathBuf {
    let path = folder.path().join(name);
    std::fs::write(&path, text).expect("an experiment is written");
    path
}

/// The class of each image by the k nearest rows, counted directly on the pixels: by distance, then by
/// row; most votes, then the nearest voter.
pub fn nearest_rows(train: &Dataset, images: &Dataset, k: usize) -> Vec<u8> {
    let class = |image: ndarray::ArrayView3<'_, u8>| {
        let distance = |row: ndarray::ArrayView3<'_, u8>| -> i64 {
            let pairs = row.iter().zip(image.iter());
            pairs
                .map(|(a, b)| (i64::from(*a) - i64::from(*b)).pow(2))
                .sum()
        };
        let rows = train.images.outer_iter().map(distance).zip(&train.labels);
        let mut rows: Vec<(i64, &u8)> = rows.collect();
        rows.sort_by_key(|(distance, _)| *distance);
        let mut votes = [0; 256];
        for (_, label) in &rows[..k] {
            votes[usize::from(**label)] += 1;
        }
        let most = votes.iter().max().expect("there are classes");
        let won = |(_, label): &&(i64, &u8)| votes[usize::from(**label)] == *most;
        *rows[..k].iter().find(won).expect("somebody has most").1
    };
    images.images.outer_iter().map(class).collect()
}
