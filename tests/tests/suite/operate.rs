//! The guide docs/operating.md, command by command, with real processes: every institution has a
//! folder and a key of its own, and nothing but cards and the consortium file goes between them.

use std::io::Write;
use std::path::{Path, PathBuf};
use std::process::Stdio;

use crate::common::{nearest_rows, output, trefoil};
use crate::world::{NODES, Running, World, await_line, ports, refused, succeeds};
use trefoil_client::data::{Dataset, embedded_digits, idx, subset};

const PREPROCESS: [&str; 2] = ["--preprocess", "mean=0.1307,std=0.3081"];
/// What the parties let through by itself is in it.
const NEAREST_ROWS: &str = include_str!("../../../docs/knn.md");
const NETWORK: &str =
    "name = \"linear\"\ninput = [1, 28, 28]\nclasses = 10\n[[layer]]\nkind = \"dense\"\n";

/// Writes a hospital's rows as IDX files.
fn rows(folder: &Path, prefix: &str, data: &Dataset, rows: std::ops::Range<usize>) {
    std::fs::create_dir_all(folder).expect("a folder is made");
    let rows = subset(data, &rows.collect::<Vec<_>>()).expect("the digits have them");
    idx::write(folder, prefix, &rows).expect("they are written");
}

/// Keys, cards, the consortium file: everything before a node starts. Returns the core hash.
fn found(world: &World) -> String {
    for ((role, who, name), port) in NODES.into_iter().zip(ports()) {
        let listen = format!("127.0.0.1:{port}");
        world.init(role, who, name, &["--listen", &listen]);
    }
    world.init("hospital", "anna", "St. Anna", &[]);
    world.init("hospital", "berta", "Sankt Bèrta", &["--id", "berta"]);
    world.init("analyst", "office", "Statistics Office", &[]);
    world.init("analyst", "stranger", "A Stranger", &[]);
    refused(
        trefoil()
            .args(["init", "hospital", "--name", "St. Anna", "--dir"])
            .arg(world.dir("anna")),
        &["exists", "anna"],
    );

    // Members' cards come as a mail, on standard input.
    let file = world.root.path().join("consortium.toml");
    let mut create = trefoil();
    create.args([
        "consortium",
        "create",
        "--name",
        "Digits of two hospitals",
        "--out",
    ]);
    create.arg(&file);
    create.args(["north", "west", "east", "notary"].map(|who| world.card(who)));
    let mut child = create
        .arg("-")
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .spawn()
        .expect("the tool starts");
    let card = |who| std::fs::read_to_string(world.card(who)).expect("a card");
    let mail = format!("Hello,\n> {}\nand\n\n{}", card("anna"), card("office"));
    let mut stdin = child.stdin.take().expect("it is piped");
    stdin.write_all(mail.as_bytes()).expect("it is read");
    drop(stdin);
    let made = child.wait_with_output().expect("it ends");
    assert!(made.status.success());
    let made = String::from_utf8_lossy(&made.stdout).into_owned();

    let change = |args: &[&str], more: &[PathBuf]| {
        let mut command = trefoil();
        command.arg("consortium").arg(args[0]).arg(&file);
        succeeds(command.args(&args[1..]).args(more))
    };
    change(&["add"], &[world.card("berta"), world.card("stranger")]);
    change(&["remove", "a-stranger"], &[]);
    refused(
        trefoil()
            .args(["consortium", "add"])
            .args([&file, &world.card("berta")]),
        &["used twice"],
    );
    let shown = change(&["show"], &[]);
    for part in [
        "P1",
        "west-university",
        "dealer",
        "hospital",
        "berta",
        "analyst",
    ] {
        assert!(shown.contains(part), "{shown}");
    }
    assert!(!shown.contains("stranger"), "{shown}");
    let core = made.trim().strip_prefix("core hash ").expect("the hash");
    assert!(shown.contains(core), "{shown}");

    // Nobody takes a file that is not signed.
    world.hand_out(&file, &["north", "anna"]);
    let parts = ["core: not signed by north-clinic", "consortium sign"];
    refused(&mut world.member("anna", &["dataset", "digits"]), &parts);
    let mut party = trefoil();
    party.args(["party", "--config"]);
    refused(party.arg(world.dir("north").join("party.toml")), &parts);
    // North signs a copy of its own and mails the lines; the others sign the file itself.
    let copy = world.dir("north").join("copy.toml");
    std::fs::copy(&file, &copy).expect("it is copied");
    let lines = world.sign(&copy, "north");
    std::fs::write(world.dir("north").join("lines"), lines).expect("they are written");
    for who in ["west", "east", "notary"] {
        world.sign(&file, who);
    }
    let shown = change(&["show"], &[]);
    assert!(
        shown.contains("members number 3: NOT SIGNED by north-clinic"),
        "{shown}"
    );
    change(&["add"], &[world.dir("north").join("lines")]);
    let mut hospital = trefoil();
    hospital
        .args(["consortium", "sign"])
        .arg(&file)
        .arg("--home");
    refused(
        hospital.arg(world.dir("anna")),
        &["hospitals and analysts do not sign"],
    );

    world.hand_out(
        &file,
        &["north", "west", "east", "notary", "anna", "berta", "office"],
    );
    for who in ["north", "west", "east"] {
        let path = world.dir(who).join("party.toml");
        let text = std::fs::read_to_string(&path).expect("the configuration is there");
        let named = "requesters = [\"statistics-office\", \"berta\"]";
        let changed = text.replace("requesters = []", named);
        assert_ne!(changed, text);
        let first = "[[policy.rules]]";
        let rule = NEAREST_ROWS.split("```toml\n").nth(1).expect("a rule");
        let (rule, _) = rule.split_once("```").expect("it ends");
        let changed = changed.replacen(first, &format!("{rule}\n{first}"), 1);
        let refuses = format!(
            "{first}\nname = \"no-logits\"\nverdict = \"refuse\"\noutputs = [\"logits\"]\n\n{first}"
        );
        let changed = match who {
            "west" => changed.replacen(first, &refuses, 1),
            _ => changed,
        };
        std::fs::write(&path, changed).expect("it is written");
    }
    core.to_owned()
}

/// Makes a home's uploads look as if the tool had been killed before it heard of their commit.
fn forget_the_end(uploads: &Path) {
    let mut changed = 0;
    for entry in std::fs::read_dir(uploads).expect("the home remembers uploads") {
        let path = entry.expect("a file").path();
        let text = std::fs::read_to_string(&path).expect("a record");
        let begun = text.replace("\"complete\":true", "\"complete\":false");
        changed += usize::from(begun != text);
        std::fs::write(&path, begun).expect("it is written");
    }
    assert_eq!(changed, 2, "training and test rows");
}

/// Both hospitals share their rows; mistakes are found before that.
fn share(world: &World) {
    let digits = embedded_digits().expect("inside the program");
    let (anna, berta) = (
        world.dir("anna").join("data"),
        world.dir("berta").join("data"),
    );
    rows(&anna, "train", &digits.train, 0..300);
    rows(&anna, "t10k", &digits.test, 0..60);
    rows(&berta, "train", &digits.train, 300..500);
    rows(
        &world.dir("berta").join("new"),
        "t10k",
        &digits.test,
        60..100,
    );

    let args = |who: &str, folder: &Path, more: &[&str]| {
        let mut command = world.member(who, &["share", "--dataset", "digits", "--images"]);
        command.arg(folder).args(more);
        command
    };
    let nothing = succeeds(&mut world.member("anna", &["dataset", "digits"]));
    assert!(nothing.contains("nothing is shared"), "{nothing}");
    refused(
        &mut args("anna", &anna, &[]),
        &["--preprocess", "have mean=0."],
    );
    refused(&mut args("office", &anna, &PREPROCESS), &["is an analyst"]);

    let shared = succeeds(&mut args("anna", &anna, &PREPROCESS));
    for part in ["300 training rows", "60 test rows", "of st-anna"] {
        assert!(shared.contains(part), "{shared}");
    }
    refused(
        &mut args("anna", &anna, &PREPROCESS),
        &["already", "--again"],
    );
    forget_the_end(&world.dir("anna").join("uploads"));
    let again = succeeds(&mut args("anna", &anna, &PREPROCESS));
    assert_eq!(
        again, shared,
        "the uploads that were begun are gone on with"
    );
    let of_xray = ["--network", "xray", "--part", "train"];
    refused(
        args("berta", &berta, &of_xray).args(PREPROCESS),
        &["expected 0 to 1"],
    );
    refused(
        args("berta", &berta, &["--part", "train", "--rows", "0..201"]).args(PREPROCESS),
        &["0..201", "has 200"],
    );
    // Berta's folder has training files only.
    let part = ["--part", "train"];
    let shared = succeeds(args("berta", &berta, &part).args(PREPROCESS));
    assert!(shared.contains("200 training rows"), "{shared}");

    let held = succeeds(&mut world.member("office", &["dataset", "digits"]));
    for part in ["1 x 28 x 28", "training rows 500", "test rows     60"] {
        assert!(held.contains(part), "{held}");
    }
}

/// The accuracy that an evaluation prints.
fn percent_right(judged: &str) -> Option<f64> {
    let mut lines = judged.lines();
    let percent = lines.find_map(|line| line.strip_prefix("accuracy")?.trim().strip_suffix(" %"));
    percent?.parse().ok()
}

/// The classes of a table `file,class` of numbered images.
fn table_of_classes(table: &str) -> Vec<&str> {
    let mut lines = table.lines();
    assert_eq!(lines.next(), Some("file,class"));
    lines
        .enumerate()
        .map(|(row, line)| {
            line.strip_prefix(&format!("{row},"))
                .expect("the row's number")
        })
        .collect()
}

/// The rule of docs/knn.md lets Berta do this without a person: her new images, by the rows that both
/// hospitals have shared.
fn nearest_rows_of_two_hospitals(world: &World) {
    let images = world.dir("berta").join("new/t10k-images-idx3-ubyte");
    let nearest = || {
        let mut command = world.member("berta", &["knn", "--dataset", "digits", "-k", "3"]);
        command.arg("--images").arg(&images).args(PREPROCESS);
        command
    };
    let table = succeeds(&mut nearest());
    let digits = embedded_digits().expect("inside the program");
    let rows = |of, rows| subset(of, &Vec::from_iter(rows)).expect("the digits have them");
    let (train, new) = (rows(&digits.train, 0..500), rows(&digits.test, 60..100));
    let defined = nearest_rows(&train, &new, 3);
    let defined: Vec<String> = defined.iter().map(u8::to_string).collect();
    assert_eq!(table_of_classes(&table), defined);
    // 40 of the day's 70 images are used up.
    refused(&mut nearest(), &["nearest-digits", "70"]);
}

/// Runs a job that a member asks for.
fn jobs(world: &World) {
    let network = world.root.path().join("linear.toml");
    std::fs::write(&network, NETWORK).expect("a network is written");
    let network = network.display().to_string();
    let weights = world.dir("office").join("weights.npz");
    let train = |who: &str| {
        let mut command = world.member(who, &["train", "--network", &network]);
        command.args(["--dataset", "digits", "--save-as", "linear-1"]);
        command.args(["--batch", "50", "--epochs", "4", "--learning-rate", "0.125"]);
        command
    };
    refused(&mut train("anna"), &["st-anna"]);
    // No rule lets weights out, so that a person at each party has to agree.
    let mut command = train("office");
    command.args(["--reveal-metrics", "--detach"]);
    command.arg("--reveal-weights").arg(&weights);
    let (code, id, said) = output(&mut command);
    assert_eq!(code, Some(0), "{id}\n{said}");
    assert!(said.contains("THE TRAINED WEIGHTS"), "{said}");
    for who in ["north", "west", "east"] {
        let held = succeeds(&mut world.operator(who, &["jobs"]));
        assert!(held.contains(&id[..16]) && held.contains("held"), "{held}");
        let approve = ["approve", &id[..16], "--yes"];
        let (code, done, words) = output(&mut world.operator(who, &approve));
        assert_eq!(code, Some(0), "{done}\n{words}");
        assert!(words.contains("THE TRAINED WEIGHTS"), "{words}");
    }
    let trained = succeeds(&mut world.member("office", &["watch", &id[..16]]));
    for part in ["epoch 4", "training steps", "40", "linear-1", "weights.npz"] {
        assert!(trained.contains(part), "{trained}");
    }
    // 784 x 10 weights and 10 biases of eight bytes, with their headers.
    let bytes = std::fs::metadata(&weights).expect("they are written").len();
    assert!((62_800..64_000).contains(&bytes), "{bytes}");

    let evaluate = [
        "evaluate",
        "linear-1",
        "--network",
        &network,
        "--dataset",
        "digits",
    ];
    let judged = succeeds(&mut world.member("office", &evaluate));
    let accuracy = percent_right(&judged);
    assert!(accuracy.is_some_and(|percent| percent > 60.0), "{judged}");
    // No rule lets the office do this, so that it waits for a person.
    let nearest = ["knn", "--dataset", "digits", "-k", "3", "--detach"];
    let id = succeeds(&mut world.member("office", &nearest));
    for who in ["north", "west", "east"] {
        succeeds(&mut world.operator(who, &["approve", &id[..16], "--yes"]));
    }
    let judged = succeeds(&mut world.member("office", &["watch", &id[..16]]));
    let accuracy = percent_right(&judged);
    assert!(accuracy.is_some_and(|percent| percent > 60.0), "{judged}");
    nearest_rows_of_two_hospitals(world);
    let mut missing = world.member("office", &["evaluate", "no-such", "--network", &network]);
    refused(missing.args(["--dataset", "digits"]), &["no-such"]);

    let images = world.dir("berta").join("new/t10k-images-idx3-ubyte");
    let predict = |more: &[&str]| {
        let mut command = world.member("berta", &["predict", "linear-1", "--network", &network]);
        command
            .arg("--images")
            .arg(&images)
            .args(PREPROCESS)
            .args(more);
        command
    };
    let digits = embedded_digits().expect("inside the program");
    let truth: Vec<String> = digits.test.labels[60..100]
        .iter()
        .map(u8::to_string)
        .collect();
    let table = succeeds(&mut predict(&[]));
    let classes = table_of_classes(&table);
    assert_eq!(classes.len(), 40, "{table}");
    let right = classes.iter().zip(&truth).filter(|(a, b)| a == b).count();
    assert!(right > 20, "{right} of 40 right:\n{table}");

    // Submitted by one process, fetched by another.
    let to = world.dir("berta").join("table.csv");
    let detached = ["--output", "probabilities", "--detach", "--to"];
    let id = succeeds(predict(&detached).arg(&to));
    for who in ["north", "west", "east"] {
        succeeds(&mut world.operator(who, &["approve", &id[..12], "--yes"]));
    }
    succeeds(&mut world.member("berta", &["watch", &id[..12]]));
    let table = std::fs::read_to_string(&to).expect("the table is written");
    let row: Vec<&str> = table.lines().nth(1).expect("a row").split(',').collect();
    assert_eq!(row[1], classes[0], "the same class by another output");
    let sum: f64 = row[2..]
        .iter()
        .map(|p| p.parse::<f64>().expect("a number"))
        .sum();
    assert!((0.98..1.02).contains(&sum), "{row:?}");
    refused(
        &mut world.member("office", &["watch", &id[..12]]),
        &["0 jobs"],
    );

    // One party's rule is enough, and one person's word.
    refused(
        &mut predict(&["--output", "logits"]),
        &["P1 (west-university)", "no-logits"],
    );
    let id = succeeds(&mut predict(&["--output", "probabilities", "--detach"]));
    let deny = ["approve", &id[..12], "--deny", "--reason", "not in May"];
    succeeds(world.operator("east", &deny).arg("--yes"));
    refused(
        &mut world.member("berta", &["watch", &id[..12]]),
        &["not in May", "east-ministry"],
    );
    for who in ["north", "west", "east"] {
        let verified = succeeds(&mut world.operator(who, &["audit", "verify"]));
        assert!(verified.contains("the chain holds"), "{verified}");
        let log = world.dir(who).join("store/audit.log");
        let text = std::fs::read_to_string(log).expect("the log is readable");
        assert!(text.contains("outputs_revealed"), "{text}");
    }
}

#[test]
fn three_institutions_a_dealer_and_members_work_with_commands_alone() {
    let world = World {
        root: tempfile::tempdir().expect("a temporary folder"),
    };
    let core = found(&world);
    let nodes = [
        ("party", "north"),
        ("party", "west"),
        ("party", "east"),
        ("dealer", "notary"),
    ];
    let running: Vec<(Running, PathBuf)> = nodes
        .iter()
        .map(|(role, who)| world.start(role, who))
        .collect();
    for (_, log) in &running {
        let line = await_line(log, "listening");
        assert!(line.contains(&core), "{line} has not the core hash {core}");
    }

    // A member whose key the parties do not have is turned away, by its own file and by theirs.
    let file = world.dir("stranger").join("consortium.toml");
    std::fs::copy(world.dir("anna").join("consortium.toml"), &file).expect("it is copied");
    let ask = ["dataset", "digits"];
    refused(
        &mut world.member("stranger", &ask),
        &["no member has the public key"],
    );
    let card = world.card("stranger");
    succeeds(trefoil().args(["consortium", "add"]).args([&file, &card]));
    refused(
        &mut world.member("stranger", &ask),
        &["members number 4: not signed by north-clinic, west-university, east-ministry"],
    );

    share(&world);
    jobs(&world);
}
