//! The streams of a serving session: P0 composes batches and tells the others; P1 and P2 tell P0
//! what their members have brought.

use std::sync::Arc;
use std::time::{Duration, Instant};

use tokio::sync::mpsc;
use trefoil_consortium::wire::{
    CONTROL_MAX_BYTES, RequestKey, ServeBatch, ServeNote, ServeWord, clip_reason, serve_stream,
};
use trefoil_protocol::party::{PartyId, Peer};
use trefoil_transport::{AbortHandle, MsgReceiver, MsgSender, MsgStream, StreamKind};

use super::desk::{Happening, Order, ServeDesk};
use super::ledger::Ledger;
use super::seat::Seat;
use crate::daemon::Party;
use crate::session::Links;

/// Ends the tasks of a serving session with the session, and its desk: whatever ended the session,
/// nobody waits for it any more.
pub(crate) struct Tasks {
    _running: tokio::task::JoinSet<()>,
    desk: Arc<ServeDesk>,
    abort: AbortHandle,
}

impl Drop for Tasks {
    fn drop(&mut self) {
        let model = &self.desk.spec.model;
        let why = match self.abort.failure() {
            Some(failure) => format!("serving of {model} has ended: {failure}"),
            None => format!("serving of {model} has ended"),
        };
        self.desk.close(&clip_reason(&why));
    }
}

/// Starts what a serving session needs beside its protocol thread.
pub(crate) fn lead(party: &Arc<Party>, seat: &Seat, links: Links, abort: AbortHandle) -> Tasks {
    let mut tasks = tokio::task::JoinSet::new();
    let (desk, failing) = (seat.desk.clone(), abort.clone());
    tasks.spawn(async move {
        let failure = failing.failed().await;
        desk.close(&clip_reason(&format!("serving has ended: {failure}")));
    });
    if party.me == PartyId::P0 {
        let (party, desk, abort) = (party.clone(), seat.desk.clone(), abort.clone());
        tasks.spawn(async move {
            if let Err(reason) = compose_all(&party, &desk, &links).await {
                abort.abort(&reason);
            }
        });
    }
    Tasks {
        _running: tasks,
        desk: seat.desk.clone(),
        abort,
    }
}

/// P0's ends of the three streams.
struct Others {
    wait: Duration,
    parties: [(Peer, MsgSender); 2],
    dealer: MsgSender,
}

impl Others {
    async fn say(&mut self, word: &ServeWord, to_dealer: Option<&ServeWord>) -> Result<(), String> {
        // The dealer has the most to do before it is waited for.
        if let Some(word) = to_dealer {
            send(&mut self.dealer, Peer::Dealer, word, self.wait).await?;
        }
        for (peer, sender) in &mut self.parties {
            send(sender, *peer, word, self.wait).await?;
        }
        Ok(())
    }
}

async fn send<T: serde::Serialize>(
    sender: &mut MsgSender,
    peer: Peer,
    word: &T,
    wait: Duration,
) -> Result<(), String> {
    match tokio::time::timeout(wait, sender.send(word)).await {
        Ok(sent) => sent.map_err(|err| format!("{peer}: {err}")),
        Err(_) => Err(format!("{peer} takes no words of the serving session")),
    }
}

/// What P1 and P2 say, and which of them has stopped saying anything.
type Note = Result<(PartyId, RequestKey, u32), String>;

async fn hear(party: PartyId, mut stream: MsgReceiver, notes: mpsc::UnboundedSender<Note>) {
    loop {
        let note = match stream.recv::<ServeNote>(CONTROL_MAX_BYTES).await {
            Ok(Some(ServeNote { key, rows })) => Ok((party, key, rows)),
            Ok(None) => Err(format!("{party} has left the serving session")),
            Err(err) => Err(format!("{party}: {err}")),
        };
        let over = note.is_err();
        if notes.send(note).is_err() || over {
            return;
        }
    }
}

/// P0: composes batches until the time is over or the requester ends it.
async fn compose_all(
    party: &Arc<Party>,
    desk: &Arc<ServeDesk>,
    links: &Links,
) -> Result<(), String> {
    let open = async |peer: Peer| {
        let link = links.of(peer);
        let opening = link.open(StreamKind::Control, serve_stream(&desk.session));
        match tokio::time::timeout(party.wait(), opening).await {
            Ok(opened) => opened.map_err(|err| format!("{peer}: {err}")),
            Err(_) => Err(format!("{peer} takes no streams")),
        }
    };
    let (noted, mut notes) = mpsc::unbounded_channel();
    let mut hearing = tokio::task::JoinSet::new();
    let mut parties = Vec::new();
    for other in party.me.others() {
        let (sender, receiver) = open(Peer::Party(other)).await?.split();
        hearing.spawn(hear(other, receiver, noted.clone()));
        parties.push((Peer::Party(other), sender));
    }
    let (dealer, _silent) = open(Peer::Dealer).await?.split();
    let parties = <[_; 2]>::try_from(parties).map_err(|_| "P0 has two peers".to_owned())?;
    let mut others = Others {
        wait: party.wait(),
        parties,
        dealer,
    };
    let mut happenings = desk
        .happenings()
        .ok_or("somebody leads this session already")?;
    let mut ledger = Ledger::new(
        desk.spec.max_batch,
        Duration::from_millis(desk.spec.max_wait_ms),
    );
    // So that the streams are there before anybody asks.
    let nothing = ServeWord::Drop(Vec::new(), String::new());
    others.say(&nothing, Some(&nothing)).await?;
    tracing::info!(model = %desk.spec.model, seconds = desk.spec.duration_s, "serving");
    let end = Instant::now() + Duration::from_secs(desk.spec.duration_s);
    loop {
        let wake = ledger.wake_at().map_or(end, |at| at.min(end));
        let mut given_up = Vec::new();
        tokio::select! {
            happening = happenings.recv() => match happening {
                Some(Happening::Holds(key, rows)) => {
                    let why = ledger.holds(party.me, key, rows, Instant::now());
                    given_up.extend(why.map(|why| (vec![key], why)));
                }
                Some(Happening::Gone(key)) => {
                    if ledger.gone(&key) {
                        given_up.push((vec![key], "its member has left".into()));
                    }
                }
                Some(Happening::Done) => ledger.done(),
                None => return Err("P0 has closed the serving session".into()),
            },
            note = notes.recv() => {
                let note = note.unwrap_or_else(|| Err("P1 and P2 have left the session".into()));
                let (from, key, rows) = note?;
                if rows == 0 {
                    if ledger.gone(&key) {
                        given_up.push((vec![key], format!("its member has left {from}")));
                    }
                } else {
                    let why = ledger.holds(from, key, rows, Instant::now());
                    given_up.extend(why.map(|why| (vec![key], why)));
                }
            }
            () = tokio::time::sleep_until(wake.into()) => {}
            () = desk.stop.notified() => break,
        }
        let now = Instant::now();
        if now >= end {
            break;
        }
        given_up.extend(ledger.expired(now));
        for (keys, reason) in given_up {
            tracing::info!(%reason, "a request is given up");
            desk.drop_requests(&keys, &reason);
            others.say(&ServeWord::Drop(keys, reason), None).await?;
        }
        if let Some(batch) = ledger.compose(now) {
            let to_dealer = ServeWord::Batch(ServeBatch {
                requests: Vec::new(),
                ..batch.clone()
            });
            let word = ServeWord::Batch(batch.clone());
            others.say(&word, Some(&to_dealer)).await?;
            desk.order(Order::Batch(batch));
        }
    }
    others.say(&ServeWord::End, Some(&ServeWord::End)).await?;
    let Others {
        parties: [(_, p1), (_, p2)],
        dealer,
        ..
    } = others;
    // All must have heard it before this party's part ends, which ends its streams.
    let heard = async { tokio::try_join!(p1.finish(), p2.finish(), dealer.finish()) };
    match tokio::time::timeout(party.wait(), heard).await {
        Ok(heard) => heard.map_err(|err| format!("the end of serving was not heard: {err}"))?,
        Err(_) => return Err("the end of serving was not heard by all nodes".into()),
    };
    desk.order(Order::End);
    tracing::info!(model = %desk.spec.model, "serving is over");
    Ok(())
}

impl ServeDesk {
    /// P1 and P2: does what P0 says on its stream, and tells it what lies here.
    pub(crate) async fn follow(
        &self,
        party: &Party,
        peer: Peer,
        stream: MsgStream,
    ) -> Result<(), String> {
        if peer != Peer::Party(PartyId::P0) {
            return Err("only P0 leads a serving session".into());
        }
        let (mut sender, mut receiver) = stream.split();
        let mut happenings = self
            .happenings()
            .ok_or("P0 has opened two streams for one serving session")?;
        let telling = async {
            while let Some(happening) = happenings.recv().await {
                let (key, rows) = match happening {
                    Happening::Holds(key, rows) => (key, rows),
                    Happening::Gone(key) => (key, 0),
                    Happening::Done => continue,
                };
                let note = ServeNote { key, rows };
                send(&mut sender, peer, &note, party.wait()).await?;
            }
            Ok(())
        };
        let hearing = async {
            loop {
                match receiver.recv::<ServeWord>(CONTROL_MAX_BYTES).await {
                    Ok(Some(ServeWord::Batch(batch))) => self.order(Order::Batch(batch)),
                    Ok(Some(ServeWord::Drop(keys, reason))) => {
                        self.drop_requests(&keys, &clip_reason(&reason));
                    }
                    Ok(Some(ServeWord::End)) => {
                        self.order(Order::End);
                        return Ok(());
                    }
                    Ok(None) => return Err("P0 has ended its stream".to_owned()),
                    Err(err) => return Err(format!("P0: {err}")),
                }
            }
        };
        let done: Result<(), String> = tokio::select! {
            told = telling => told,
            heard = hearing => heard,
        };
        if let Err(reason) = &done {
            self.close(&clip_reason(&format!("serving has ended: {reason}")));
        }
        done
    }
}
