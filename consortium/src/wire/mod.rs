//! The messages of the control plane. Every stream carries one exchange and starts with a version;
//! who speaks is known from the certificate, never from a message.
//!
//! Members talk to parties with [`Request`]; P0 proposes sessions to the other nodes with
//! [`Lead`] and hears [`Follow`]; keys travel on streams of their own, see [`SessionKey`].

mod reason;
mod session;

use std::fmt;

use serde::{Deserialize, Serialize};
use trefoil_models::{Preparation, ServeSpec};
use trefoil_protocol::party::{PartyId, Peer};
use trefoil_protocol::ring::Tensor;
use trefoil_protocol::run::OutputShare;
use trefoil_protocol::share::CompressedShare;
use trefoil_transport::Pin;

use crate::receipt::{Schema, SharingId, SignedReceipt, StagedReceipt, UploadId};
use crate::session::SessionId;
use crate::{JobDescription, JobId, Words};

pub use reason::{REASON_MAX_CHARS, attributed, clip_reason, reported, session_failure};
pub use session::{Acceptance, Follow, Holds, KeyReceived, Lead, Proposal, SessionKey};

/// Version of these messages.
pub const CONTROL_VERSION: u32 = 6;
/// Largest message between nodes and largest request: a job description and some more.
pub const CONTROL_MAX_BYTES: usize = 2 << 20;
/// Largest chunk of an upload: its shares and some more.
pub const CHUNK_MAX_BYTES: usize = crate::receipt::CHUNK_BYTES_MAX + (16 << 20);
/// Largest commit: three receipts for each chunk. Also bounds [`Answer::Ready`].
pub const COMMIT_MAX_BYTES: usize = 32 << 20;
/// Largest event to a watcher: a share of all weights of a large network.
pub const EVENT_MAX_BYTES: usize = 1 << 30;

/// Which rows an upload brings.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
pub enum Part {
    /// Training rows.
    Train,
    /// Test rows.
    Test,
    /// Images without labels, to be classified for their owner.
    Predict,
}

impl fmt::Display for Part {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Part::Train => "train",
            Part::Test => "test",
            Part::Predict => "predict",
        })
    }
}

/// The first message of a member's stream to a party.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Request {
    /// [`CONTROL_VERSION`].
    pub version: u32,
    /// What is asked.
    pub ask: Ask,
}

/// What a member asks of a party.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub enum Ask {
    /// The member's next upload number for a data set; the empty name is for images to predict.
    /// Answer: [`Answer::NextNumber`].
    NextNumber(String),
    /// Begin an upload, or resume one that is staged. Answer: [`Answer::Ready`], then a
    /// [`Answer::Staged`] for each [`Chunk`], until the member finishes the stream.
    Upload(UploadBegin),
    /// Complete an upload, or hear again that it is complete. Answer: [`Answer::CommitDue`], then
    /// [`Answer::Committed`] for a [`Commit`]; at once [`Answer::Committed`] where it is.
    Commit(UploadId),
    /// What a data set holds. Answer: [`Answer::Dataset`].
    Dataset(String),
    /// Run a job. Answer: [`Answer::Submitted`].
    Submit(Box<JobDescription>),
    /// Take a job back that has not started. Answer: [`Answer::Withdrawn`].
    Withdraw(JobId),
    /// Events and results of one's own job. Answer: a stream of [`Event`]; a refusal is a failure.
    Watch(JobId),
    /// The kept models. Answer: [`Answer::Models`].
    Models,
    /// Remove the model that a job made, if it comes from this session; nothing is done where there
    /// is none. Answer: [`Answer::ModelRemoved`].
    RemoveModel {
        /// Its name.
        name: String,
        /// The job.
        job: JobId,
        /// The session it comes from.
        source: SessionId,
        /// Whether this party would; nothing is done.
        ask: bool,
    },
    /// The serving sessions that this member may ask. Answer: [`Answer::Servings`].
    Servings,
    /// End one's own serving session in an orderly way. Answer: [`Answer::Stopping`].
    StopServing(JobId),
    /// Predictions in a serving session; a [`ServedImages`] follows. Answer: [`Answer::Predicted`].
    Served(ServedRequest),
    /// Delete one's own contributions to a data set, staged ones too; may be repeated. Answer:
    /// [`Answer::RowsWithdrawn`].
    WithdrawRows {
        /// The data set.
        dataset: String,
        /// Which.
        uploads: Withdrawal,
    },
}

/// A request for predictions in a serving session.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct ServedRequest {
    /// The serving job.
    pub job: JobId,
    /// The request's random name, alike at the three parties.
    pub request: RequestId,
    /// Images.
    pub rows: u32,
}

/// Names a request among those of its member: 16 random bytes.
pub type RequestId = [u8; 16];

/// One party's share of a request's images.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct ServedImages(pub Share);

/// A serving session, as members see it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Serving {
    /// Its job.
    pub job: JobId,
    /// What it serves.
    pub spec: ServeSpec,
    /// The session that the model comes from.
    pub model: SessionId,
    /// When it ends: seconds since 1970 by the clock of the party that speaks.
    pub until_s: u64,
}

/// What is public about a kept model.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct ModelInfo {
    /// Its name.
    pub name: String,
    /// Who made it.
    pub owner: Pin,
    /// The session that it comes from.
    pub source: SessionId,
    /// The job that made it.
    pub job: JobId,
    /// Ring bits.
    pub ring_bits: u8,
    /// Fraction bits.
    pub frac_bits: u8,
    /// What it was made as; models of older releases do not say.
    pub about: Option<ModelAbout>,
    /// The model that its training started from.
    pub started_from: Option<String>,
}

/// What a model was made as.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct ModelAbout {
    /// The network, TOML text.
    pub network: String,
    /// How its images are prepared, where the job said so.
    pub preparation: Option<Preparation>,
    /// Name and snapshot of the data set it was trained on; `None` for one that was imported.
    pub dataset: Option<(String, [u8; 32])>,
    /// When: seconds since 1970 by the clock of the party that speaks.
    pub made_s: u64,
}

/// A request among those of all members.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub struct RequestKey {
    /// Whose certificate it came with.
    pub member: Pin,
    /// Its name.
    pub request: RequestId,
}

/// What P0 says to the other nodes inside a serving session.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub enum ServeWord {
    /// Run the next batch.
    Batch(ServeBatch),
    /// To P1 and P2: forget these requests and why; their members are told.
    Drop(Vec<RequestKey>, String),
    /// Serving is over.
    End,
}

/// One batch of a serving session.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct ServeBatch {
    /// Its number, from 0: the session's step is one later.
    pub number: u64,
    /// Images, without padding: they decide the program.
    pub rows: u32,
    /// The requests with their images, in order of their rows; the dealer hears of none.
    pub requests: Vec<(RequestKey, u32)>,
}

/// What P1 and P2 say to P0 inside a serving session.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct ServeNote {
    /// This request is here.
    pub key: RequestKey,
    /// With so many images; 0: its member has taken it back.
    pub rows: u32,
}

/// The name of the control streams on which P0 leads a serving session: another one than those of
/// the session's keys.
pub fn serve_stream(session: &SessionId) -> [u8; 32] {
    use sha2::{Digest, Sha256};
    let hash = Sha256::new().chain_update(b"trefoil serving v1\0");
    hash.chain_update(session).finalize().into()
}

/// Which of a hospital's uploads to a data set are withdrawn. Their numbers are never given again.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Withdrawal {
    /// That of this number.
    One(u64),
    /// All with a lower number.
    Below(u64),
}

impl Withdrawal {
    /// Whether it is about the upload of this number.
    pub fn covers(self, number: u64) -> bool {
        match self {
            Withdrawal::One(one) => number == one,
            Withdrawal::Below(end) => number < end,
        }
    }
}

/// What is going to be uploaded.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct UploadBegin {
    /// The upload's random name.
    pub upload: UploadId,
    /// The data set; empty for images to predict.
    pub dataset: String,
    /// Which rows.
    pub part: Part,
    /// What the rows look like.
    pub schema: Schema,
    /// How many.
    pub rows: u64,
    /// Number of this upload among the hospital's to this data set, the same at all parties; 1 for
    /// images to predict.
    pub number: u64,
}

impl UploadBegin {
    /// What a receipt for this upload's chunks says; chunk, rows, sharing and digest are left open.
    pub fn receipt(&self) -> StagedReceipt {
        StagedReceipt {
            upload: self.upload,
            part: self.part,
            dataset: self.dataset.clone(),
            number: self.number,
            chunk: 0,
            rows: 0,
            sharing: [0; 16],
            digest: [0; 32],
            schema: self.schema.hash(),
        }
    }
}

/// One chunk of an upload, for one party. Each sharing of a chunk has fresh seeds.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Chunk {
    /// Its number: the next one, or an earlier one that is shared anew.
    pub chunk: u32,
    /// The sharing, named alike to the three parties.
    pub sharing: SharingId,
    /// The images.
    pub images: Share,
    /// The labels, where the schema has classes.
    pub labels: Option<Share>,
}

/// A compressed share on the wire.
#[derive(Clone, PartialEq, Eq, Serialize, Deserialize)]
pub enum Share {
    /// To be expanded.
    Seed([u8; 16]),
    /// As it is.
    Full(Words),
}

impl fmt::Debug for Share {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Share::Seed(_) => f.write_str("Seed(..)"),
            Share::Full(words) => write!(f, "Full({words:?})"),
        }
    }
}

impl From<CompressedShare> for Share {
    fn from(share: CompressedShare) -> Share {
        match share {
            CompressedShare::Seed(seed) => Share::Seed(seed),
            CompressedShare::Full(words) => Share::Full(Words(words)),
        }
    }
}

impl From<Share> for CompressedShare {
    fn from(share: Share) -> CompressedShare {
        match share {
            Share::Seed(seed) => CompressedShare::Seed(seed),
            Share::Full(words) => CompressedShare::Full(words.0),
        }
    }
}

/// Completes an upload: the receipts of all three parties for all chunks.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Commit {
    /// By party, by chunk.
    pub receipts: [Vec<SignedReceipt>; 3],
}

/// What a party answers a member.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub enum Answer {
    /// No, and why.
    Refused(String),
    /// Not now, and why: the same may be asked again.
    Busy(String),
    /// Lowest upload number from which on all are free here.
    NextNumber(u64),
    /// The upload cannot begin: the member has another one of this number here.
    NumberTaken,
    /// The upload may go on.
    Ready {
        /// Receipts of the chunks that are here.
        receipts: Vec<SignedReceipt>,
        /// The upload is complete here: it takes no more chunks.
        committed: bool,
    },
    /// A chunk is staged.
    Staged(SignedReceipt),
    /// All chunks are here: the commit may come.
    CommitDue,
    /// The upload is part of the data set.
    Committed {
        /// The upload's digest, equal at all parties.
        digest: [u8; 32],
    },
    /// What a data set holds.
    Dataset(DatasetInfo),
    /// The job is known here.
    Submitted(JobId),
    /// The job is forgotten here.
    Withdrawn,
    /// The kept models, by name.
    Models(Vec<ModelInfo>),
    /// There is no such model here any more.
    ModelRemoved,
    /// The serving sessions that this member may ask.
    Servings(Vec<Serving>),
    /// The session will end.
    Stopping,
    /// This party's share of a request's predictions.
    Predicted {
        /// The batch that it was part of.
        batch: u64,
        /// The share of this request's rows alone.
        share: WireOutput,
    },
    /// What was withdrawn is not here any more.
    RowsWithdrawn {
        /// The hospital's contributions that the data set still has here.
        left: Vec<Contribution>,
    },
}

/// What is public about a data set.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct DatasetInfo {
    /// What the rows look like; `None` for an empty data set.
    pub schema: Option<Schema>,
    /// Rows of the training split.
    pub train_rows: u64,
    /// Rows of the test split.
    pub test_rows: u64,
    /// Hash of the list of contributions, in order.
    pub snapshot: [u8; 32],
    /// The contributions, in order.
    pub contributions: Vec<Contribution>,
}

/// What the requester of a job hears from each party.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub enum Event {
    /// The job waits for approval at the party that speaks.
    Held,
    /// The party that speaks has approved it.
    Approved,
    /// A session has begun.
    Started {
        /// Its id.
        session: SessionId,
        /// Steps in all.
        steps: u64,
        /// The ring's width, which the shares combine in.
        ring_bits: u8,
        /// Sessions of the job before this one.
        attempt: u32,
        /// Its first step. What earlier sessions revealed from this step on counts no more.
        from: u64,
    },
    /// The session was interrupted; the job goes on in another one. In words: for what it waits.
    Interrupted(String),
    /// A step is done.
    Progress(Progress),
    /// This party's share of a revealed result.
    Output {
        /// The step that revealed it.
        step: u64,
        /// The attempt that the share is of: shares of two attempts do not belong together.
        attempt: u32,
        /// The share.
        share: WireOutput,
    },
    /// The job is done; the counters of the node that speaks, and of the dealer where P0 speaks.
    Done {
        /// This party's.
        stats: NodeStats,
        /// The dealer's.
        dealer: Option<NodeStats>,
    },
    /// The job has failed.
    Failed(String),
    /// What a job waits for at the party that speaks.
    Waits(String),
}

/// Where a job is.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Progress {
    /// The step, from 0.
    pub step: u64,
    /// Steps of the job.
    pub steps: u64,
    /// What the step is for, such as `train` or `evaluate`.
    pub phase: String,
    /// Epoch, from 0, where the phase has one.
    pub epoch: u64,
    /// Batch within the phase, from 0.
    pub batch: u64,
    /// Batches of the phase.
    pub batches: u64,
    /// How long the step took.
    pub seconds: f64,
    /// Rounds of the step.
    pub rounds: u64,
    /// Bytes this party sent to the other two in the step.
    pub sent_bytes: u64,
    /// Bytes this party received from the dealer in the step.
    pub dealer_bytes: u64,
}

/// An output's share on the wire.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct WireOutput {
    /// The output's name.
    pub name: String,
    /// Its shape.
    pub shape: Vec<u64>,
    /// This party's share.
    pub words: Words,
    /// Whether the shares combine by XOR.
    pub xor: bool,
    /// Hash of what was opened in the step.
    pub opened: [u8; 16],
}

impl From<OutputShare> for WireOutput {
    fn from(output: OutputShare) -> WireOutput {
        WireOutput {
            name: output.name,
            shape: output
                .share
                .shape()
                .iter()
                .map(|side| *side as u64)
                .collect(),
            words: Words(output.share.into_data()),
            xor: output.xor,
            opened: output.opened,
        }
    }
}

impl WireOutput {
    /// The share; an error where shape and words do not fit.
    pub fn into_share(self) -> Result<OutputShare, String> {
        let shape: Option<Vec<usize>> = self
            .shape
            .iter()
            .map(|side| usize::try_from(*side).ok())
            .collect();
        let len = |shape: &[usize]| {
            shape
                .iter()
                .try_fold(1usize, |len, side| len.checked_mul(*side))
        };
        match shape {
            Some(shape) if len(&shape) == Some(self.words.0.len()) => Ok(OutputShare {
                name: self.name,
                share: Tensor::new(shape, self.words.0),
                xor: self.xor,
                opened: self.opened,
            }),
            _ => Err(format!(
                "output {:?}: {} words in shape {:?}",
                self.name,
                self.words.0.len(),
                self.shape
            )),
        }
    }
}

/// A figure for each of P0, P1, P2 and the dealer.
pub fn by_peer(figure: impl Fn(Peer) -> u64) -> [u64; 4] {
    let [p0, p1, p2] = PartyId::ALL.map(|party| figure(Peer::Party(party)));
    [p0, p1, p2, figure(Peer::Dealer)]
}

/// What a node counted in one session.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct NodeStats {
    /// From the session's start to its end.
    pub seconds: f64,
    /// Rounds of communication.
    pub rounds: u64,
    /// Steps executed.
    pub steps: u64,
    /// Payload bytes posted to P0, P1, P2 and the dealer: what the plans predict.
    pub sent_bytes: [u64; 4],
    /// Payload bytes taken from P0, P1, P2 and the dealer.
    pub received_bytes: [u64; 4],
    /// The process's largest memory so far; 0 where the platform does not say.
    pub peak_memory_bytes: u64,
}

impl NodeStats {
    /// Bytes sent to other parties.
    pub fn sent_to_parties(&self) -> u64 {
        self.sent_bytes[..3].iter().sum()
    }
}

/// One contribution to a data set, as it enters the snapshot hash.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Contribution {
    /// Who brought it.
    pub hospital: Pin,
    /// Its number among the hospital's.
    pub number: u64,
    /// Training or test rows.
    pub part: Part,
    /// How many.
    pub rows: u64,
    /// Digest of the upload as a whole.
    pub digest: [u8; 32],
}

impl DatasetInfo {
    /// How a job refers to this data set.
    pub fn reference(&self, name: &str) -> trefoil_models::job::DatasetRef {
        trefoil_models::job::DatasetRef {
            name: name.into(),
            train_rows: usize::try_from(self.train_rows).unwrap_or(usize::MAX),
            test_rows: usize::try_from(self.test_rows).unwrap_or(usize::MAX),
            snapshot: self.snapshot,
        }
    }

    /// Each hospital's test rows, in the order in which they lie in the test split.
    pub fn by_hospital(&self) -> Vec<trefoil_models::HospitalRows> {
        let test = self.contributions.iter().filter(|c| c.part == Part::Test);
        let mut hospitals: Vec<trefoil_models::HospitalRows> = Vec::new();
        for contribution in test {
            let rows = usize::try_from(contribution.rows).unwrap_or(usize::MAX);
            let hospital = *contribution.hospital.as_bytes();
            match hospitals
                .last_mut()
                .filter(|last| last.hospital == hospital)
            {
                Some(last) => last.rows = last.rows.saturating_add(rows),
                None => hospitals.push(trefoil_models::HospitalRows { hospital, rows }),
            }
        }
        hospitals
    }
}
