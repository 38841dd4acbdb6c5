//! docs/operating.md, word for word, on hosts of their own: network namespaces that
//! scripts/institutions makes, each institution with its own address, name and folder. What the guide
//! shows must be what the commands print, but for hashes and numbers.

use std::collections::BTreeMap;
use std::io::{BufRead, BufReader, Write};
use std::path::{Path, PathBuf};
use std::process::{Child, ChildStdin, ChildStdout, Command, Stdio};
use std::time::{Duration, Instant};

/// What is waited for in a node's log happens by then, or never.
const LIMIT: Duration = Duration::from_secs(60);
/// Longest command of the guide.
const COMMAND_LIMIT_S: u64 = 150;
/// What scripts/institutions ends with where the machine cannot do it.
const UNAVAILABLE: i32 = 69;
/// As in scripts/institutions.
const HOSTS: [&str; 7] = ["north", "west", "east", "notary", "anna", "berta", "office"];
/// Where the institutions' folders are in the guide.
const GUIDE_ROOT: &str = "/srv/trefoil";
/// Shortest digits of a hash that a command may give.
const HASH_MIN: usize = 8;

/// A command of the guide and what it prints.
#[derive(Debug, PartialEq)]
struct Shown {
    /// Line of the guide.
    line: usize,
    /// Where it is typed; none is the post.
    host: Option<String>,
    command: String,
    printed: Vec<String>,
}

/// The commands in a text's blocks.
fn commands(text: &str) -> Vec<Shown> {
    let mut found: Vec<Shown> = Vec::new();
    let mut inside = false;
    for (number, line) in text.lines().enumerate() {
        if line.starts_with("```") {
            inside = !inside && line == "```text";
            continue;
        }
        if !inside {
            continue;
        }
        let prompt = line
            .split_once("$ ")
            .filter(|(host, _)| host.is_empty() || HOSTS.contains(host));
        if let Some((host, command)) = prompt {
            found.push(Shown {
                line: number + 1,
                host: (!host.is_empty()).then(|| host.to_owned()),
                command: command.to_owned(),
                printed: Vec::new(),
            });
        } else if let (Some(last), false) = (found.last_mut(), line.trim().is_empty()) {
            last.printed.push(line.to_owned());
        }
    }
    found
}

fn is_hash(word: &str) -> bool {
    word.len() >= HASH_MIN
        && word
            .bytes()
            .all(|c| c.is_ascii_digit() || (b'a'..=b'f').contains(&c))
}

/// A line in pieces: words of letters and digits, and what is between them.
fn pieces(line: &str) -> Vec<&str> {
    let mut out = Vec::new();
    let mut rest = line;
    while let Some(first) = rest.chars().next() {
        let word = first.is_ascii_alphanumeric();
        let end = rest
            .find(|c: char| c.is_ascii_alphanumeric() != word)
            .unwrap_or(rest.len());
        out.push(&rest[..end]);
        rest = &rest[end..];
    }
    out
}

/// A line without what differs from run to run: hashes, numbers, the width of columns.
fn shape(line: &str) -> String {
    let mut out = String::new();
    for piece in pieces(line) {
        if is_hash(piece) {
            out.push('#');
        } else {
            for c in piece.chars() {
                match c {
                    '0'..='9' if out.ends_with('0') => {}
                    '0'..='9' => out.push('0'),
                    c if c.is_whitespace() && out.ends_with(' ') => {}
                    c if c.is_whitespace() => out.push(' '),
                    c => out.push(c),
                }
            }
        }
    }
    out.trim().to_owned()
}

/// The guide's hashes and what they are in this run.
#[derive(Default)]
struct Hashes(BTreeMap<String, String>);

impl Hashes {
    /// Notes the hashes of a line that was printed as the guide shows it.
    fn note(&mut self, guide: &str, printed: &str) {
        let hashes = |line: &str| -> Vec<String> {
            let found = pieces(line).into_iter().filter(|piece| is_hash(piece));
            found.map(str::to_owned).collect()
        };
        self.0
            .extend(hashes(guide).into_iter().zip(hashes(printed)));
    }

    /// A command of the guide with this run's hashes.
    fn put_into(&self, command: &str) -> String {
        let here = |piece: &str| {
            let known = || self.0.iter().find(|(guide, _)| guide.starts_with(piece));
            match is_hash(piece).then(known).flatten() {
                Some((_, here)) => here[..piece.len().min(here.len())].to_owned(),
                None => piece.to_owned(),
            }
        };
        pieces(command).into_iter().map(here).collect()
    }
}

/// The hosts, driven through a shell inside.
struct World {
    shell: Child,
    commands: ChildStdin,
    results: BufReader<ChildStdout>,
    root: tempfile::TempDir,
}

impl Drop for World {
    fn drop(&mut self) {
        // Its end is that of everything inside.
        let _ = self.shell.kill();
        let _ = self.shell.wait();
    }
}

fn repository() -> PathBuf {
    let tests = Path::new(env!("CARGO_MANIFEST_DIR"));
    tests.parent().expect("the repository").to_owned()
}

impl World {
    /// None where this machine makes no namespaces.
    fn new() -> Option<World> {
        let script = repository().join("scripts/institutions");
        let can = Command::new(&script).arg("true").output();
        let can = can.expect("the script is there");
        if can.status.code() == Some(UNAVAILABLE) {
            eprintln!("not followed: {}", String::from_utf8_lossy(&can.stderr));
            return None;
        }
        assert!(can.status.success(), "{can:?}");
        let root = tempfile::tempdir().expect("a temporary folder");
        for host in HOSTS {
            let home = root.path().join(host);
            std::fs::create_dir(&home).expect("a folder is made");
            std::os::unix::fs::symlink(repository().join("data"), home.join("data"))
                .expect("a link is made");
        }
        let bin = root.path().join("bin");
        std::fs::create_dir(&bin).expect("a folder is made");
        let tool = env!("CARGO_BIN_EXE_trefoil-under-test");
        std::os::unix::fs::symlink(tool, bin.join("trefoil")).expect("a link is made");
        let path = std::env::var("PATH").unwrap_or_default();
        let mut shell = Command::new(&script)
            .args(["bash", "--norc", "-s"])
            .current_dir(root.path())
            .env("PATH", format!("{}:{path}", bin.display()))
            .env_remove("TREFOIL_HOME")
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .expect("the shell starts");
        Some(World {
            commands: shell.stdin.take().expect("it is piped"),
            results: BufReader::new(shell.stdout.take().expect("it is piped")),
            shell,
            root,
        })
    }

    fn folder(&self, host: Option<&str>) -> PathBuf {
        self.root.path().join(host.unwrap_or(""))
    }

    /// Runs a command to its end; its exit code and what it printed.
    fn run(&mut self, host: Option<&str>, command: &str) -> (i32, String) {
        let folder = self.folder(host);
        std::fs::write(self.root.path().join("command"), command).expect("it is written");
        let at = host.map_or(String::new(), |host| format!("at {host} "));
        let root = self.root.path().display().to_string();
        writeln!(
            self.commands,
            "(cd {} && {at}timeout {COMMAND_LIMIT_S} bash {root}/command >{root}/printed 2>&1 <<<y); echo $?",
            folder.display()
        )
        .expect("the shell reads");
        let mut code = String::new();
        self.results
            .read_line(&mut code)
            .expect("the shell answers");
        let printed = std::fs::read(self.root.path().join("printed")).unwrap_or_default();
        let printed = String::from_utf8_lossy(&printed);
        let code = code.trim().parse().expect("an exit code");
        (code, printed.replace(&root, GUIDE_ROOT))
    }

    /// Starts a node, which goes on by itself, and waits until it listens.
    fn start(&mut self, host: &str, command: &str) {
        let folder = self.folder(Some(host));
        let log = folder.join("log");
        let before = std::fs::read_to_string(&log).unwrap_or_default().len();
        writeln!(
            self.commands,
            "(cd {} && exec nsenter --net=/run/netns/{host} bash -c 'echo $$ >pid; exec {command}' >>log 2>&1 </dev/null) &",
            folder.display()
        )
        .expect("the shell reads");
        let start = Instant::now();
        loop {
            let text = std::fs::read_to_string(&log).unwrap_or_default();
            if text
                .get(before..)
                .is_some_and(|new| new.contains("listening"))
            {
                return;
            }
            assert!(start.elapsed() < LIMIT, "{host} does not listen:\n{text}");
            std::thread::sleep(Duration::from_millis(20));
        }
    }
}

/// Lines of the guide that were printed, in order; others may be between them.
fn compare(shown: &Shown, printed: &str, hashes: &mut Hashes) -> Result<(), String> {
    let mut lines = printed.lines();
    for line in &shown.printed {
        let wanted = shape(line);
        let Some(found) = lines.find(|printed| shape(printed) == wanted) else {
            return Err(format!("line {line:?} was not printed"));
        };
        hashes.note(line, found);
    }
    Ok(())
}

#[test]
fn the_guide_is_followed_word_for_word_on_hosts_of_their_own() {
    let Some(mut world) = World::new() else {
        return;
    };
    let guide = std::fs::read_to_string(repository().join("docs/operating.md"));
    let guide = commands(&guide.expect("the guide is there"));
    assert!(guide.len() > 30, "{} commands", guide.len());
    // For whoever writes the guide: everything that was printed.
    let transcript = std::env::var_os("TREFOIL_GUIDE_TRANSCRIPT");
    let mut said = String::new();
    let mut hashes = Hashes::default();
    let mut wrong = Vec::new();
    for shown in &guide {
        let command = hashes.put_into(&shown.command);
        let prompt = format!("{}$ {command}", shown.host.as_deref().unwrap_or(""));
        if let (Some(node), Some(host)) = (command.strip_suffix(" &"), &shown.host) {
            world.start(host, node);
            said += &format!("{prompt}\n");
            continue;
        }
        let (code, printed) = world.run(shown.host.as_deref(), &command);
        said += &format!("{prompt}\n{printed}\n");
        // A command that is shown to fail says `error:`.
        let fails = shown.printed.iter().any(|line| line.starts_with("error:"));
        let mut problem = compare(shown, &printed, &mut hashes).err();
        if (code == 0) == fails {
            problem = Some(format!("exit code {code}"));
        }
        if let Some(problem) = problem {
            let line = shown.line;
            wrong.push(format!(
                "docs/operating.md:{line}: {prompt}\n  {problem}; it printed:\n{printed}"
            ));
            // What follows needs it.
            if code != 0 && !fails {
                break;
            }
        }
    }
    if let Some(path) = transcript {
        std::fs::write(path, said).expect("the transcript is written");
    }
    assert!(wrong.is_empty(), "{}", wrong.join("\n"));
}

#[test]
fn commands_and_hashes_of_a_guide_are_found() {
    let text = "# A\n```text\nnorth$ trefoil a\nhash 0123456789abcdef 7 s\n\n$ cp a b\n```\n```toml\nwest$ no\n```\n";
    let found = commands(text);
    assert_eq!(found.len(), 2);
    assert_eq!(found[0].host.as_deref(), Some("north"));
    assert_eq!((found[0].line, found[1].line), (3, 6));
    assert_eq!(found[1].host, None);
    let mut hashes = Hashes::default();
    let printed = "noise\nhash fedcba9876543210   12 s\n";
    assert!(compare(&found[0], printed, &mut hashes).is_ok());
    assert_eq!(
        hashes.put_into("watch 0123456789 --x"),
        "watch fedcba9876 --x"
    );
    assert!(compare(&found[0], "hash fedcba9876543210 s", &mut hashes).is_err());
}
