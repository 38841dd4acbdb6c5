//! A serving session as the dealer sees it: P0 says which program comes next. Dealt on the word, not
//! ahead of it: which size comes next is not known, and dealing one image's material takes less
//! time than a round.

use std::sync::mpsc::{Receiver, Sender, channel};
use std::sync::{Mutex, MutexGuard, PoisonError};

use trefoil_consortium::SessionId;
use trefoil_consortium::wire::{CONTROL_MAX_BYTES, ServeBatch, ServeWord, serve_stream};
use trefoil_models::ServeSpec;
use trefoil_transport::MsgStream;

/// Where a serving session stands at the dealer, if one runs.
#[derive(Default)]
pub(crate) struct ServingPlace {
    /// One serving session at a time.
    pub(crate) slot: tokio::sync::Mutex<()>,
    /// The name of its stream, and where its words go.
    words: Mutex<Option<([u8; 32], Sender<ServeWord>)>>,
}

/// What the dealer's thread deals.
pub(crate) struct Orders {
    spec: ServeSpec,
    words: Receiver<ServeWord>,
}

impl Orders {
    /// The programs of the batches, until P0 says that serving is over.
    pub(crate) fn batches(&self) -> impl Iterator<Item = Result<usize, String>> {
        let mut next = 0;
        std::iter::from_fn(move || {
            loop {
                return match self.words.recv() {
                    Ok(ServeWord::Batch(batch)) => Some(self.program(&batch, &mut next)),
                    Ok(ServeWord::Drop(..)) => continue,
                    Ok(ServeWord::End) => None,
                    Err(_) => Some(Err("P0 has left the serving session".into())),
                };
            }
        })
    }

    fn program(&self, batch: &ServeBatch, next: &mut u64) -> Result<usize, String> {
        let found = self.spec.program(batch.rows as usize);
        match found.filter(|_| batch.number == *next) {
            Some((program, _)) => {
                *next += 1;
                Ok(program)
            }
            None => Err(format!(
                "P0 ordered batch {} of {} images where number {next} of at most {} belongs",
                batch.number, batch.rows, self.spec.max_batch
            )),
        }
    }
}

impl ServingPlace {
    fn lock(&self) -> MutexGuard<'_, Option<([u8; 32], Sender<ServeWord>)>> {
        self.words.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// From now on P0's words about this session are taken.
    pub(crate) fn open(&self, session: &SessionId, spec: ServeSpec) -> Orders {
        let (sender, words) = channel();
        *self.lock() = Some((serve_stream(session), sender));
        Orders { spec, words }
    }

    /// The session is over: its thread hears no more.
    pub(crate) fn close(&self, session: &SessionId) {
        self.end(&serve_stream(session));
    }

    /// Whether a stream of this name is the session's.
    pub(crate) fn expects(&self, name: &[u8; 32]) -> bool {
        self.lock().as_ref().is_some_and(|(held, _)| held == name)
    }

    /// Passes P0's words on the stream of this name on until they end. A stream of an earlier session
    /// says nothing to a later one.
    pub(crate) async fn follow(&self, name: [u8; 32], mut stream: MsgStream) -> Result<(), String> {
        let ended = loop {
            let word = match stream.recv::<ServeWord>(CONTROL_MAX_BYTES).await {
                Ok(Some(word)) => word,
                Ok(None) => break Ok(()),
                Err(err) => break Err(format!("P0: {err}")),
            };
            self.pass(&name, word);
        };
        self.end(&name);
        ended
    }

    /// Passes a word on to the session of this stream, if it runs.
    fn pass(&self, name: &[u8; 32], word: ServeWord) {
        if let Some((_, sender)) = self.lock().as_ref().filter(|(held, _)| held == name) {
            // An error means that the thread has ended.
            let _ = sender.send(word);
        }
    }

    /// The session of this stream hears no more.
    fn end(&self, name: &[u8; 32]) {
        self.lock().take_if(|(held, _)| held == name);
    }
}

#[cfg(test)]
mod tests {
    use trefoil_models::PredictOutput;

    use super::*;

    fn spec() -> ServeSpec {
        ServeSpec {
            model: "m".into(),
            network: String::new(),
            frac_bits: 16,
            ring_bits: 64,
            members: vec![[1; 32]],
            output: PredictOutput::Class,
            max_batch: 8,
            max_wait_ms: 1,
            max_pending: 1,
            rows_per_day: 0,
            duration_s: 60,
        }
    }

    fn batch(number: u64, rows: u32) -> ServeWord {
        ServeWord::Batch(ServeBatch {
            number,
            rows,
            requests: Vec::new(),
        })
    }

    #[test]
    fn the_stream_of_an_earlier_session_says_nothing_to_a_later_one_and_does_not_end_it() {
        let place = ServingPlace::default();
        let (old, new) = ([7; 32], [8; 32]);
        drop(place.open(&old, spec()));
        let orders = place.open(&new, spec());
        place.pass(&serve_stream(&old), ServeWord::End);
        place.end(&serve_stream(&old));
        place.close(&old);
        assert!(place.expects(&serve_stream(&new)));
        place.pass(&serve_stream(&new), batch(0, 1));
        place.pass(&serve_stream(&new), ServeWord::End);
        assert_eq!(orders.batches().collect::<Vec<_>>(), [Ok(1)]);
        place.end(&serve_stream(&new));
        assert!(!place.expects(&serve_stream(&new)));
    }

    #[test]
    fn batches_are_dealt_in_order_and_the_end_is_not_a_loss() {
        let place = ServingPlace::default();
        let say = |words: Vec<ServeWord>| {
            let orders = place.open(&[7; 32], spec());
            let sender = place.lock().take().unwrap().1;
            words
                .into_iter()
                .for_each(|word| sender.send(word).unwrap());
            drop(sender);
            orders.batches().take(4).collect::<Vec<_>>()
        };
        let good = say(vec![batch(0, 1), batch(1, 5), ServeWord::End]);
        assert_eq!(good, [Ok(1), Ok(3)]);
        let lost = say(vec![batch(0, 1)]);
        assert!(lost[1].as_ref().unwrap_err().contains("P0 has left"));
        for wrong in [batch(1, 1), batch(0, 9)] {
            assert!(say(vec![wrong])[0].is_err());
        }
    }
}
