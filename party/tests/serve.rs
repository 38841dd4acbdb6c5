//! Models that leave and come, and serving, on a whole consortium: who gets which rows, what is
//! refused, and how a session ends.

mod common;

use std::collections::BTreeMap;
use std::time::Duration;

use common::{NETWORK, World, allow_all, images, labels, table, with_rules};
use trefoil_client::remote::{Event, Part, Remote, RemoteError, Upload};
use trefoil_consortium::config::{Kind, Output, Policy, Rule, Verdict};
use trefoil_consortium::wire::{
    Answer, Ask, CONTROL_VERSION, Request, ServedImages, ServedRequest, Share,
};
use trefoil_consortium::{JobDescription, JobId, Words};
use trefoil_models::schedule::IMPORT_ROW_WORDS;
use trefoil_models::{
    JobKind, Network, PredictOutput, ServeSpec, import_words, plain_run, weights,
};
use trefoil_party::audit::{self, AUDIT_FILE};
use trefoil_protocol::party::PartyId;
use trefoil_protocol::ring::Tensor;
use trefoil_transport::{MsgStream, StreamKind};

type Weights = BTreeMap<String, Tensor>;

fn network() -> Network {
    Network::parse(NETWORK).unwrap()
}

/// Runs a member's job to its end.
async fn run(
    world: &World,
    who: &str,
    remote: &Remote,
    kind: JobKind,
) -> Result<Weights, RemoteError> {
    let job = JobDescription::new("job", world.member(who).1, kind).unwrap();
    let id = remote.submit(job).await?;
    let result = remote.watch(id, &mut |_| {}).await?;
    let outputs = result.outputs.into_iter();
    Ok(outputs.map(|output| (output.name, output.tensor)).collect())
}

/// Shares weights and keeps them as a model.
async fn import(world: &World, remote: &Remote, weights: &Weights, save_as: &str) {
    let words = import_words(&network(), weights).unwrap();
    let upload = Upload {
        dataset: String::new(),
        part: Part::Predict,
        images: Tensor::new(
            vec![words.len() / IMPORT_ROW_WORDS, IMPORT_ROW_WORDS],
            words,
        ),
        labels: None,
        shape: vec![1, 1, IMPORT_ROW_WORDS],
    };
    let receipt = remote.upload(upload, &mut |_| {}).await.unwrap();
    let kind = JobKind::ImportModel {
        network: NETWORK.into(),
        frac_bits: 16,
        ring_bits: 64,
        upload: receipt.upload,
        save_as: save_as.into(),
        preparation: None,
    };
    run(world, "st-anna", remote, kind).await.unwrap();
}

fn predict(model: &str, rows: usize, upload: String) -> JobKind {
    JobKind::Predict {
        model: model.into(),
        network: NETWORK.into(),
        frac_bits: 16,
        ring_bits: 64,
        rows,
        upload,
        output: PredictOutput::Logits,
    }
}

/// What a plain run says of images.
fn plain_logits(weights: &Weights, x: &Tensor) -> Tensor {
    let kind = predict("m", x.shape()[0], "upload".into());
    let schedule = trefoil_models::schedule(&kind).unwrap();
    let tables = [("upload/images".to_owned(), table([x].into_iter()))].into();
    let run = plain_run::run(&schedule, &tables, Some(weights), None, |_, _, _| {}).unwrap();
    run.outputs.last().unwrap()["logits"].clone()
}

#[test]
fn a_model_that_is_revealed_and_imported_again_predicts_the_same_to_the_last_bit() {
    let seed = common::seed();
    let world = World::start(seed);
    world.run(async {
        let anna = world.connect("st-anna").await.unwrap();
        let bernd = world.connect("st-bernd").await.unwrap();
        for (part, rows) in [(Part::Train, 16), (Part::Test, 4)] {
            let (x, y) = (images(seed, rows), labels(seed, rows));
            let upload = common::upload("shapes", part, &x, Some(&y));
            anna.upload(upload, &mut |_| {}).await.unwrap();
        }
        let info = anna.dataset("shapes").await.unwrap();
        let train = common::train(&info, "trained");
        let trained = run(&world, "st-anna", &anna, train).await.unwrap();

        let reveal = |network: &str| JobKind::RevealModel {
            model: "trained".into(),
            network: network.into(),
            frac_bits: 16,
            ring_bits: 64,
        };
        let revealed = run(&world, "st-bernd", &bernd, reveal(NETWORK))
            .await
            .unwrap();
        assert_eq!(revealed.len(), 4);
        for (name, tensor) in &revealed {
            assert_eq!(tensor, &trained[name], "{name}");
        }
        let other = NETWORK.replace("units = 8", "units = 9");
        let err = run(&world, "st-anna", &anna, reveal(&other))
            .await
            .unwrap_err();
        assert!(err.to_string().contains("brings another one"), "{err}");

        import(&world, &anna, &revealed, "imported").await;
        let x = images(seed + 1, 5);
        let mut logits = Vec::new();
        for model in ["trained", "imported"] {
            let upload = common::upload("", Part::Predict, &x, None);
            let receipt = bernd.upload(upload, &mut |_| {}).await.unwrap();
            let kind = predict(model, 5, receipt.upload);
            logits.push(run(&world, "st-bernd", &bernd, kind).await.unwrap()["logits"].clone());
        }
        assert_eq!(logits[0], logits[1]);
        assert_eq!(logits[0], plain_logits(&revealed, &x));

        // An upload that is no model of this network is none.
        let upload = common::upload("", Part::Predict, &x, None);
        let receipt = anna.upload(upload, &mut |_| {}).await.unwrap();
        let kind = JobKind::ImportModel {
            network: NETWORK.into(),
            frac_bits: 16,
            ring_bits: 64,
            upload: receipt.upload,
            save_as: "wrong".into(),
            preparation: None,
        };
        let err = run(&world, "st-anna", &anna, kind).await.unwrap_err();
        assert!(err.to_string().contains("not the weights"), "{err}");

        let held = bernd.models().await.unwrap();
        let names: Vec<&str> = held.iter().map(|model| model.info.name.as_str()).collect();
        assert_eq!(names, ["imported", "trained"]);
        assert!(held.iter().all(|model| model.missing().is_empty()));
        let about = |at: usize| held[at].info.about.clone().unwrap();
        assert_eq!(about(0).dataset, None);
        assert_eq!(about(1).dataset, Some(("shapes".into(), info.snapshot)));
        let err = bernd.remove_model(&held[0].info).await.unwrap_err();
        assert!(err.to_string().contains("another member"), "{err}");
        anna.remove_model(&held[0].info).await.unwrap();
        anna.remove_model(&held[0].info).await.unwrap();
        assert_eq!(anna.models().await.unwrap().len(), 1);
        anna.close().await;
        bernd.close().await;
    });
    for party in PartyId::ALL {
        let log = std::fs::read_to_string(world.home(party).join(AUDIT_FILE)).unwrap();
        assert_eq!(log.matches("\"what\":\"model_removed\"").count(), 1);
    }
}

fn spec(world: &World, members: &[&str]) -> ServeSpec {
    let pins = members.iter().map(|who| *world.member(who).1.as_bytes());
    let mut members: Vec<[u8; 32]> = pins.collect();
    members.sort_unstable();
    ServeSpec {
        model: "model".into(),
        network: NETWORK.into(),
        frac_bits: 16,
        ring_bits: 64,
        members,
        output: PredictOutput::Logits,
        max_batch: 4,
        max_wait_ms: 20,
        max_pending: 64,
        rows_per_day: 0,
        duration_s: 60,
    }
}

fn serve_job(world: &World, spec: ServeSpec) -> JobDescription {
    let kind = JobKind::Serve(spec);
    JobDescription::new("serve", world.member("st-anna").1, kind).unwrap()
}

/// Submits a serving job of anna's and waits until it serves; `model` has weights made here.
async fn serving(world: &World, anna: &Remote, spec: ServeSpec) -> (JobId, Weights) {
    let weights = weights::initial(&network(), 5, 16);
    import(world, anna, &weights, "model").await;
    let id = anna.submit(serve_job(world, spec)).await.unwrap();
    serves(anna, id).await;
    (id, weights)
}

async fn serves(remote: &Remote, id: JobId) {
    let waiting = async {
        while remote.servings().await.unwrap().iter().all(|s| s.job != id) {
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
    };
    let waited = tokio::time::timeout(Duration::from_secs(30), waiting).await;
    waited.expect("the session serves");
}

/// Sends a request to one party alone.
async fn partial(remote: &Remote, party: PartyId, id: JobId, request: u8, rows: u32) -> MsgStream {
    let link = remote.links()[party.index()].clone();
    let mut stream = link.open(StreamKind::Control, [0; 32]).await.unwrap();
    let ask = Ask::Served(ServedRequest {
        job: id,
        request: [request; 16],
        rows,
    });
    let version = CONTROL_VERSION;
    stream.send(&Request { version, ask }).await.unwrap();
    let words = Words(vec![0; 16 * rows as usize]);
    let images = ServedImages(Share::Full(words));
    stream.send(&images).await.unwrap();
    stream
}

async fn refusal(mut stream: MsgStream) -> String {
    match stream.recv::<Answer>(1 << 20).await.unwrap() {
        Some(Answer::Refused(reason)) => reason,
        other => panic!("{other:?}"),
    }
}

#[test]
fn interleaved_requests_of_members_each_get_their_own_rows_as_a_plain_run_has_them() {
    let seed = common::seed();
    let world = World::start(seed);
    let total = world.run(async {
        let anna = world.connect("st-anna").await.unwrap();
        let bernd = world.connect("st-bernd").await.unwrap();
        let spec = spec(&world, &["st-anna", "st-bernd"]);
        let (id, weights) = serving(&world, &anna, spec.clone()).await;
        let asking = async |remote: &Remote, mine: u64| {
            let mut rows = 0;
            for round in 0..6 {
                let sizes = [1, 2, 4, 3];
                let own = sizes[(mine + round) as usize % sizes.len()];
                let x = images(seed + 100 * mine + round, own);
                let found = remote.served(id, &x).await.unwrap();
                assert_eq!(found, plain_logits(&weights, &x), "member {mine}, {round}");
                rows += own;
            }
            rows
        };
        let killed = async {
            // A member whose process dies with a request under way disturbs nobody.
            let dying = world.connect("st-bernd").await.unwrap();
            let x = images(seed, 4);
            for _ in 0..3 {
                let asked = dying.served(id, &x);
                let _ = tokio::time::timeout(Duration::from_millis(3), asked).await;
            }
            drop(dying);
        };
        let a = asking(&anna, 1);
        let b = asking(&bernd, 2);
        let c = asking(&bernd, 3);
        let (a, b, c, ()) = tokio::join!(a, b, c, killed);

        // A session serves beside a job of another kind.
        let x = images(seed, 3);
        let upload = common::upload("", Part::Predict, &x, None);
        let receipt = bernd.upload(upload, &mut |_| {}).await.unwrap();
        let kind = predict("model", 3, receipt.upload);
        let by_job = run(&world, "st-bernd", &bernd, kind).await.unwrap();
        assert_eq!(by_job["logits"], bernd.served(id, &x).await.unwrap());

        // A second session has to wait, and says for what.
        let second = anna.submit(serve_job(&world, spec)).await.unwrap();
        let mut said = String::new();
        let hearing = async {
            let mut hear = |event| {
                if let Event::Waits { reason, .. } = event {
                    said = reason;
                }
            };
            anna.watch(second, &mut hear).await
        };
        let withdrawing = async {
            tokio::time::sleep(Duration::from_millis(300)).await;
            anna.withdraw(second).await.unwrap();
        };
        let (watched, ()) = tokio::join!(hearing, withdrawing);
        assert!(watched.is_err());
        assert!(said.contains("waits: P0 serves model until 20"), "{said}");

        // Its requester alone ends it; the job is done then, and nobody is served any more.
        assert!(bernd.stop_serving(id).await.is_err());
        anna.stop_serving(id).await.unwrap();
        let result = anna.watch(id, &mut |_| {}).await.unwrap();
        assert!(result.outputs.is_empty(), "they went to the members");
        let err = bernd.served(id, &x).await.unwrap_err();
        assert!(err.to_string().contains("serves st-bernd nothing"), "{err}");
        anna.close().await;
        bernd.close().await;
        a + b + c + 3
    });
    // The log says who got how many, and everybody's answers are in it.
    for party in PartyId::ALL {
        let path = world.home(party).join(AUDIT_FILE);
        audit::verify(&path, &mut |_| {}).unwrap();
        let log = std::fs::read_to_string(path).unwrap();
        let batches = log.lines().filter(|line| line.contains("\"requests\""));
        let rows: u64 = batches
            .flat_map(|line| {
                let entry: serde_json::Value = serde_json::from_str(line).unwrap();
                let requests = entry["details"]["requests"].as_array().cloned();
                requests.unwrap_or_default()
            })
            .map(|request| {
                assert!(["st-anna", "st-bernd"].contains(&request["who"].as_str().unwrap()));
                request["rows"].as_u64().unwrap()
            })
            .sum();
        assert!(
            (total as u64..=total as u64 + 12).contains(&rows),
            "{rows} of {total}"
        );
    }
}

#[test]
fn who_may_not_ask_or_asks_too_much_is_refused_and_nobody_else_waits_for_it() {
    let seed = common::seed();
    let world = World::start(seed);
    world.run(async {
        let anna = world.connect("st-anna").await.unwrap();
        let bernd = world.connect("st-bernd").await.unwrap();
        let mut spec = spec(&world, &["st-anna", "st-bernd"]);
        spec.max_pending = 2;
        spec.rows_per_day = 8;
        let (id, weights) = serving(&world, &anna, spec).await;
        let analyst = world.connect("analyst").await.unwrap();
        let x = images(seed, 1);
        let err = analyst.served(id, &x).await.unwrap_err();
        assert!(err.to_string().contains("serves analyst nothing"), "{err}");
        assert!(analyst.servings().await.unwrap().is_empty());
        let err = anna.served(id, &images(seed, 5)).await.unwrap_err();
        assert!(err.to_string().contains("1 to 4 are possible"), "{err}");

        // Two parties have a request, the third has not: it alone is given up, in bounded time.
        let lacking = partial(&anna, PartyId::P0, id, 7, 1).await;
        let lacking_too = partial(&anna, PartyId::P1, id, 7, 1).await;
        let served = bernd.served(id, &x).await.unwrap();
        assert_eq!(served, plain_logits(&weights, &x));
        // P0's desk has two places: one is taken by what is never complete.
        let second = partial(&anna, PartyId::P0, id, 8, 1).await;
        let busy = async {
            loop {
                match bernd.served(id, &x).await {
                    Err(RemoteError::Busy { party, .. }) => return party,
                    Ok(_) => tokio::time::sleep(Duration::from_millis(5)).await,
                    Err(err) => panic!("{err}"),
                }
            }
        };
        let busy = tokio::time::timeout(Duration::from_secs(4), busy).await;
        assert_eq!(busy.expect("a full desk is busy"), PartyId::P0);
        for stream in [lacking, lacking_too] {
            let reason = refusal(stream).await;
            assert!(reason.contains("P2 has not received"), "{reason}");
        }
        let reason = refusal(second).await;
        assert!(reason.contains("P1 and P2 has not received"), "{reason}");

        // What parties are told differently is given up at once.
        let mut differing = Vec::new();
        for (party, rows) in [(PartyId::P0, 1), (PartyId::P1, 1), (PartyId::P2, 2)] {
            differing.push(partial(&anna, party, id, 9, rows).await);
        }
        for stream in differing {
            let reason = refusal(stream).await;
            assert!(reason.contains("1, 1 and 2 images"), "{reason}");
        }

        // The one party that is given a full share sees that it is too short.
        let narrow = Tensor::new(vec![1, 15], vec![0; 15]);
        let err = anna.served(id, &narrow).await.unwrap_err();
        assert!(err.to_string().contains("have 16 values"), "{err}");

        // Eight images of a member a day: what was asked for counts, also where it was given up.
        let limit = async {
            loop {
                match bernd.served(id, &x).await {
                    Err(RemoteError::Busy { .. }) => {
                        tokio::time::sleep(Duration::from_millis(5)).await;
                    }
                    Err(err) => return err.to_string(),
                    Ok(_) => {}
                }
            }
        };
        let limit = limit.await;
        assert!(
            limit.contains("gives st-bernd 8 predictions a day"),
            "{limit}"
        );
        anna.stop_serving(id).await.unwrap();
        anna.watch(id, &mut |_| {}).await.unwrap();
        for remote in [anna, bernd, analyst] {
            remote.close().await;
        }
    });
}

#[test]
fn a_lost_node_ends_serving_with_an_error_to_those_who_wait() {
    let seed = common::seed();
    let mut world = World::start(seed);
    let runtime = world.runtime();
    let (anna, id) = world.run(async {
        let anna = world.connect("st-anna").await.unwrap();
        let (id, _) = serving(&world, &anna, spec(&world, &["st-anna"])).await;
        (anna, id)
    });
    runtime.block_on(async {
        let waiting = partial(&anna, PartyId::P0, id, 1, 1).await;
        let lost = world.parties[2].take().unwrap();
        tokio::task::spawn_blocking(move || lost.vanish())
            .await
            .unwrap();
        let reason = tokio::time::timeout(Duration::from_secs(30), refusal(waiting)).await;
        let reason = reason.expect("an answer in bounded time");
        assert!(
            reason.contains("has ended") && reason.contains("P2"),
            "{reason}"
        );
        let gone = async {
            while !serves_nobody(&anna).await {
                tokio::time::sleep(Duration::from_millis(50)).await;
            }
        };
        let ended = tokio::time::timeout(Duration::from_secs(30), gone).await;
        ended.expect("the session ends");
    });
}

/// Whether P0 runs no session any more that serves anna.
async fn serves_nobody(anna: &Remote) -> bool {
    let link = anna.links()[0].clone();
    let mut stream = link.open(StreamKind::Control, [0; 32]).await.unwrap();
    let version = CONTROL_VERSION;
    let ask = Ask::Servings;
    stream.send(&Request { version, ask }).await.unwrap();
    match stream.recv::<Answer>(1 << 20).await.unwrap() {
        Some(Answer::Servings(list)) => list.is_empty(),
        other => panic!("{other:?}"),
    }
}

#[test]
fn a_policy_decides_on_opening_importing_and_serving_like_on_any_job() {
    let refuse_logits = || {
        let mut rule = Rule::new("no-logits", Verdict::Refuse);
        rule.kinds = Some(vec![Kind::Serve]);
        rule.outputs = Some(vec![Output::Logits]);
        let mut open = Rule::new("no-opening", Verdict::Refuse);
        open.kinds = Some(vec![Kind::Reveal]);
        let mut ask = Rule::new("imports-by-hand", Verdict::Ask);
        ask.kinds = Some(vec![Kind::Import]);
        let mut own = Rule::new("anna", Verdict::Allow);
        own.requesters = Some(vec!["st-anna".into()]);
        with_rules(vec![rule, open, ask, own])
    };
    let policies: [Policy; 3] = [allow_all(), refuse_logits(), allow_all()];
    let world = World::with_policies(policies);
    world.run(async {
        let anna = world.connect("st-anna").await.unwrap();
        let submit = async |spec: ServeSpec| anna.submit(serve_job(&world, spec)).await;
        let logits = spec(&world, &["st-anna"]);
        let err = submit(logits.clone()).await.unwrap_err().to_string();
        assert!(err.contains("no-logits") && err.contains("P1"), "{err}");
        let class = |members: &[&str]| ServeSpec {
            output: PredictOutput::Class,
            ..spec(&world, members)
        };
        // Anna may ask; a session also for others, who may ask for nothing, is refused.
        let err = submit(class(&["st-anna", "analyst"])).await.unwrap_err();
        assert!(
            err.to_string().contains("analyst may not start jobs"),
            "{err}"
        );
        // The rule that allows anna alone does not fit a session for bernd too: P1 holds it.
        let held = async |id: JobId| {
            let mut held = Vec::new();
            let mut hear = |event| {
                if let Event::Held { party, .. } = event {
                    held.push(party);
                }
            };
            let watching = anna.watch(id, &mut hear);
            let _ = tokio::time::timeout(Duration::from_millis(800), watching).await;
            anna.withdraw(id).await.unwrap();
            held
        };
        let id = submit(class(&["st-anna", "st-bernd"])).await.unwrap();
        assert_eq!(held(id).await, [PartyId::P1]);
        let job = |kind| JobDescription::new("job", world.member("st-anna").1, kind).unwrap();
        let reveal = JobKind::RevealModel {
            model: "model".into(),
            network: NETWORK.into(),
            frac_bits: 16,
            ring_bits: 64,
        };
        let err = anna.submit(job(reveal)).await.unwrap_err().to_string();
        assert!(
            err.contains("no-opening") && err.contains("reveals weights"),
            "{err}"
        );
        let import = JobKind::ImportModel {
            network: NETWORK.into(),
            frac_bits: 16,
            ring_bits: 64,
            upload: "upload".into(),
            save_as: "model".into(),
            preparation: None,
        };
        let id = anna.submit(job(import)).await.unwrap();
        assert_eq!(held(id).await, [PartyId::P1]);
        anna.close().await;
    });
}
