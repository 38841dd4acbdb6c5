//! The shipped examples: the minimal ones are enough, the others name every key that there is.

use std::path::{Path, PathBuf};

use trefoil_consortium::{DealerConfig, MemberConfig, PartyConfig};

fn shipped(name: &str) -> PathBuf {
    let tests = Path::new(env!("CARGO_MANIFEST_DIR"));
    tests.join("../configs").join(name)
}

/// The keys of one table of a file, as the reader lists them when it meets another.
fn keys(text: &str, table: &str, load: &dyn Fn(&Path) -> Result<(), String>) -> Vec<String> {
    let heading = format!("{table}\n");
    let (before, after) = match table {
        "" => ("", text),
        _ => {
            let at = text.find(&heading).expect("the example has the table");
            text.split_at(at + heading.len())
        }
    };
    let folder = tempfile::tempdir().expect("a temporary folder");
    let path = folder.path().join("example.toml");
    std::fs::write(&path, format!("{before}no_such_key = 1\n{after}")).expect("it is written");
    let err = load(&path).expect_err("an unknown key is refused");
    let listed = err.split_once("expected").expect("the keys are listed").1;
    let quoted = listed.split('`').skip(1).step_by(2);
    quoted.map(str::to_owned).collect()
}

/// A key stands in the example, perhaps in a comment or as a table of its own.
fn names(text: &str, key: &str) -> bool {
    text.lines().any(|line| {
        let line = line.trim_start_matches(['#', ' ', '[']);
        let line = line.strip_prefix("policy.").unwrap_or(line);
        let rest = line.strip_prefix(key);
        rest.is_some_and(|rest| rest.starts_with([' ', ']']))
    })
}

fn is_whole(file: &str, tables: &[&str], load: &dyn Fn(&Path) -> Result<(), String>) {
    let text = std::fs::read_to_string(shipped(file)).expect("it is shipped");
    for table in tables {
        let keys = keys(&text, table, load);
        assert!(keys.len() > 1, "{file} {table}: {keys:?}");
        for key in keys {
            assert!(names(&text, &key), "{file} lacks {table} {key}");
        }
    }
}

fn party(path: &Path) -> Result<(), String> {
    PartyConfig::load(path)
        .map(drop)
        .map_err(|err| format!("{err:#}"))
}

fn dealer(path: &Path) -> Result<(), String> {
    DealerConfig::load(path)
        .map(drop)
        .map_err(|err| format!("{err:#}"))
}

fn member(path: &Path) -> Result<(), String> {
    MemberConfig::load(path)
        .map(drop)
        .map_err(|err| format!("{err:#}"))
}

#[test]
fn the_long_examples_name_every_key() {
    let party_tables = [
        "",
        "[identity]",
        "[peers]",
        "[policy]",
        "[store]",
        "[transport]",
    ];
    is_whole("party.toml", &party_tables, &party);
    is_whole("policy.toml", &["[policy]", "[[policy.rules]]"], &party);
    is_whole("dealer.toml", &["", "[identity]"], &dealer);
    is_whole("member.toml", &["", "[identity]"], &member);
}

#[test]
fn the_minimal_examples_are_enough() {
    party(&shipped("minimal/party.toml")).unwrap();
    dealer(&shipped("minimal/dealer.toml")).unwrap();
    member(&shipped("minimal/member.toml")).unwrap();
}
