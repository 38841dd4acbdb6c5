//! What a job's hash covers, and what its words say.

use trefoil_models::job::TrainSpec;

use super::*;

fn train() -> JobDescription {
    let kind = JobKind::Train {
        network: "name = \"mlp\"".into(),
        spec: TrainSpec::default(),
        dataset: DatasetRef {
            name: "digits".into(),
            train_rows: 10,
            test_rows: 2,
            snapshot: [7; 32],
        },
        evaluate_each_epoch: true,
        save_as: "digits-mlp".into(),
        reveal_weights: true,
    };
    JobDescription::new("first", Pin::from_bytes([1; 32]), kind).unwrap()
}

#[test]
fn the_hash_changes_with_what_is_revealed_and_the_words_say_it() {
    let job = train();
    job.check().unwrap();
    let mut other = job.clone();
    if let JobKind::Train { reveal_weights, .. } = &mut other.kind {
        *reveal_weights = false;
    }
    assert_ne!(job.id(), other.id());
    let words = job.describe("st-anna");
    assert!(
        words.contains("to st-anna: THE TRAINED WEIGHTS") && words.contains("network mlp"),
        "{words}"
    );
    assert!(!other.describe("st-anna").contains("WEIGHTS"));
    let read: JobDescription = postcard::from_bytes(&job.to_bytes()).unwrap();
    assert_eq!(read, job);
}

fn words(job: &JobDescription) -> String {
    job.check().unwrap();
    job.describe("st-anna")
}

#[test]
fn a_start_and_an_early_stop_are_said_and_a_start_names_its_version() {
    let mut job = train();
    let plain = words(&job);
    assert!(
        !plain.contains("starts") && !plain.contains("dealer"),
        "{plain}"
    );
    if let JobKind::Train { spec, .. } = &mut job.kind {
        spec.start_from = Some("base@0123456789abcdef".into());
        spec.early_stop = Some(trefoil_models::EarlyStop {
            patience: 2,
            min_delta: 0.001,
            validation_rows: 400,
        });
    }
    let said = words(&job);
    for part in [
        "from the kept weights of model base@0123456789abcdef",
        "REVEALS    to the three parties and st-anna: how many of 400 validation rows are right",
        "reveals    to the dealer: after which epoch training stops",
        "early stop after 2 epochs",
    ] {
        assert!(said.contains(part), "{part:?} is not in:\n{said}");
    }
    for wrong in [
        "base",
        "base@",
        "base@0123",
        "base@0123456z",
        "../b@01234567",
    ] {
        if let JobKind::Train { spec, .. } = &mut job.kind {
            spec.start_from = Some(wrong.into());
        }
        assert!(job.check().is_err(), "{wrong}");
    }
}

#[test]
fn what_an_evaluation_reveals_beside_its_matrix_is_said() {
    let mut job = train();
    let JobKind::Train { dataset, .. } = job.kind.clone() else {
        unreachable!()
    };
    let kind = |calibration, by_hospital| JobKind::Evaluate {
        model: "m@01234567".into(),
        network: String::new(),
        frac_bits: 16,
        ring_bits: 64,
        dataset: dataset.clone(),
        auc: false,
        calibration,
        by_hospital,
    };
    job.kind = kind(false, Vec::new());
    let plain = words(&job);
    assert!(
        !plain.contains("bins") && !plain.contains("HOSPITAL"),
        "{plain}"
    );
    let anna = trefoil_models::HospitalRows {
        hospital: [0xab; 32],
        rows: 2,
    };
    job.kind = kind(true, vec![anna]);
    let said = words(&job);
    assert!(
        said.contains("in ten bins of the predicted class"),
        "{said}"
    );
    let part = "A CONFUSION MATRIX OF EACH HOSPITAL'S ROWS, by the first digits of their public keys: abababababababab (2 rows)";
    assert!(said.contains(part), "{said}");
}

#[test]
fn what_nearest_rows_tell_is_said_and_to_whom() {
    let mut job = train();
    let JobKind::Train { dataset, .. } = job.kind.clone() else {
        unreachable!()
    };
    let kind = |k, queries| {
        JobKind::Neighbours(NeighbourSpec {
            dataset: dataset.clone(),
            input: [1, 2, 2],
            classes: 3,
            k,
            frac_bits: 13,
            ring_bits: 64,
            queries,
        })
    };
    let images = |upload: &str| Queries::Upload {
        rows: 4,
        upload: upload.into(),
    };
    let near = "training rows of data set digits (10 training rows, 2 test rows, snapshot 0707070707070707)";
    let lines = |job: &JobDescription| -> Vec<String> {
        let said = words(job);
        let lines = said.lines().map(str::trim).map(str::to_owned);
        lines
            .filter(|line| {
                ["computes", "reads", "reveals"]
                    .iter()
                    .any(|l| line.starts_with(l))
            })
            .collect()
    };
    job.kind = kind(3, images("new"));
    let three = job.id();
    assert_eq!(
            lines(&job),
            [
                format!("computes   of 4 images the class of each by its 3 nearest {near}"),
                "reads      upload new, which only st-anna may use".into(),
                "reveals    to st-anna: the class of each image, nothing else; it follows from the labels of 3 training rows".into(),
            ]
        );
    // Of one neighbour it is more than a vote.
    job.kind = kind(1, images("new"));
    assert_ne!(job.id(), three);
    assert_eq!(
        lines(&job)[2],
        "reveals    to st-anna: the class of each image, nothing else; it is the label of one training row"
    );
    job.kind = kind(3, Queries::Test);
    assert_eq!(
        lines(&job),
        [
            format!("computes   of the test rows the class of each by its 3 nearest {near}"),
            "reveals    to st-anna: the confusion matrix on the test split".into(),
        ]
    );
    job.kind = kind(3, images("../keys"));
    assert!(job.check().unwrap_err().to_string().contains("upload"));
}

#[test]
fn a_name_that_leaves_its_folder_is_refused() {
    let mut job = train();
    if let JobKind::Train { save_as, .. } = &mut job.kind {
        *save_as = "../keys".into();
    }
    assert!(job.check().unwrap_err().to_string().contains("save_as"));
    job.version = JOB_VERSION + 1;
    let found = job.version;
    assert_eq!(job.check(), Err(JobError::Version { found }));
}
