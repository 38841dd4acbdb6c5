//! Withdrawals: each party is asked by itself, so that one that is away does not keep the others from
//! deleting. What was asked may be asked again.

use std::time::{Duration, Instant};

use trefoil_consortium::ConsortiumFile;
use trefoil_consortium::wire::{
    Answer, Ask, CONTROL_MAX_BYTES, CONTROL_VERSION, Contribution, Request, Withdrawal,
};
use trefoil_protocol::party::PartyId;
use trefoil_transport::{Identity, Node, Settings, StreamKind, TransportError};

use super::{RemoteError, dial, own_ip, resolve, unexpected};

/// How long a party that is away is asked again.
const PATIENCE: Duration = Duration::from_secs(10);
const PAUSE: Duration = Duration::from_millis(500);

/// What the three parties answered.
pub type Answers<T> = [Result<T, RemoteError>; 3];

/// A hospital's connections for a withdrawal. Use it inside one tokio runtime.
#[derive(Debug)]
pub struct Withdrawer {
    node: Node,
    consortium: ConsortiumFile,
    settings: Settings,
}

impl Withdrawer {
    /// Makes the endpoint; nobody is asked yet.
    ///
    /// # Errors
    /// The endpoint cannot be made.
    pub async fn new(
        identity: &Identity,
        consortium: &ConsortiumFile,
        settings: &Settings,
    ) -> Result<Withdrawer, RemoteError> {
        let mut places = Vec::new();
        for party in PartyId::ALL {
            // One without an address is told of when it is asked.
            places.extend(resolve(party, consortium, None, settings).await);
        }
        let local = (own_ip(&places), 0).into();
        let node = Node::bind(identity, local, settings).map_err(RemoteError::Endpoint)?;
        Ok(Withdrawer {
            node,
            consortium: consortium.clone(),
            settings: settings.clone(),
        })
    }

    /// Says good-bye to the parties.
    pub async fn close(self) {
        self.node.close("the member has finished").await;
    }

    /// The lowest upload number of this hospital that is free, at each party.
    pub async fn next_numbers(&self, dataset: &str) -> Answers<u64> {
        let ask = |_| Ask::NextNumber(dataset.into());
        self.all(ask, |party, answer| match answer {
            Answer::NextNumber(next) => Ok(next),
            other => Err(unexpected(party, "the next upload number", other)),
        })
        .await
    }

    /// Withdraws at all three parties, at each what is said for it; what each still has of this
    /// hospital's contributions.
    pub async fn withdraw(
        &self,
        dataset: &str,
        uploads: [Withdrawal; 3],
    ) -> Answers<Vec<Contribution>> {
        let ask = |party: PartyId| Ask::WithdrawRows {
            dataset: dataset.into(),
            uploads: uploads[party.index()],
        };
        self.all(ask, |party, answer| match answer {
            Answer::RowsWithdrawn { left } => Ok(left),
            other => Err(unexpected(party, "the withdrawal", other)),
        })
        .await
    }

    async fn all<T>(
        &self,
        ask: impl Fn(PartyId) -> Ask,
        take: impl Fn(PartyId, Answer) -> Result<T, RemoteError>,
    ) -> Answers<T> {
        let take = &take;
        let [a, b, c] = PartyId::ALL.map(|party| (party, ask(party)));
        let [a, b, c] = [a, b, c].map(|(party, ask)| async move {
            let start = Instant::now();
            loop {
                match self.one(party, &ask).await {
                    Ok(answer) => return take(party, answer),
                    Err(err) if !err.may_pass() || start.elapsed() > PATIENCE => return Err(err),
                    Err(_) => tokio::time::sleep(PAUSE).await,
                }
            }
        });
        let (a, b, c) = tokio::join!(a, b, c);
        [a, b, c]
    }

    async fn one(&self, party: PartyId, ask: &Ask) -> Result<Answer, RemoteError> {
        let link = |source| RemoteError::Link { party, source };
        let place = resolve(party, &self.consortium, None, &self.settings).await?;
        let exchange = async {
            let wait = Duration::from_millis(self.settings.handshake_timeout_ms);
            let connection = dial(&self.node, party, &self.consortium, place, wait).await?;
            let opened = connection.open(StreamKind::Control, [0; 32]).await;
            let mut stream = opened.map_err(link)?;
            let request = Request {
                version: CONTROL_VERSION,
                ask: ask.clone(),
            };
            stream.send(&request).await.map_err(link)?;
            let answer = stream.recv::<Answer>(CONTROL_MAX_BYTES).await;
            let answer = answer.map_err(link)?;
            // The answer is here; how the stream ends does not matter any more.
            let _ = stream.finish().await;
            answer.ok_or_else(|| {
                link(TransportError::Closed {
                    addr: place,
                    reason: "it ended the stream instead of answering".into(),
                })
            })
        };
        let waited_ms = self.settings.round_timeout_ms;
        let answer = tokio::time::timeout(Duration::from_millis(waited_ms), exchange).await;
        match answer {
            Ok(Ok(Answer::Refused(reason))) => Err(RemoteError::Refused {
                party,
                what: "the withdrawal".into(),
                reason,
            }),
            Ok(answer) => answer,
            Err(_) => Err(RemoteError::Timeout {
                party,
                what: "a request".into(),
                waited_ms,
            }),
        }
    }
}
