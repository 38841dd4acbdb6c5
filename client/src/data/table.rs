//! A folder of pictures with a table `labels.csv`: `file,label[,group][,split]`.
//!
//! * `file` is a path inside the folder; `label` a class's name.
//! * `group` (a patient) keeps all its pictures on one side of a split. It is
//!   used here and forgotten: it never leaves the hospital.
//! * `split` is `train`, `val` (or `validation`) or `test`. Without that column
//!   the seed divides the groups 80 / 10 / 10.
//!
//! All problems are collected and reported at once, by line: nothing is read
//! further, let alone sent, before the table is right.

use std::collections::HashMap;
use std::fs::File;
use std::path::{Component, Path};

use super::folder::check_classes;
use super::picture::check_ending;
use super::pictures::{Entry, Problems};
use super::split::{Part, split_80_10_10};
use super::{DataError, Want, limits};

/// The table's name in the folder.
pub const FILE_NAME: &str = "labels.csv";

const COLUMNS: [&str; 4] = ["file", "label", "group", "split"];

struct Line {
    number: u64,
    file: String,
    label: String,
    group: Option<String>,
    split: Option<Part>,
}

/// Reads the table; returns the classes' names and the pictures, which are not read yet, and adds
/// what is wrong to `problems`. Without a split column all are of the part `undivided`, or the seed
/// divides them.
pub(super) fn list(
    folder: &Path,
    table: &Path,
    want: &Want,
    undivided: Option<Part>,
    problems: &mut Problems,
) -> Result<(Vec<String>, Vec<Entry>), DataError> {
    let lines = read(table, problems)?;
    let place = table.display().to_string();
    if lines.is_empty() && problems.is_empty() {
        return Err(DataError::field(
            &place,
            "lines",
            "at least 1 below the heading",
            0,
        ));
    }
    let class_names = if want.class_names.is_empty() {
        let mut found: Vec<String> = lines.iter().map(|line| line.label.clone()).collect();
        found.sort_unstable();
        found.dedup();
        found
    } else {
        want.class_names.clone()
    };
    let class_of: HashMap<&str, usize> = class_names
        .iter()
        .enumerate()
        .map(|(class, name)| (name.as_str(), class))
        .collect();
    let parts = divide(&lines, want.seed, undivided, problems);
    let mut entries = Vec::with_capacity(lines.len());
    for (line, part) in lines.iter().zip(parts) {
        let path = folder.join(&line.file);
        if let Err(problem) = check_place(&path, line) {
            problems.add(line.number, problem);
            continue;
        }
        match class_of
            .get(line.label.as_str())
            .map(|class| u8::try_from(*class))
        {
            Some(Ok(class)) => entries.push(Entry {
                path,
                class,
                part,
                line: line.number,
            }),
            // More than 256 classes are refused below.
            Some(Err(_)) => {}
            None => problems.add(
                line.number,
                format!(
                    "unknown label {:?}; expected one of {}",
                    line.label,
                    class_names.join(", ")
                ),
            ),
        }
    }
    match check_classes(&place, class_names, want) {
        Ok(names) => Ok((names, entries)),
        Err(error) => {
            problems.clone().check(&place)?;
            Err(error)
        }
    }
}

/// Checks that the file may be a picture of this folder.
fn check_place(path: &Path, line: &Line) -> Result<(), String> {
    let inside = Path::new(&line.file)
        .components()
        .all(|part| matches!(part, Component::Normal(_)));
    if !inside || line.file.is_empty() {
        return Err(format!("{:?} is no path inside the folder", line.file));
    }
    match check_ending(path) {
        Err(_) if path.extension().is_some() || path.exists() => {
            Err(format!("{:?} has no picture's ending", line.file))
        }
        // A missing one is found when all are read.
        _ => Ok(()),
    }
}

/// The part of each line.
fn divide(
    lines: &[Line],
    seed: u64,
    undivided: Option<Part>,
    problems: &mut Problems,
) -> Vec<Part> {
    let mut numbers: HashMap<&str, usize> = HashMap::new();
    let mut sizes: Vec<usize> = Vec::new();
    let mut given: Vec<Option<Part>> = Vec::new();
    let mut groups = Vec::with_capacity(lines.len());
    for line in lines {
        let next = sizes.len();
        let group = match &line.group {
            Some(name) => *numbers.entry(name).or_insert(next),
            None => next,
        };
        if group == next {
            sizes.push(0);
            given.push(line.split);
        }
        sizes[group] += 1;
        if given[group] != line.split {
            let name = line.group.as_deref().unwrap_or_default();
            problems.add(
                line.number,
                format!("group {name:?} is on two sides of the split"),
            );
        }
        groups.push(group);
    }
    let drawn = split_80_10_10(&sizes, seed);
    groups
        .iter()
        .zip(lines)
        .map(|(&group, line)| line.split.or(undivided).unwrap_or(drawn[group]))
        .collect()
}

fn read(table: &Path, problems: &mut Problems) -> Result<Vec<Line>, DataError> {
    let place = table.display().to_string();
    let file = File::open(table).map_err(|error| DataError::read(table, &error))?;
    let mut reader = csv::ReaderBuilder::new()
        .trim(csv::Trim::All)
        .from_reader(file);
    let heading = reader
        .headers()
        .map_err(|error| DataError::corrupt(&place, error))?
        .clone();
    let column = |name: &str| heading.iter().position(|column| column == name);
    if let Some(other) = heading.iter().find(|column| !COLUMNS.contains(column)) {
        let expected = "file,label[,group][,split]";
        return Err(DataError::field(
            &place,
            "column",
            expected,
            format!("{other:?}"),
        ));
    }
    let (Some(file), Some(label)) = (column("file"), column("label")) else {
        let found = heading.iter().collect::<Vec<_>>().join(",");
        return Err(DataError::field(
            &place,
            "heading",
            "file,label[,group][,split]",
            found,
        ));
    };
    let (group, split) = (column("group"), column("split"));
    let mut lines = Vec::new();
    for record in reader.records() {
        let record = record.map_err(|error| DataError::corrupt(&place, error))?;
        if lines.len() == limits::MAX_ROWS {
            let most = format!("at most {}", limits::MAX_ROWS);
            return Err(DataError::field(&place, "lines", most, "more"));
        }
        let number = record.position().map_or(0, |position| position.line());
        // The reader refuses records of another length than the heading.
        let value = |column: usize| record.get(column).unwrap_or_default().to_owned();
        let part = match split.map(value).as_deref() {
            None => None,
            Some("train") => Some(Part::Train),
            Some("val" | "validation") => Some(Part::Validation),
            Some("test") => Some(Part::Test),
            Some(other) => {
                problems.add(
                    number,
                    format!("split {other:?}; expected train, val or test"),
                );
                continue;
            }
        };
        if value(label).is_empty() {
            problems.add(number, "no label");
            continue;
        }
        let group = group.map(value).filter(|group| !group.is_empty());
        lines.push(Line {
            number,
            file: value(file),
            label: value(label),
            group,
            split: part,
        });
    }
    Ok(lines)
}

#[cfg(test)]
mod tests {
    use std::io::Cursor;

    use image::{GrayImage, ImageFormat, Luma};

    use super::super::folder::load;
    use super::super::testing::Scratch;
    use super::*;

    fn png(shade: u8) -> Vec<u8> {
        let mut bytes = Cursor::new(Vec::new());
        GrayImage::from_pixel(3, 3, Luma([shade]))
            .write_to(&mut bytes, ImageFormat::Png)
            .unwrap();
        bytes.into_inner()
    }

    /// A folder with `count` different pictures p0.png, p1.png, ... and a table.
    fn folder(count: u8, table: &str) -> Scratch {
        let scratch = Scratch::new();
        for number in 0..count {
            scratch.write(&format!("p{number}.png"), &png(number));
        }
        scratch.write(FILE_NAME, table.as_bytes());
        scratch
    }

    fn want() -> Want {
        Want {
            shape: Some([1, 3, 3]),
            ..Want::default()
        }
    }

    fn fault(scratch: &Scratch, want: &Want) -> String {
        load(scratch.path(), want)
            .map(|_| ())
            .unwrap_err()
            .to_string()
    }

    #[test]
    fn a_table_with_its_own_split_is_kept() {
        let table = "file,label,split\np0.png,well,train\np1.png,ill,train\np2.png, ill ,val\np3.png,well,test\n";
        let splits = load(folder(4, table).path(), &want()).unwrap();
        assert_eq!(splits.train.class_names, ["ill", "well"]);
        assert_eq!(splits.train.labels, [1, 0]);
        assert_eq!(splits.validation.unwrap().labels, [0]);
        assert_eq!(splits.test.images[[0, 0, 1, 1]], 3);
    }

    #[test]
    fn a_patients_pictures_stay_on_one_side() {
        let mut table = "file,label,group\n".to_owned();
        for number in 0..100 {
            table += &format!("p{number}.png,{},patient {}\n", number % 2, number / 4);
        }
        let scratch = folder(100, &table);
        for seed in 0..3 {
            let splits = load(scratch.path(), &Want { seed, ..want() }).unwrap();
            let patients = |images: &ndarray::Array4<u8>| {
                images
                    .iter()
                    .step_by(9)
                    .map(|shade| shade / 4)
                    .collect::<std::collections::BTreeSet<_>>()
            };
            let (train, test) = (
                patients(&splits.train.images),
                patients(&splits.test.images),
            );
            let validation = patients(&splits.validation.as_ref().unwrap().images);
            assert!(train.is_disjoint(&test) && train.is_disjoint(&validation));
            assert!(test.is_disjoint(&validation));
            assert_eq!(splits.test.len(), 12); // three patients of four reach a tenth
            assert_eq!(train.len() + validation.len() + test.len(), 25);
        }
    }

    #[test]
    fn one_part_is_all_of_an_undivided_table_and_its_own_rows_of_a_divided_one() {
        let undivided = folder(4, "file,label\np0.png,a\np1.png,b\np2.png,a\np3.png,b\n");
        let part = |scratch: &Scratch, table: Option<&Path>, part| {
            super::super::folder::load_part(scratch.path(), table, &want(), part)
        };
        let all = part(&undivided, None, Part::Test).unwrap();
        assert_eq!(all.labels, [0, 1, 0, 1]);
        let elsewhere = Scratch::new();
        let divided = "file,label,split\np0.png,a,train\np1.png,b,train\np2.png,a,test\n";
        let table = elsewhere.write("other.csv", divided.as_bytes());
        let train = part(&undivided, Some(&table), Part::Train).unwrap();
        assert_eq!(train.labels, [0, 1]);
        let none = part(&undivided, Some(&table), Part::Validation);
        let said = none.map(|_| ()).unwrap_err().to_string();
        assert!(said.contains("validation pictures"), "{said}");
    }

    #[test]
    fn every_problem_is_reported_with_its_line() {
        let table = "file,label,group,split\n\
                     p0.png,a,x,train\n\
                     p1.png,zebra,,train\n\
                     absent.png,a,,train\n\
                     copy.png,b,,train\n\
                     ../p0.png,b,,train\n\
                     p2.png,b,,later\n\
                     p3.png,b,x,test\n\
                     notes.txt,b,,test\n";
        let scratch = folder(4, table);
        scratch.write("copy.png", &png(0));
        let want = Want {
            class_names: vec!["a".into(), "b".into()],
            ..want()
        };
        let said = fault(&scratch, &want);
        assert!(said.contains("labels.csv: 7 problem(s)"), "{said}");
        for part in [
            "line 3: unknown label \"zebra\"; expected one of a, b",
            "absent.png: missing picture",
            "copy.png is the same picture as line 2: ",
            "line 6: \"../p0.png\" is no path inside the folder",
            "line 7: split \"later\"",
            "line 8: group \"x\" is on two sides",
            "line 9: \"notes.txt\" has no picture's ending",
        ] {
            assert!(said.contains(part), "{part} is not in: {said}");
        }
    }

    #[test]
    fn a_heading_or_line_of_the_wrong_form_is_named() {
        assert!(fault(&folder(1, "file,diagnosis\np0.png,a\n"), &want()).contains("\"diagnosis\""));
        assert!(fault(&folder(1, "label,split\na,train\n"), &want()).contains("heading"));
        assert!(fault(&folder(1, "file,label\np0.png\n"), &want()).contains("labels.csv: corrupt"));
        assert!(fault(&folder(1, "file,label\n"), &want()).contains("at least 1"));
        assert!(fault(&folder(1, "file,label\np0.png,a\n"), &want()).contains("2 to 256"));
    }

    #[test]
    fn a_long_list_of_problems_is_cut_but_counted() {
        let mut table = "file,label\n".to_owned();
        (0..50).for_each(|number| table += &format!("q{number}.png,{}\n", number % 2));
        let said = fault(&folder(0, &table), &want());
        assert!(
            said.contains("50 problem(s)") && said.lines().count() == 21,
            "{said}"
        );
    }
}
