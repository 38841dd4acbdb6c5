//! What can be measured, by name.

use anyhow::Result;
use trefoil_models::Benchmark;

use crate::experiment::read_network;

/// Networks of which inference and training are measured.
const NETWORKS: [&str; 4] = ["mlp", "minionn", "lenet", "chameleon"];
/// A million elements.
const MILLION: usize = 1 << 20;

/// One row of the report.
pub(super) struct Case {
    pub(super) name: String,
    pub(super) work: Work,
    /// Repetitions that are measured; one more goes before them.
    pub(super) repetitions: usize,
    /// Whether what is revealed is held against the plain run.
    pub(super) check: bool,
}

pub(super) enum Work {
    /// A job at real nodes.
    Job(Benchmark),
    /// A hospital shares this many images of 28x28 with ten classes.
    Share(usize),
    /// So many members ask in one serving session at the same time; a repetition is a request of
    /// each of them.
    Serve(usize),
    /// The dealer's part of a job alone, in this process.
    Dealer(Benchmark),
}

/// Repetitions of a job on so many images: short ones are timed more often.
fn repetitions(images: usize) -> usize {
    if images == 1 { 200 } else { 9 }
}

/// Inference or a training step of any network, its results held against the plain run.
pub(super) fn of_network(name: &str, train: bool, batch: usize) -> Result<Case> {
    let network = read_network(name)?;
    let verb = if train { "train" } else { "infer" };
    let case = format!("{}-{verb}-{batch}", network.name);
    let network = network.to_toml();
    let work = match train {
        true => Benchmark::Train { network, batch },
        false => Benchmark::Infer { network, batch },
    };
    Ok(Case {
        name: case,
        work: Work::Job(work),
        repetitions: 1,
        check: true,
    })
}

/// All cases in the order of the report.
pub(super) fn all() -> Result<Vec<Case>> {
    let mut cases = Vec::new();
    let mut add = |name: String, repetitions: usize, work: Work| {
        cases.push(Case {
            name,
            work,
            repetitions,
            check: false,
        });
    };
    let primitives = [
        ("relu-1m", Benchmark::Relu { elements: MILLION }),
        ("mul-1m", Benchmark::Multiply { elements: MILLION }),
        ("truncate-1m", Benchmark::Truncate { elements: MILLION }),
        (
            "matmul-256x1024x256",
            Benchmark::MatMul {
                rows: 256,
                inner: 1024,
                columns: 256,
            },
        ),
    ];
    for (name, work) in primitives {
        add(name.into(), 9, Work::Job(work));
    }
    for name in NETWORKS {
        let network = read_network(name)?.to_toml();
        for batch in [1, 128] {
            let work = Benchmark::Infer {
                network: network.clone(),
                batch,
            };
            let repetitions = repetitions(batch);
            add(
                format!("{name}-infer-{batch}"),
                repetitions,
                Work::Job(work),
            );
        }
        let work = Benchmark::Train {
            network,
            batch: 128,
        };
        add(format!("{name}-train-128"), 9, Work::Job(work));
    }
    let train = |name: &str, batch| -> Result<Benchmark> {
        Ok(Benchmark::Train {
            network: read_network(name)?.to_toml(),
            batch,
        })
    };
    add("xray-train-64".into(), 9, Work::Job(train("xray", 64)?));
    add("share-5000".into(), 5, Work::Share(5_000));
    add("serve-20x25".into(), 25, Work::Serve(20));
    add("dealer-only".into(), 5, Work::Dealer(train("lenet", 128)?));
    Ok(cases)
}
