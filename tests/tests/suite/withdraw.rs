//! A hospital takes its rows back: they are gone from all three stores, jobs that read them end with
//! its name, a party that was away is caught up with; quotas; what hospitals' rows have to agree in.

use std::path::Path;
use std::process::{Command, Stdio};

use crate::common::{output, pictures};
use crate::deployment::{Deployment, PARTIES, eventually, files};
use crate::world::{refused, succeeds};

const PREPROCESS: [&str; 2] = ["--preprocess", "mean=0.1307,std=0.3081"];

/// Shares some of the digits.
fn share(deployment: &Deployment, who: &str, rows: &str) -> Command {
    let args = ["share", "--dataset", "digits", "--images", "digits"];
    let mut command = deployment.world.member(who, &args);
    command
        .args(["--part", "train", "--rows", rows])
        .args(PREPROCESS);
    command
}

fn withdraw(deployment: &Deployment, who: &str, more: &[&str]) -> Command {
    let args = ["withdraw", "--dataset", "digits"];
    let mut command = deployment.world.member(who, &args);
    command.args(more);
    command
}

/// Shows the data set to the analyst.
fn held(deployment: &Deployment) -> String {
    succeeds(&mut deployment.world.member("office", &["dataset", "digits"]))
}

/// Chunks that a party has, staged and committed.
fn chunks(deployment: &Deployment, who: &str) -> usize {
    let of = |kind: &str| files(&deployment.store(who).join(kind));
    let all = of("staging").into_iter().chain(of("datasets"));
    let name = |path: &Path| {
        path.file_name()
            .map(|name| name.to_string_lossy().into_owned())
    };
    all.filter(|path| name(path).is_some_and(|name| name.starts_with("chunk-")))
        .count()
}

fn train(deployment: &Deployment, save_as: &str, more: &[&str]) -> Command {
    let network = deployment.world.root.path().join("linear.toml");
    let text =
        "name = \"linear\"\ninput = [1, 28, 28]\nclasses = 10\n[[layer]]\nkind = \"dense\"\n";
    std::fs::write(&network, text).expect("a network is written");
    let args = ["train", "--dataset", "digits", "--save-as", save_as];
    let mut command = deployment.world.member("office", &args);
    command.args(["--batch", "8", "--learning-rate", "0.125"]);
    command.arg("--network").arg(network).args(more);
    command
}

#[test]
fn a_hospital_takes_back_its_rows_and_nobody_elses_everywhere() {
    let mut deployment = Deployment::start();
    succeeds(&mut share(&deployment, "anna", "0..200"));
    succeeds(&mut share(&deployment, "anna", "200..300"));
    succeeds(&mut share(&deployment, "berta", "300..500"));
    let before = held(&deployment);
    for part in [
        "training rows 500",
        "st-anna       upload 1, 200 training rows",
        "st-anna       upload 2, 100 training rows",
        "berta         upload 1, 200 training rows",
    ] {
        assert!(before.contains(part), "{part:?} is not in {before}");
    }
    let listed = succeeds(&mut deployment.world.operator("west", &["store"]));
    assert!(
        listed.contains("digits,st-anna,2,training,100,0.6"),
        "{listed}"
    );

    // Only hospitals have rows, and only those that they have.
    let office = deployment
        .world
        .member("office", &["withdraw", "--dataset", "digits"]);
    refused(&mut { office }, &["is an analyst"]);
    refused(
        &mut withdraw(&deployment, "anna", &["--upload", "3"]),
        &["no upload 3", "number 3"],
    );
    refused(
        deployment
            .world
            .member("anna", &["withdraw", "--dataset", "nothing"])
            .stdout(Stdio::piped()),
        &["has shared nothing"],
    );
    assert_eq!(held(&deployment), before);

    let said = succeeds(&mut withdraw(&deployment, "anna", &["--upload", "1"]));
    assert!(
        said.contains("withdrew upload 1 of st-anna") && said.contains("left: uploads 2"),
        "{said}"
    );
    assert_eq!(
        succeeds(&mut withdraw(&deployment, "anna", &["--upload", "1"])),
        said
    );
    let after = held(&deployment);
    assert!(after.contains("training rows 300"), "{after}");
    assert!(!after.contains("st-anna       upload 1,"), "{after}");
    assert_eq!(PARTIES.map(|who| chunks(&deployment, who)), [2; 3]);

    // One party is away: the others delete, and the same command catches up.
    deployment.kill("east");
    refused(
        &mut withdraw(&deployment, "anna", &[]),
        &[
            "not complete: P0 and P1 deleted its shares",
            "P2: ",
            "run the same command again",
        ],
    );
    assert_eq!(PARTIES.map(|who| chunks(&deployment, who)), [1, 1, 2]);
    deployment.start_node("party", "east");
    refused(
        &mut deployment.world.member("office", &["dataset", "digits"]),
        &[
            "disagree",
            "upload 2 of st-anna is at P2 only",
            "trefoil withdraw",
        ],
    );
    succeeds(&mut withdraw(&deployment, "anna", &[]));
    assert_eq!(PARTIES.map(|who| chunks(&deployment, who)), [1; 3]);
    let after = held(&deployment);
    assert!(
        after.contains("training rows 200") && !after.contains("st-anna"),
        "{after}"
    );

    // The rows may come again, under a number that was never used.
    let again = succeeds(&mut share(&deployment, "anna", "0..200"));
    assert!(again.contains("upload 3 of st-anna"), "{again}");
    for who in PARTIES {
        let audit = deployment.world.operator(who, &["audit", "verify"]);
        assert!(succeeds(&mut { audit }).contains("the chain holds"));
        let log = std::fs::read_to_string(deployment.store(who).join("audit.log"));
        let noted = log.expect("a log").matches("rows_withdrawn").count();
        assert_eq!(noted, 2, "{who}: one entry for each withdrawal");
    }
}

#[test]
fn jobs_that_read_withdrawn_rows_end_with_the_hospitals_name() {
    let deployment = Deployment::start();
    succeeds(&mut share(&deployment, "anna", "0..400"));
    succeeds(&mut share(&deployment, "berta", "400..800"));
    let submit = |name: &str| {
        let id = succeeds(&mut train(
            &deployment,
            name,
            &["--epochs", "200", "--detach"],
        ));
        id.trim().to_owned()
    };
    let (running, waiting) = (submit("first"), submit("second"));
    let jobs = |state: &str, id: &str| {
        let listed = succeeds(&mut deployment.world.operator("north", &["jobs"]));
        let mut lines = listed.lines();
        lines.any(|line| line.contains(&id[..8]) && line.contains(state))
    };
    eventually("the first job's start", || jobs("running", &running));
    assert!(jobs("waiting", &waiting));
    // What came in later is not what the jobs read, and does not hide what they do.
    succeeds(&mut share(&deployment, "berta", "800..900"));
    succeeds(&mut withdraw(&deployment, "anna", &["--upload", "1"]));
    let reason = "st-anna withdrew upload 1 of data set digits";
    let mut watch = deployment
        .world
        .member("office", &["watch", &running[..16]]);
    refused(&mut watch, &[reason]);
    // The second one was described before Berta's last rows came: it ends without their help.
    let mut watch = deployment
        .world
        .member("office", &["watch", &waiting[..16]]);
    refused(&mut watch, &["data set digits has 500 training"]);

    // A job that waits and could still run is ended by name.
    let one = submit("third");
    let held = submit("fourth");
    eventually("the third job's start", || jobs("running", &one));
    succeeds(&mut withdraw(&deployment, "berta", &["--upload", "2"]));
    let reason = "berta withdrew upload 2 of data set digits";
    for id in [&one, &held] {
        refused(
            &mut deployment.world.member("office", &["watch", &id[..16]]),
            &[reason],
        );
    }
    // The parties are ready for the next one.
    let done = succeeds(&mut train(&deployment, "fifth", &["--epochs", "1"]));
    assert!(done.contains("kept as shares"), "{done}");
}

#[test]
fn an_upload_beyond_the_quota_is_refused_before_its_first_chunk() {
    let deployment = Deployment::start_with("[store]", "[store]\nquota_mb_per_hospital = 2");
    // 200 rows of 794 words are 1.3 megabytes.
    succeeds(&mut share(&deployment, "anna", "0..200"));
    refused(
        &mut share(&deployment, "anna", "200..400"),
        &[
            "P0 refused",
            "takes 2 MB",
            "quota of 2 MB",
            "2 MB are used",
            "0 MB free",
        ],
    );
    assert_eq!(PARTIES.map(|who| chunks(&deployment, who)), [1; 3]);
    succeeds(&mut share(&deployment, "berta", "200..400"));
    succeeds(&mut withdraw(&deployment, "anna", &["--upload", "1"]));
    succeeds(&mut share(&deployment, "anna", "200..400"));
}

#[test]
fn hospitals_rows_join_where_they_are_alike_and_what_differs_is_said() {
    let deployment = Deployment::start();
    succeeds(&mut share(&deployment, "anna", "0..100"));
    let folder = pictures(&deployment.world.dir("berta"), 4, 4);
    let mut command = deployment
        .world
        .member("berta", &["share", "--dataset", "digits"]);
    command
        .args(["--network", "xray", "--images"])
        .arg(&folder)
        .args(PREPROCESS);
    refused(
        &mut command,
        &[
            "holds images of shape 1 x 28 x 28 and 10 classes",
            "has 1 x 28 x 28 and 2",
        ],
    );
    succeeds(&mut share(&deployment, "berta", "100..200"));
    assert!(held(&deployment).contains("training rows 200"));
}

#[test]
fn an_upload_that_was_not_finished_is_taken_back_too() {
    let deployment = Deployment::start();
    let mut killed = share(&deployment, "anna", "0..8000");
    let quiet = killed.stdout(Stdio::null()).stderr(Stdio::null());
    let mut killed = quiet.spawn().expect("the tool starts");
    eventually("two staged chunks", || chunks(&deployment, "east") >= 2);
    killed.kill().expect("it runs");
    killed.wait().expect("it ends");
    succeeds(&mut withdraw(&deployment, "anna", &[]));
    for who in PARTIES {
        assert_eq!(
            files(&deployment.store(who).join("staging")),
            Vec::<std::path::PathBuf>::new()
        );
    }
    let again = succeeds(&mut share(&deployment, "anna", "0..100"));
    assert!(again.contains("upload 2 of st-anna"), "{again}");
    let (code, ..) = output(&mut share(&deployment, "anna", "0..100"));
    assert_eq!(code, Some(1), "they are shared already");
}

/// A party whose store is a file system of its own, of a few megabytes; needs user namespaces.
fn cramped(deployment: &mut Deployment, who: &'static str) -> Option<std::path::PathBuf> {
    let usable = Command::new("unshare")
        .args(["--user", "--map-root-user", "--mount", "true"])
        .stderr(Stdio::null())
        .status();
    if !usable.is_ok_and(|status| status.success()) {
        eprintln!("skipped: this machine has no user namespaces for a small file system");
        return None;
    }
    deployment.kill(who);
    let store = deployment.store(who);
    let inside = deployment.start_in(who, &store, "3m");
    Some(inside.join(store.strip_prefix("/").expect("an absolute path")))
}

#[test]
fn a_full_disk_stops_an_upload_and_keeps_nothing_half() {
    let mut deployment = Deployment::start();
    let Some(store) = cramped(&mut deployment, "west") else {
        return;
    };
    // 400 rows of 794 words are 2.5 megabytes; further 200 do not fit.
    succeeds(&mut share(&deployment, "anna", "0..400"));
    refused(
        &mut share(&deployment, "berta", "400..600"),
        &[
            "P1 (west-university): its disk is full",
            "the same command goes on",
        ],
    );
    let left: Vec<_> = files(&store)
        .into_iter()
        .filter(|path| path.extension().is_some_and(|ending| ending == "tmp"))
        .collect();
    assert_eq!(left, Vec::<std::path::PathBuf>::new());
    succeeds(&mut withdraw(&deployment, "anna", &[]));
    let resumed = succeeds(&mut share(&deployment, "berta", "400..600"));
    assert!(resumed.contains("upload 1 of berta"), "{resumed}");
    assert!(held(&deployment).contains("training rows 200"));
}
