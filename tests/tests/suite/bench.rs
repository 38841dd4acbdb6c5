//! `trefoil bench` with real processes.

use serde_json::Value;
use tempfile::TempDir;

use crate::common::{run, trefoil};

#[test]
fn bench_measures_a_job_a_hospital_and_the_dealer_and_writes_every_key() {
    let folder = TempDir::new().expect("a temporary folder");
    let json = folder.path().join("bench.json");
    let mut command = trefoil();
    command.args(["bench", "--repetitions", "5", "--json"]);
    command.arg(&json);
    let names = [
        "truncate-1m",
        "chameleon-infer-1",
        "share-5000",
        "dealer-only",
    ];
    names.iter().for_each(|name| {
        command.args(["--case", name]);
    });
    let (ok, stdout, stderr) = run(&mut command);
    assert!(ok, "{stdout}\n{stderr}");
    let report = std::fs::read(&json).expect("the report is written");
    let report: Value = serde_json::from_slice(&report).expect("JSON");
    assert!(report["machine"]["cores"].as_u64().is_some_and(|n| n > 0));
    let cases = report["cases"].as_array().expect("cases");
    assert_eq!(cases.len(), names.len());
    for (row, name) in cases.iter().zip(names) {
        assert_eq!(row["case"], name);
        let number = |key: &str| row[key].as_f64().unwrap_or_else(|| panic!("{key}: {row}"));
        assert!(number("seconds_min") > 0.0, "{row}");
        assert!(number("seconds_min") <= number("seconds"), "{row}");
        assert!(number("seconds") <= number("seconds_max"), "{row}");
        assert!(number("floor_seconds") > 0.0 && number("cpu_seconds") > 0.0);
        let ratio = number("seconds") / number("floor_seconds");
        assert!(
            (number("floor_ratio") - ratio).abs() < 1e-6 * ratio,
            "{row}"
        );
        assert!(number("peak_rss_bytes") > 1e6, "{row}");
        let job = !["share-5000", "dealer-only"].contains(&name);
        assert_eq!(number("rounds") > 0.0, job, "{row}");
        assert_eq!(number("bytes_sent_per_party") > 0.0, name != "dealer-only");
        assert_eq!(number("dealer_bytes") > 0.0, name != "share-5000");
    }
}

#[test]
fn bench_lists_its_cases_and_names_an_unknown_one() {
    let (ok, stdout, _) = run(trefoil().args(["bench", "--list"]));
    assert!(
        ok && stdout.lines().any(|line| line == "lenet-train-128"),
        "{stdout}"
    );
    let (ok, _, stderr) = run(trefoil().args(["bench", "--case", "relu"]));
    assert!(!ok && stderr.contains("relu-1m"), "{stderr}");
    let (ok, _, stderr) = run(trefoil().args(["bench", "--repetitions", "2"]));
    assert!(!ok && stderr.contains("repetitions"), "{stderr}");
}
