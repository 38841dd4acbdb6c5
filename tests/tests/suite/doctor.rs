//! `trefoil doctor` and `trefoil status` among separate processes: a deployment that is well, and
//! one fault after the other, each with what to do.

use std::net::UdpSocket;
use std::path::Path;
use std::time::{Duration, Instant};

use trefoil_consortium::{MemberConfig, PartyConfig};

use crate::common::{output, trefoil};
use crate::members::Study;
use crate::world::{await_line, succeeds};

/// Longer than this nobody waits for an examination.
const PATIENCE: Duration = Duration::from_secs(30);

/// Exit code and lines of an examination.
fn doctor(study: &Study, who: &str) -> (Option<i32>, String) {
    let start = Instant::now();
    let mut command = trefoil();
    command.args(["doctor", "--home"]).arg(study.world.dir(who));
    let (code, lines, _) = output(&mut command);
    assert!(start.elapsed() < PATIENCE, "{:?}", start.elapsed());
    (code, lines)
}

/// Fails in one check, whose line says all of `parts`.
fn ails(study: &Study, who: &str, check: &str, parts: &[&str]) {
    let (code, lines) = doctor(study, who);
    assert_eq!(code, Some(1), "{lines}");
    let failed: Vec<&str> = lines.lines().filter(|l| l.starts_with("FAIL")).collect();
    let [line] = failed[..] else {
        panic!("one failure is expected:\n{lines}");
    };
    assert_eq!(line.split_whitespace().nth(1), Some(check), "{line}");
    for part in parts {
        assert!(line.contains(part), "{part:?} is not in {line}");
    }
}

fn edit(path: &Path, change: impl Fn(&str) -> String) {
    let text = std::fs::read_to_string(path).expect("a file");
    let changed = change(&text);
    assert_ne!(changed, text);
    std::fs::write(path, changed).expect("it is written");
}

#[test]
fn a_deployment_that_is_well_and_every_fault_of_one_that_is_not() {
    let mut study = Study::found(&[("anna", "St. Anna")]);
    study.start();
    for (_, log) in &study.nodes[..3] {
        await_line(log, "peer=dealer trefoil_consortium::mesh: linked");
    }
    await_line(
        &study.nodes[0].1,
        "peer=P1 trefoil_consortium::mesh: linked",
    );
    await_line(
        &study.nodes[0].1,
        "peer=P2 trefoil_consortium::mesh: linked",
    );
    await_line(
        &study.nodes[1].1,
        "peer=P2 trefoil_consortium::mesh: linked",
    );
    all_well(&study);
    files(&study);
    nodes(&mut study);
}

fn all_well(study: &Study) {
    for (who, about) in [
        (
            "north",
            &["P1", "P2", "dealer", "this home's node listens"][..],
        ),
        ("notary", &["P0", "P1", "P2", "this home's node listens"]),
        ("anna", &["P0", "P1", "P2", "hospital st-anna"]),
    ] {
        let (code, lines) = doctor(study, who);
        assert_eq!(code, Some(0), "{who}:\n{lines}");
        for part in about
            .iter()
            .chain(&["signed by all", "round trip", "GiB free"])
        {
            assert!(lines.contains(part), "{who}: {part:?} is not in:\n{lines}");
        }
        // A disk may be small, and nobody is named in the policy here.
        let small = |line: &&str| line.contains("disk") || line.contains("[policy]");
        let warnings = lines.lines().filter(|line| line.starts_with("warning"));
        let warnings: Vec<&str> = warnings.filter(|line| !small(line)).collect();
        assert!(warnings.is_empty(), "{who}: {warnings:?}");
    }
    let status = |who: &str, json: &[&str]| {
        let mut command = trefoil();
        command.args(["status", "--home"]).arg(study.world.dir(who));
        succeeds(command.args(json))
    };
    let shown = status("north", &[]);
    let heads = [
        "P0 north-clinic",
        "P1 west-university",
        "P2 east-ministry",
        "dealer notary",
    ];
    for part in heads
        .iter()
        .chain(&["link         P1", "0 running, 0 waiting"])
    {
        assert!(shown.contains(part), "{part:?} is not in:\n{shown}");
    }
    assert!(!shown.contains("NO LINK"), "{shown}");
    let shown = status("anna", &["--json"]);
    let nodes: serde_json::Value = serde_json::from_str(&shown).expect("JSON");
    assert_eq!(nodes.as_array().map(Vec::len), Some(3));
    for node in nodes.as_array().into_iter().flatten() {
        assert_eq!(node["status"]["info"]["members_number"], 1);
        assert!(node["status"]["last_error"].is_null(), "not for members");
    }
    // Looking with a node's key leaves that node's own links alone.
    for (_, log) in &study.nodes {
        let log = std::fs::read_to_string(log).expect("a log");
        assert!(!log.contains("link closed"), "{log}");
    }
}

/// What is wrong in a home.
fn files(study: &Study) {
    let home = study.world.dir("anna");
    #[cfg(unix)]
    {
        use std::os::unix::fs::PermissionsExt;
        let key = home.join("key.der");
        let mode = |mode| std::fs::Permissions::from_mode(mode);
        std::fs::set_permissions(&key, mode(0o644)).expect("it is ours");
        ails(study, "anna", "key", &["644", "chmod 600"]);
        std::fs::set_permissions(&key, mode(0o600)).expect("it is ours");
    }
    study.world.init("hospital", "other", "Other", &[]);
    let card = std::fs::read(home.join("card")).expect("a card");
    std::fs::copy(study.world.card("other"), home.join("card")).expect("it is copied");
    ails(study, "anna", "card", &["another key"]);
    std::fs::write(home.join("card"), card).expect("it is written");

    study.world.hand_out(&study.file, &["other"]);
    ails(study, "other", "role", &["send this home's card"]);

    let file = home.join("consortium.toml");
    edit(&file, |text| {
        text.replace("ring_bits = 64", "ring_bits = 48")
    });
    ails(
        study,
        "anna",
        "consortium",
        &["core", "changed after it was signed"],
    );
    study.create(
        "Others",
        &study.world.dir("others.toml"),
        &["north", "west", "east", "notary", "anna"],
    );
    std::fs::copy(study.world.dir("others.toml"), &file).expect("it is copied");
    let (code, lines) = doctor(study, "anna");
    assert_eq!(code, Some(1));
    assert_eq!(
        lines.matches("belongs to another consortium").count(),
        3,
        "{lines}"
    );
    study.world.hand_out(&study.file, &["anna"]);

    let config = study.world.dir("north").join("party.toml");
    let text = std::fs::read_to_string(&config).expect("a configuration");
    edit(&config, |text| text.replace("requesters =", "requestors ="));
    ails(
        study,
        "north",
        "configuration",
        &["requestors", "party.toml"],
    );
    std::fs::write(&config, text).expect("it is written");
    let (code, _) = doctor(study, "anna");
    assert_eq!(code, Some(0), "all is as it was");
}

/// What is wrong with other nodes and the port.
fn nodes(study: &mut Study) {
    let config = study.world.dir("anna").join("member.toml");
    let east = PartyConfig::load(&study.world.dir("east").join("party.toml")).expect("it is valid");
    let text = std::fs::read_to_string(&config).expect("a configuration");
    edit(&config, |text| {
        text.replace("[peers]", &format!("[peers]\np1 = \"{}\"", east.listen))
    });
    MemberConfig::load(&config).expect("it is valid");
    ails(study, "anna", "P1", &["wrong certificate", "by phone"]);
    edit(&config, |text| {
        text.replace(&east.listen.to_string(), "nowhere.invalid:7100")
    });
    ails(study, "anna", "P1", &["nowhere.invalid", "[peers]"]);
    std::fs::write(&config, text).expect("it is written");

    // West goes.
    drop(study.nodes.remove(1));
    ails(study, "anna", "P1", &["is the node running"]);
    ails(study, "north", "P1", &["is the node running"]);
    let (code, lines) = doctor(study, "west");
    assert_eq!(
        code,
        Some(0),
        "a node may be examined before it runs:\n{lines}"
    );
    assert!(lines.contains("does not run"), "{lines}");
    let (code, shown, said) = output(
        trefoil()
            .args(["status", "--home"])
            .arg(study.world.dir("anna")),
    );
    assert_eq!(code, Some(1));
    assert!(
        shown.contains("no answer") && said.contains("1 of 3 nodes"),
        "{shown}{said}"
    );

    let west = PartyConfig::load(&study.world.dir("west").join("party.toml")).expect("it is valid");
    let _other = UdpSocket::bind(west.listen).expect("the port is free");
    ails(study, "west", "port", &["another program"]);
}
