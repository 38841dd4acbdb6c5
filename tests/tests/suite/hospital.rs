//! `trefoil share` with pictures: DICOM files beside others, lists of problems before anything
//! leaves, an interrupted upload, memory that does not grow with the number of pictures.

use std::path::Path;
use std::process::{Command, Stdio};

use crate::deployment::{Deployment, PARTIES, eventually, files, peak_of};
use crate::world::{refused, succeeds};

const PREPROCESS: [&str; 2] = ["--preprocess", "mean=0.5,std=0.5"];
/// Pictures of the smaller and of the larger upload.
const FEW: usize = 4_000;
const MANY: usize = 12_000;
/// Far below what the larger upload's rows take as shares: 8,000 x 784 x 8 bytes are 50 million.
const GROWTH_MAX_BYTES: u64 = 16 << 20;

/// A DICOM file of 16 x 16 pixels of 12 bits, uncompressed.
fn dicom(shade: u16, frames: Option<&str>) -> Vec<u8> {
    let element = |group: u16, number: u16, kind: &[u8; 2], value: &[u8]| {
        let mut out = [group.to_le_bytes(), number.to_le_bytes(), *kind].concat();
        match kind {
            b"OW" => {
                out.extend([0, 0]);
                out.extend((value.len() as u32).to_le_bytes());
            }
            _ => out.extend((value.len() as u16).to_le_bytes()),
        }
        out.extend(value);
        out
    };
    let word = |number, word: u16| element(0x28, number, b"US", &word.to_le_bytes());
    let pixels = (0..256).flat_map(|at| (shade + at).to_le_bytes());
    let mut file = vec![0; 128];
    file.extend(b"DICM");
    file.extend(element(0x02, 0x10, b"UI", b"1.2.840.10008.1.2.1\0"));
    file.extend(element(0x10, 0x10, b"PN", b"Secret^Patient"));
    file.extend(word(0x02, 1));
    file.extend(element(0x28, 0x04, b"CS", b"MONOCHROME2 "));
    if let Some(frames) = frames {
        file.extend(element(0x28, 0x08, b"IS", frames.as_bytes()));
    }
    for (number, value) in [
        (0x10, 16),
        (0x11, 16),
        (0x100, 16),
        (0x101, 12),
        (0x102, 11),
        (0x103, 0),
    ] {
        file.extend(word(number, value));
    }
    file.extend(element(0x28, 0x1050, b"DS", b"1000"));
    file.extend(element(0x28, 0x1051, b"DS", b"2000"));
    file.extend(element(0x7FE0, 0x10, b"OW", &pixels.collect::<Vec<u8>>()));
    file
}

fn share(deployment: &Deployment, who: &str, dataset: &str, images: &Path) -> Command {
    let mut command = deployment
        .world
        .member(who, &["share", "--dataset", dataset]);
    command.args(["--network", "mlp", "--class-names", "a,b,c,d,e,f,g,h,i,j"]);
    command.args(PREPROCESS).arg("--images").arg(images);
    command
}

#[test]
fn dicom_files_are_shared_and_problems_are_listed_before_anything_leaves() {
    let deployment = Deployment::start();
    let folder = deployment.world.dir("anna").join("pictures");
    std::fs::create_dir_all(&folder).expect("a folder is made");
    let write = |name: &str, content: &[u8]| {
        std::fs::write(folder.join(name), content).expect("a file is written");
    };
    let mut table = "file,label,group\n".to_owned();
    for number in 0..40u16 {
        // Archives name files by numbers and dots.
        let name = format!("1.2.826.{number}");
        write(&name, &dicom(number * 10, None));
        table += &format!(
            "{name},{},patient {}\n",
            ["a", "b"][usize::from(number % 2)],
            number / 4
        );
    }
    let good = table.clone();
    write("frames.dcm", &dicom(7, Some("12")));
    write("cut.dcm", &dicom(8, None)[..700]);
    write("copy.dcm", &dicom(20, None));
    table += "frames.dcm,a,p\ncut.dcm,b,q\ncopy.dcm,a,r\nabsent.dcm,a,s\n1.2.826.0,zebra,t\n";
    write("labels.csv", table.as_bytes());
    // As one part, so that none of them is a validation picture, which stays here undecoded.
    let mut command = share(&deployment, "anna", "chest-2026", &folder);
    refused(
        command.args(["--part", "train"]),
        &[
            "nothing has left this machine",
            "5 problem(s)",
            "line 42:",
            "it has 12 frames",
            "line 43:",
            "it ends in the middle of its pixels",
            "line 44:",
            "is the same picture as line 4: ",
            "line 45:",
            "missing picture",
            "line 46: unknown label \"zebra\"",
        ],
    );
    for who in PARTIES {
        for kind in ["staging", "datasets"] {
            let left = files(&deployment.store(who).join(kind));
            assert!(left.is_empty(), "{left:?}");
        }
    }
    write("labels.csv", good.as_bytes());
    let shared = succeeds(&mut share(&deployment, "anna", "chest-2026", &folder));
    // Patients of four pictures each: a tenth of forty is one.
    for part in [
        "shared 32 training rows",
        "shared 4 test rows",
        "P2 holds 32 rows, digest ",
    ] {
        assert!(shared.contains(part), "{part:?} is not in {shared}");
    }
    let held = succeeds(
        &mut deployment
            .world
            .member("office", &["dataset", "chest-2026"]),
    );
    assert!(held.contains("training rows 32"), "{held}");
    refused(
        &mut share(&deployment, "anna", "chest-2026", &folder),
        &["already"],
    );
    // Nothing but shares is there.
    for who in PARTIES {
        for path in files(deployment.store(who).as_path()) {
            let content = std::fs::read(&path).expect("a party's file");
            let found = content.windows(14).any(|at| at == b"Secret^Patient");
            assert!(!found, "{} names a patient", path.display());
        }
    }
}

/// Pictures of two classes, no two alike.
fn pictures(folder: &Path, count: usize) {
    for class in ["a", "b"] {
        std::fs::create_dir_all(folder.join(class)).expect("a folder is made");
    }
    for number in 0..count {
        let picture = image::GrayImage::from_fn(28, 28, |x, y| {
            let bit = (number >> (x % 16)) & 1;
            image::Luma([(x + y) as u8 + 100 * bit as u8])
        });
        let class = ["a", "b"][number % 2];
        let path = folder.join(class).join(format!("{number}.png"));
        picture.save(path).expect("a picture is written");
    }
}

#[test]
fn an_upload_that_was_killed_goes_on_and_memory_does_not_grow_with_the_pictures() {
    let deployment = Deployment::start();
    let (few, many) = (deployment.world.dir("few"), deployment.world.dir("many"));
    pictures(&few, FEW);
    pictures(&many, MANY);
    let run = |dataset: &str, images: &Path| {
        let mut command = share(&deployment, "anna", dataset, images);
        command.args(["--part", "train"]);
        let quiet = command.stdout(Stdio::null()).stderr(Stdio::null());
        quiet.spawn().expect("the tool starts")
    };
    let mut small = run("few", &few);
    let small_peak = peak_of(&mut small);
    assert!(small.wait().expect("it ended").success());

    // Killed when some chunks are staged; what is there is not shared again.
    let mut killed = run("many", &many);
    let staging = deployment.store("east").join("staging");
    eventually("three staged chunks", || files(&staging).len() > 3);
    killed.kill().expect("it runs");
    killed.wait().expect("it ends");
    let staged = files(&staging);
    let first = staged
        .iter()
        .find(|path| path.to_string_lossy().contains("chunk-00000"));
    let first = first.expect("the first chunk is staged");
    let before = std::fs::metadata(first)
        .and_then(|about| about.modified())
        .expect("its time");
    let mut large = run("many", &many);
    let large_peak = peak_of(&mut large);
    assert!(large.wait().expect("it ended").success());
    let committed = files(&deployment.store("east").join("datasets/many"));
    let first = committed
        .iter()
        .find(|path| path.to_string_lossy().contains("chunk-00000"));
    let first = first.expect("the first chunk is committed");
    let after = std::fs::metadata(first)
        .and_then(|about| about.modified())
        .expect("its time");
    assert_eq!(before, after, "a chunk that was staged was shared again");
    let held = succeeds(&mut deployment.world.member("office", &["dataset", "many"]));
    assert!(held.contains(&format!("training rows {MANY}")), "{held}");

    println!("peak memory: {small_peak} bytes for {FEW} pictures, {large_peak} for {MANY}");
    assert!(
        small_peak > 0,
        "the platform says how much memory a process takes"
    );
    assert!(
        large_peak < small_peak + GROWTH_MAX_BYTES,
        "{FEW} pictures take {small_peak} bytes, {MANY} take {large_peak}"
    );
}
