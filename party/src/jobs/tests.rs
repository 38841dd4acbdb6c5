//! Which jobs come in, which is next, and how they end.

use trefoil_models::JobKind;
use trefoil_models::job::{DatasetRef, TrainSpec};

use super::book::WAITING_PER_REQUESTER_MAX;
use super::*;
use crate::policy::Ruling;

const NOW_S: u64 = 1_000_000;
const TIMEOUT_S: u64 = 600;

fn description(requester: u8) -> JobDescription {
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
    JobDescription::new("job", Pin::from_bytes([requester; 32]), kind).unwrap()
}

fn submit(jobs: &Jobs, requester: u8, ask: bool, now_s: u64) -> Result<Arc<Job>, String> {
    let rule = "test".into();
    let job = jobs.submit(
        description(requester),
        "st-anna",
        &Ruling { ask, rule },
        now_s,
    )?;
    job.noted();
    Ok(job)
}

#[test]
fn a_requester_has_few_waiting_jobs_and_the_others_still_get_in() {
    let jobs = Jobs::default();
    for at in 0..WAITING_PER_REQUESTER_MAX {
        submit(&jobs, 1, at % 2 == 0, NOW_S).unwrap();
    }
    let err = submit(&jobs, 1, false, NOW_S).unwrap_err();
    assert!(err.contains("of this requester"), "{err}");
    submit(&jobs, 2, false, NOW_S).unwrap();
}

#[test]
fn a_job_that_nobody_starts_is_given_up_but_not_while_another_runs() {
    let jobs = Jobs::default();
    let old = submit(&jobs, 1, false, NOW_S).unwrap();
    let held = submit(&jobs, 1, true, NOW_S + 1).unwrap();
    let running = submit(&jobs, 2, false, NOW_S).unwrap();
    assert!(running.begin(NOW_S));
    let ids = |now_s: u64| -> Vec<JobId> {
        jobs.expired(now_s, TIMEOUT_S)
            .iter()
            .map(|job| job.id)
            .collect()
    };
    assert_eq!(ids(NOW_S + TIMEOUT_S + 1), []);
    let late = NOW_S + TIMEOUT_S + 2;
    assert_eq!(ids(late), [held.id], "a held job waits for a person alone");
    running.fail("over");
    let now_s = running.record().since_s;
    assert!(
        !ids(now_s + TIMEOUT_S).contains(&old.id),
        "its turn has just come"
    );
    assert!(ids(now_s + TIMEOUT_S + 1).contains(&old.id));
}

#[test]
fn p0_leads_jobs_in_order_and_never_a_held_one() {
    let jobs = Jobs::default();
    let held = submit(&jobs, 1, true, NOW_S).unwrap();
    let second = submit(&jobs, 1, false, NOW_S).unwrap();
    let now = Instant::now();
    let led = |jobs: &Jobs, at| match jobs.due(at) {
        Due::Now(job) => Some(job.id),
        _ => None,
    };
    assert_eq!(led(&jobs, now), Some(second.id));
    let later = now + Duration::from_secs(2);
    assert!(second.ask_again(later, "waiting for P1"));
    assert!(!second.ask_again(later, "waiting for P1"), "nothing new");
    assert!(matches!(jobs.due(now), Due::At(at) if at == later));
    assert_eq!(led(&jobs, later), Some(second.id));
    assert!(!held.begin(NOW_S));
    assert!(held.approve("operator", NOW_S) && !held.approve("operator", NOW_S));
    assert_eq!(led(&jobs, now), Some(held.id));
    assert!(held.begin(NOW_S) && second.end(JobState::Expired, "late"));
    assert!(matches!(jobs.due(later), Due::Nothing));
}

#[test]
fn an_interrupted_job_waits_again_and_what_is_revealed_anew_is_dropped() {
    let jobs = Jobs::default();
    let job = submit(&jobs, 1, false, NOW_S).unwrap();
    let output = |step, attempt| {
        let (name, shape) = ("logits".into(), vec![0]);
        let words = trefoil_consortium::Words(Vec::new());
        let share = trefoil_consortium::wire::WireOutput {
            name,
            shape,
            words,
            xor: false,
            opened: [0; 16],
        };
        Event::Output {
            step,
            attempt,
            share,
        }
    };
    let outputs = || -> Vec<(u64, u32)> {
        let (events, _) = job.heard(0);
        let outputs = events.iter().filter_map(|(_, event)| match &**event {
            Event::Output { step, attempt, .. } => Some((*step, *attempt)),
            _ => None,
        });
        outputs.collect()
    };
    assert!(job.begin(NOW_S) && job.paused().is_none());
    job.attempted(&Attempt::default());
    for step in [2, 5] {
        job.say(output(step, 0));
        job.stepped(step + 1);
    }
    job.pause("P2 is gone", NOW_S).unwrap();
    assert!(job.paused().is_some() && job.attempts() == 1);
    assert!(jobs.withdraw(&job).is_err(), "it has run");
    assert!(job.begin(NOW_S), "it may run again");
    let resume = Some(Mark::of(&[1; 32], 4));
    job.attempted(&Attempt { number: 1, resume });
    assert_eq!(outputs(), [(2, 0)]);
    job.say(output(5, 1));
    assert_eq!(outputs(), [(2, 0), (5, 1)]);
    // Sessions that end again and again before anything new is done are not tried for ever.
    assert!(job.same_coins(Some([1; 32])) && job.same_coins(Some([1; 32])));
    assert!(!job.same_coins(Some([2; 32])) && !job.same_coins(None));
    for _ in 1..STALLED_MAX {
        job.pause("P2 is gone", NOW_S).unwrap();
        assert!(job.begin(NOW_S));
        job.attempted(&Attempt { number: 1, resume });
        job.stepped(6);
    }
    let err = job.pause("P2 is gone", NOW_S).unwrap_err();
    assert!(err.contains("P2 is gone; the last"), "{err}");
    job.stepped(7);
    job.pause("P2 is gone", NOW_S).unwrap();
    assert!(job.begin(NOW_S));
    job.cancel("enough");
    assert_eq!(job.pause("P2 is gone", NOW_S), Err("enough".into()));
}

#[test]
fn an_interrupted_job_is_given_up_beside_a_serving_session_and_not_beside_another() {
    let jobs = Jobs::default();
    let job = submit(&jobs, 1, false, NOW_S).unwrap();
    assert!(job.begin(NOW_S));
    job.pause("P2 is gone", NOW_S).unwrap();
    let given_up = |wait| -> Vec<JobId> {
        let given_up = jobs.given_up(wait);
        given_up.iter().map(|job| job.id).collect()
    };
    // Until the clock has moved on at all.
    let passed = || while job.paused().unwrap().elapsed().is_zero() {};
    let other = submit(&jobs, 2, false, NOW_S).unwrap();
    assert!(other.begin(NOW_S));
    passed();
    let since = job.paused().unwrap();
    assert_eq!(given_up(Duration::ZERO), []);
    assert!(job.paused().unwrap() > since, "the wait counts anew");
    other.fail("over");

    let serve = JobKind::Serve(trefoil_models::ServeSpec {
        model: "model@01234567".into(),
        network: String::new(),
        frac_bits: 16,
        ring_bits: 64,
        members: vec![[3; 32]],
        output: trefoil_models::PredictOutput::Class,
        max_batch: 4,
        max_wait_ms: 1,
        max_pending: 2,
        rows_per_day: 0,
        duration_s: 60,
    });
    let description = JobDescription::new("serve", Pin::from_bytes([3; 32]), serve).unwrap();
    let rule = "test".into();
    let ruling = Ruling { ask: false, rule };
    let serving = jobs.submit(description, "office", &ruling, NOW_S).unwrap();
    serving.noted();
    assert!(serving.begin(NOW_S));
    passed();
    assert_eq!(given_up(Duration::from_secs(3_600)), []);
    assert_eq!(given_up(Duration::ZERO), [job.id]);
    assert_eq!(serving.state(), JobState::Running);
}

/// A withdrawal that failed at its deletion has taken the rows out of the catalog: the next
/// attempt finds the jobs by what they read.
#[test]
fn a_running_job_is_found_by_the_uploads_that_it_reads() {
    let jobs = Jobs::default();
    let job = submit(&jobs, 1, false, NOW_S).unwrap();
    let [anna, bernd] = [1, 2].map(|byte| Pin::from_bytes([byte; 32]));
    job.note_reads(&[(anna, 2), (anna, 5), (bernd, 1)]);
    assert!(job.reads(anna, Withdrawal::One(5)) && job.reads(anna, Withdrawal::Below(3)));
    assert!(!job.reads(anna, Withdrawal::One(1)) && !job.reads(anna, Withdrawal::Below(2)));
    assert!(job.reads(bernd, Withdrawal::One(1)) && !job.reads(bernd, Withdrawal::One(5)));
}

#[test]
fn a_cancel_leaves_its_word_to_a_session_that_began_meanwhile_and_loses_to_an_end() {
    let jobs = Jobs::default();
    let job = submit(&jobs, 1, false, NOW_S).unwrap();
    // While the decision was written down.
    assert!(job.begin(NOW_S) && job.cancelled().is_none());
    assert!(job.end(JobState::Cancelled, "P1: enough"));
    assert_eq!(job.cancelled().as_deref(), Some("P1: enough"));
    assert_eq!(job.pause("P2 is gone", NOW_S), Err("P1: enough".into()));
    assert!(!job.begin(NOW_S));

    let over = submit(&jobs, 2, false, NOW_S).unwrap();
    assert!(over.begin(NOW_S));
    over.fail("P2: no disk");
    assert!(!over.end(JobState::Cancelled, "P1: enough"));
    let record = over.record();
    assert_eq!(
        (record.state, record.note.as_str()),
        (JobState::Failed, "P2: no disk")
    );
}

#[test]
fn a_cancelled_job_that_fails_counts_as_cancelled() {
    let jobs = Jobs::default();
    let job = submit(&jobs, 1, false, NOW_S).unwrap();
    assert!(job.begin(NOW_S));
    assert!(jobs.withdraw(&job).is_err(), "it runs");
    job.cancel("P1: enough");
    job.fail("P1: enough");
    assert_eq!(job.state(), JobState::Cancelled);
    assert!(!job.end(JobState::Failed, "late"));
    let (events, all) = job.heard(0);
    assert!(all && matches!(&*events[0].1, Event::Failed(reason) if reason == "P1: enough"));
}
