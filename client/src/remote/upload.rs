//! Uploads: rows are split here, chunk by chunk with fresh seeds, staged at the three parties and
//! committed with the receipts of all three.
//!
//! Whatever breaks, the upload goes on where all three parties hold the same sharing of all chunks
//! before: later chunks are shared anew at all of them, the commit is repeated. No seed is kept.

use std::fmt;
use std::ops::Range;
use std::sync::Arc;
use std::time::{Duration, Instant};

use sha2::{Digest, Sha256};
use trefoil_consortium::receipt::{
    Schema, SignedReceipt, UploadId, check_receipts, chunk_rows, staged_alike,
};
use trefoil_consortium::wire::{
    Answer, Ask, CHUNK_MAX_BYTES, COMMIT_MAX_BYTES, CONTROL_MAX_BYTES, Chunk, Commit, Share,
    UploadBegin,
};
use trefoil_consortium::{Part, hex, random_bytes};
use trefoil_protocol::party::PartyId;
use trefoil_protocol::ring::Tensor;
use trefoil_protocol::share::share;
use trefoil_transport::MsgStream;

use super::{Remote, RemoteError, SLOWEST_BYTES_PER_S, finish_all, unexpected};

/// A party that has been started again reads what is staged at least this fast.
const REREAD_BYTES_PER_S: u64 = 20_000_000;
/// Three receipts with their signatures, and some more.
const COMMIT_BYTES_PER_CHUNK: u64 = 1_000;
/// Pauses between two tries: the first, doubled with each, and the longest.
const PAUSE: Duration = Duration::from_millis(100);
const PAUSE_MAX: Duration = Duration::from_secs(5);

/// Rows to share.
pub struct Upload {
    /// The data set's name; ignored for [`Part::Predict`].
    pub dataset: String,
    /// Which rows.
    pub part: Part,
    /// Normalised images in fixed point, `[rows, words]`.
    pub images: Tensor,
    /// One-hot labels of value 1, `[rows, classes]`; none for [`Part::Predict`].
    pub labels: Option<Tensor>,
    /// Shape of one image: channels, height, width.
    pub shape: Vec<usize>,
}

/// Images in fixed point and one-hot labels of some rows, each row-major; an error says what keeps
/// them from being read.
pub type ReadRows = dyn Fn(Range<usize>) -> Result<(Vec<u64>, Vec<u64>), String> + Send + Sync;

/// Rows to share that are read when their turn comes, a chunk ahead: they need not fit into memory.
#[derive(Clone)]
pub struct LazyUpload {
    /// The data set's name.
    pub dataset: String,
    /// Which rows.
    pub part: Part,
    /// Shape of one image: channels, height, width.
    pub shape: [usize; 3],
    /// Number of classes.
    pub classes: usize,
    /// Number of rows.
    pub rows: usize,
    /// Reads some of them: the same ones each time.
    pub read: Arc<ReadRows>,
}

impl fmt::Debug for LazyUpload {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let (rows, shape) = (self.rows, self.shape);
        write!(
            f,
            "LazyUpload {{ {} {} {rows} x {shape:?} }}",
            self.dataset, self.part
        )
    }
}

impl std::fmt::Debug for Upload {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(
            f,
            "Upload {{ {} {} {:?} }}",
            self.dataset,
            self.part,
            self.images.shape()
        )
    }
}

/// Proof that an upload is complete at all three parties.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Receipt {
    /// The upload's name, as a prediction job refers to it.
    pub upload: String,
    /// Rows.
    pub rows: usize,
    /// The number among this member's uploads to the data set.
    pub number: u64,
    /// Digest of what the three parties hold.
    pub digest: [u8; 32],
    /// Digest of what each of P0, P1 and P2 holds.
    pub party_digests: [[u8; 32]; 3],
}

/// An upload that has begun: with the same rows it can be resumed, from another process too, within
/// 24 hours of its last chunk.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct PendingUpload {
    /// Its name.
    pub upload: UploadId,
    /// Its number among this member's uploads to the data set.
    pub number: u64,
}

impl fmt::Display for PendingUpload {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} (number {})", hex(&self.upload), self.number)
    }
}

/// Rows that have been checked, and how they are cut.
struct Plan {
    /// Empty for images to predict.
    dataset: String,
    part: Part,
    schema: Schema,
    rows: usize,
    chunks: Vec<u32>,
    read: Arc<ReadRows>,
}

/// How long it is tried.
struct Patience {
    limit: Duration,
    since: Instant,
    pause: Duration,
}

impl Patience {
    fn new(limit: Duration) -> Patience {
        Patience {
            limit,
            since: Instant::now(),
            pause: PAUSE,
        }
    }

    /// Something has gone forward.
    fn renew(&mut self) {
        *self = Patience::new(self.limit);
    }

    /// Waits before the next try; returns the error where there is none.
    async fn pause(&mut self, err: RemoteError) -> Result<(), RemoteError> {
        let left = self.limit.saturating_sub(self.since.elapsed());
        if left.is_zero() || !err.may_pass() {
            return Err(err);
        }
        tracing::info!(%err, "an upload is tried again");
        tokio::time::sleep(self.pause.min(left)).await;
        self.pause = (2 * self.pause).min(PAUSE_MAX);
        Ok(())
    }
}

impl Plan {
    fn new(upload: Upload) -> Result<Plan, RemoteError> {
        let (schema, rows) = check_upload(&upload)?;
        let (images, labels) = (upload.images, upload.labels);
        let read = move |range: Range<usize>| {
            let cut = |tensor: &Tensor| {
                let words = tensor.len() / rows;
                tensor.data()[range.start * words..range.end * words].to_vec()
            };
            Ok((cut(&images), labels.as_ref().map(cut).unwrap_or_default()))
        };
        let dataset = match upload.part {
            Part::Predict => String::new(),
            _ => upload.dataset,
        };
        Plan::of(dataset, upload.part, schema, rows, Arc::new(read))
    }

    fn lazy(upload: LazyUpload) -> Result<Plan, RemoteError> {
        let side = |side: usize| {
            u32::try_from(side).map_err(|err| RemoteError::Input {
                field: "shape",
                detail: err.to_string(),
            })
        };
        let schema = Schema {
            shape: upload
                .shape
                .into_iter()
                .map(side)
                .collect::<Result<_, _>>()?,
            classes: side(upload.classes)?,
        };
        Plan::of(
            upload.dataset,
            upload.part,
            schema,
            upload.rows,
            upload.read,
        )
    }

    fn of(
        dataset: String,
        part: Part,
        schema: Schema,
        rows: usize,
        read: Arc<ReadRows>,
    ) -> Result<Plan, RemoteError> {
        let chunks = chunk_rows(rows, &schema).ok_or_else(|| RemoteError::Input {
            field: "images",
            detail: format!(
                "{rows} rows of shape {:?} are too few or too many for one upload",
                schema.shape
            ),
        })?;
        Ok(Plan {
            dataset,
            part,
            schema,
            rows,
            chunks,
            read,
        })
    }

    fn dataset(&self) -> &str {
        &self.dataset
    }

    fn begin(&self, pending: &PendingUpload) -> UploadBegin {
        UploadBegin {
            upload: pending.upload,
            dataset: self.dataset().into(),
            part: self.part,
            schema: self.schema.clone(),
            rows: self.rows as u64,
            number: pending.number,
        }
    }

    /// Bytes of the shares of so many rows.
    fn bytes(&self, rows: usize) -> u64 {
        8 * rows as u64 * self.schema.row_words().unwrap_or(0) as u64
    }

    /// Waiting this much longer for an answer lets a party read again what is staged; in the bytes
    /// that a slow line takes as long for.
    fn reread(&self) -> u64 {
        self.bytes(self.rows) / (REREAD_BYTES_PER_S / SLOWEST_BYTES_PER_S)
    }

    /// A fresh sharing of a chunk, for the three parties: two seeds, and the full share for each
    /// party in turn. Reading may take long, and links have to stay alive meanwhile.
    async fn share(&self, chunk: usize, first: usize) -> Result<[Chunk; 3], RemoteError> {
        let range = first..first + self.chunks[chunk] as usize;
        let read = self.read.clone();
        let image_words = range.len() * self.schema.image_words().unwrap_or(0);
        let label_words = range.len() * self.schema.classes as usize;
        let work = move || {
            let failed = |detail| RemoteError::Input {
                field: "rows",
                detail,
            };
            let (images, labels) = read(range).map_err(failed)?;
            if (images.len(), labels.len()) != (image_words, label_words) {
                let (images, labels) = (images.len(), labels.len());
                return Err(failed(format!(
                    "{images} and {labels} words were read, expected {image_words} and {label_words}"
                )));
            }
            split(chunk, &images, &labels)
        };
        let done = tokio::task::spawn_blocking(work).await;
        done.map_err(|err| RemoteError::Input {
            field: "rows",
            detail: format!("reading them failed: {err}"),
        })?
    }
}

impl Remote {
    /// Shares rows with the parties: chunks with fresh seeds, staged at each party, committed only
    /// with the receipts of all three. `progress` hears how many rows are staged; the number falls
    /// where chunks must be shared anew.
    ///
    /// A broken link, or a party that was started again, is waited for while something has gone
    /// forward within the resume time-out; a party's refusal is final. Once chunks may be staged,
    /// errors are [`RemoteError::Unfinished`].
    pub async fn upload(
        &self,
        upload: Upload,
        progress: &mut dyn FnMut(usize),
    ) -> Result<Receipt, RemoteError> {
        let plan = Plan::new(upload)?;
        self.upload_plan(plan, &mut |_| Ok(()), progress).await
    }

    /// As [`Remote::upload`], of rows that are read when their turn comes. `note` hears what
    /// [`Remote::resume_lazy`] needs before anything is shared, so that an upload outlives this
    /// process; where it fails, nothing is shared. It hears of another one where the number was
    /// taken meanwhile: the last one counts.
    pub async fn upload_lazy(
        &self,
        upload: LazyUpload,
        note: &mut dyn FnMut(&PendingUpload) -> Result<(), String>,
        progress: &mut dyn FnMut(usize),
    ) -> Result<Receipt, RemoteError> {
        self.upload_plan(Plan::lazy(upload)?, note, progress).await
    }

    async fn upload_plan(
        &self,
        plan: Plan,
        note: &mut dyn FnMut(&PendingUpload) -> Result<(), String>,
        progress: &mut dyn FnMut(usize),
    ) -> Result<Receipt, RemoteError> {
        let _one_at_a_time = self.uploading.lock().await;
        let mut patience = Patience::new(self.resume_timeout);
        loop {
            let number = match self.next_number(plan.dataset()).await {
                Ok(number) => number,
                Err(err) => {
                    patience.pause(err).await?;
                    continue;
                }
            };
            let upload = random_bytes().map_err(RemoteError::Random)?;
            let pending = PendingUpload { upload, number };
            note(&pending).map_err(|detail| RemoteError::Input {
                field: "note of the upload",
                detail,
            })?;
            match self.complete(&plan, pending, &mut patience, progress).await {
                // Another process of this member was faster; nothing is staged.
                Err(RemoteError::NumberTaken { party, number }) => {
                    let what = format!("upload number {number}");
                    let reason = "another upload of this member has it".into();
                    patience
                        .pause(RemoteError::Busy {
                            party,
                            what,
                            reason,
                        })
                        .await?;
                }
                other => return other,
            }
        }
    }

    /// Completes an upload that [`RemoteError::Unfinished`] tells of. `upload` must be the same
    /// rows: those that are staged are not shared again.
    pub async fn resume(
        &self,
        pending: PendingUpload,
        upload: Upload,
        progress: &mut dyn FnMut(usize),
    ) -> Result<Receipt, RemoteError> {
        self.resume_plan(pending, Plan::new(upload)?, progress)
            .await
    }

    /// As [`Remote::resume`], of rows that are read when their turn comes.
    pub async fn resume_lazy(
        &self,
        pending: PendingUpload,
        upload: LazyUpload,
        progress: &mut dyn FnMut(usize),
    ) -> Result<Receipt, RemoteError> {
        self.resume_plan(pending, Plan::lazy(upload)?, progress)
            .await
    }

    async fn resume_plan(
        &self,
        pending: PendingUpload,
        plan: Plan,
        progress: &mut dyn FnMut(usize),
    ) -> Result<Receipt, RemoteError> {
        let _one_at_a_time = self.uploading.lock().await;
        let mut patience = Patience::new(self.resume_timeout);
        self.complete(&plan, pending, &mut patience, progress).await
    }

    /// The lowest number that is free at all three parties.
    async fn next_number(&self, dataset: &str) -> Result<u64, RemoteError> {
        let what = "the next upload number";
        let mut streams = self.open_all(&Ask::NextNumber(dataset.into())).await?;
        let answers = self
            .receive_all(&mut streams, what, CONTROL_MAX_BYTES, 0)
            .await?;
        finish_all(streams).await;
        let mut number = 1;
        for (party, answer) in PartyId::ALL.into_iter().zip(answers) {
            match answer {
                Answer::NextNumber(next) => number = number.max(next),
                other => return Err(unexpected(party, what, other)),
            }
        }
        Ok(number)
    }

    /// Stages and commits, as often as it takes.
    async fn complete(
        &self,
        plan: &Plan,
        pending: PendingUpload,
        patience: &mut Patience,
        progress: &mut dyn FnMut(usize),
    ) -> Result<Receipt, RemoteError> {
        let begin = plan.begin(&pending);
        let mut begun = false;
        let unfinished = |err| RemoteError::Unfinished {
            pending,
            source: Box::new(err),
        };
        let receipts = loop {
            let staged = self.stage(&begin, plan, patience, &mut begun, progress);
            let err = match staged.await {
                Ok(receipts) => break receipts,
                Err(err) => err,
            };
            if let Err(err) = patience.pause(err).await {
                return Err(if begun { unfinished(err) } else { err });
            }
        };
        self.commit(&begin, plan, receipts)
            .await
            .map_err(unfinished)
    }

    /// Stages what is not staged alike at all three parties; returns all receipts. `begun` is set
    /// where all three have taken the upload.
    async fn stage(
        &self,
        begin: &UploadBegin,
        plan: &Plan,
        patience: &mut Patience,
        begun: &mut bool,
        progress: &mut dyn FnMut(usize),
    ) -> Result<[Vec<SignedReceipt>; 3], RemoteError> {
        let ask = Ask::Upload(begin.clone());
        // P0 goes first: of two uploads with one number, one is turned down before it has any place.
        let (a, ready_a) = self.ready(PartyId::P0, &ask, begin, plan).await?;
        let ((b, ready_b), (c, ready_c)) = tokio::try_join!(
            self.ready(PartyId::P1, &ask, begin, plan),
            self.ready(PartyId::P2, &ask, begin, plan),
        )?;
        *begun = true;
        let mut streams = [a, b, c];
        let ready = [ready_a, ready_b, ready_c];
        let committed = PartyId::ALL
            .into_iter()
            .find(|party| ready[party.index()].1);
        let mut receipts = ready.map(|(receipts, _)| receipts);
        let staged = staged_alike(&receipts).min(plan.chunks.len());
        if let (Some(party), true) = (committed, staged < plan.chunks.len()) {
            return Err(RemoteError::Disagree {
                what: format!("upload {}", hex(&begin.upload)),
                detail: format!(
                    "{party} has committed it, and another party has lost chunks of it: \
                     these rows cannot be completed"
                ),
            });
        }
        receipts.iter_mut().for_each(|list| list.truncate(staged));
        let mut done = plan.chunks[..staged]
            .iter()
            .map(|rows| *rows as usize)
            .sum();
        if staged > 0 {
            progress(done);
        }
        let mut following = match staged < plan.chunks.len() {
            true => Some(plan.share(staged, done).await?),
            false => None,
        };
        let mut chunk = staged;
        while let Some(messages) = following.take() {
            let bytes = plan.bytes(plan.chunks[chunk] as usize);
            let after = done + plan.chunks[chunk] as usize;
            let exchange = async {
                self.send_all(&mut streams, &messages, "a chunk", bytes)
                    .await?;
                self.receive_all(&mut streams, "a chunk", CONTROL_MAX_BYTES, bytes)
                    .await
            };
            // While this chunk is on its way the next one is read.
            let next = async {
                match chunk + 1 < plan.chunks.len() {
                    true => plan.share(chunk + 1, after).await.map(Some),
                    false => Ok(None),
                }
            };
            let (answers, next) = tokio::join!(exchange, next);
            for (party, answer) in PartyId::ALL.into_iter().zip(answers?) {
                match answer {
                    Answer::Staged(receipt) => receipts[party.index()].push(receipt),
                    other => return Err(unexpected(party, "a chunk", other)),
                }
            }
            (done, chunk) = (after, chunk + 1);
            patience.renew();
            progress(done);
            following = next?;
        }
        let [a, b, c] = streams;
        tokio::join!(self.leave(a), self.leave(b), self.leave(c));
        Ok(receipts)
    }

    /// Opens an upload at a party; the receipts of what is staged there, and whether it is
    /// committed there.
    async fn ready(
        &self,
        party: PartyId,
        ask: &Ask,
        begin: &UploadBegin,
        plan: &Plan,
    ) -> Result<(MsgStream, (Vec<SignedReceipt>, bool)), RemoteError> {
        let mut stream = self.open(party, ask).await?;
        let wait = plan.reread();
        let answer = self
            .receive(party, &mut stream, "the upload", COMMIT_MAX_BYTES, wait)
            .await?;
        match answer {
            Answer::Ready {
                receipts,
                committed,
            } => Ok((stream, (receipts, committed))),
            Answer::NumberTaken => Err(RemoteError::NumberTaken {
                party,
                number: begin.number,
            }),
            other => Err(unexpected(party, "the upload", other)),
        }
    }

    /// Ends a stream and waits, bounded, until the party has left it too: it lets a commit in then.
    async fn leave(&self, stream: MsgStream) {
        let (sender, mut receiver) = stream.split();
        let left = async {
            // A party that hears nothing of this finds out by itself.
            let _ = sender.finish().await;
            let _ = receiver.recv_bytes(CONTROL_MAX_BYTES).await;
        };
        let limit = Duration::from_millis(self.settings.close_timeout_ms);
        let _ = tokio::time::timeout(limit, left).await;
    }

    /// Commits at all three parties, at each as often as it takes.
    async fn commit(
        &self,
        begin: &UploadBegin,
        plan: &Plan,
        receipts: [Vec<SignedReceipt>; 3],
    ) -> Result<Receipt, RemoteError> {
        // The parties check them too; a wrong one is found before anybody commits.
        let digest = check_receipts(&self.consortium, &begin.receipt(), &plan.chunks, &receipts)
            .map_err(|detail| RemoteError::Disagree {
                what: "the upload's receipts".into(),
                detail,
            })?;
        let party_digests = receipts.each_ref().map(|receipts| {
            let mut hash = Sha256::new().chain_update(b"trefoil party receipt v1\0");
            receipts
                .iter()
                .for_each(|signed| hash.update(signed.receipt.digest));
            hash.finalize().into()
        });
        let commit = Commit { receipts };
        // One party's trouble does not keep the others from committing.
        let [a, b, c] =
            PartyId::ALL.map(|party| self.commit_at(party, begin.upload, plan, &commit, digest));
        let (a, b, c) = tokio::join!(a, b, c);
        a.and(b).and(c)?;
        Ok(Receipt {
            upload: hex(&begin.upload),
            rows: plan.rows,
            number: begin.number,
            digest,
            party_digests,
        })
    }

    async fn commit_at(
        &self,
        party: PartyId,
        upload: UploadId,
        plan: &Plan,
        commit: &Commit,
        digest: [u8; 32],
    ) -> Result<(), RemoteError> {
        let mut patience = Patience::new(self.resume_timeout);
        loop {
            match self.try_commit(party, upload, plan, commit).await {
                Ok(theirs) if theirs == digest => return Ok(()),
                Ok(theirs) => {
                    return Err(RemoteError::Disagree {
                        what: format!("upload {}", hex(&upload)),
                        detail: format!(
                            "{party} has committed {}, the receipts say {}",
                            hex(&theirs[..8]),
                            hex(&digest[..8])
                        ),
                    });
                }
                Err(err) => patience.pause(err).await?,
            }
        }
    }

    /// The digest that the party has committed.
    async fn try_commit(
        &self,
        party: PartyId,
        upload: UploadId,
        plan: &Plan,
        commit: &Commit,
    ) -> Result<[u8; 32], RemoteError> {
        let what = "the commit";
        let mut stream = self.open(party, &Ask::Commit(upload)).await?;
        let wait = plan.reread();
        let mut answer = self
            .receive(party, &mut stream, what, CONTROL_MAX_BYTES, wait)
            .await?;
        if matches!(answer, Answer::CommitDue) {
            let bytes = COMMIT_BYTES_PER_CHUNK * plan.chunks.len() as u64;
            self.within(party, what, bytes, stream.send(commit)).await?;
            answer = self
                .receive(party, &mut stream, what, CONTROL_MAX_BYTES, bytes)
                .await?;
        }
        match answer {
            Answer::Committed { digest } => {
                // The answer is here; how the stream ends does not matter any more.
                let _ = stream.finish().await;
                Ok(digest)
            }
            other => Err(unexpected(party, what, other)),
        }
    }
}

fn check_upload(upload: &Upload) -> Result<(Schema, usize), RemoteError> {
    let input = |field, detail| RemoteError::Input { field, detail };
    let side = |side: &usize| u32::try_from(*side).map_err(|err| input("shape", err.to_string()));
    let shape = upload
        .shape
        .iter()
        .map(side)
        .collect::<Result<Vec<u32>, _>>()?;
    let &[rows, words] = upload.images.shape() else {
        return Err(input(
            "images",
            format!(
                "expected shape [rows, words], found {:?}",
                upload.images.shape()
            ),
        ));
    };
    let classes = match (&upload.labels, upload.part) {
        (None, Part::Predict) => 0,
        (Some(_), Part::Predict) => {
            return Err(input("labels", "images to predict have no labels".into()));
        }
        (None, part) => {
            return Err(input(
                "labels",
                format!("rows of the {part} part need labels"),
            ));
        }
        (Some(labels), _) => match labels.shape() {
            &[labelled, classes] if labelled == rows => classes,
            other => {
                return Err(input(
                    "labels",
                    format!("expected shape [{rows}, classes], found {other:?}"),
                ));
            }
        },
    };
    let classes = u32::try_from(classes).map_err(|err| input("labels", err.to_string()))?;
    let schema = Schema { shape, classes };
    match schema.image_words() {
        Some(expected) if expected == words => Ok((schema, rows)),
        _ => Err(input(
            "shape",
            format!("{:?} does not fit images of {words} words", upload.shape),
        )),
    }
}

/// Splits a chunk's rows; the receiver of the full share rotates with the chunks.
fn split(chunk: usize, images: &[u64], labels: &[u64]) -> Result<[Chunk; 3], RemoteError> {
    let sharing = random_bytes().map_err(RemoteError::Random)?;
    let full_to = PartyId::ALL[chunk % 3];
    let [a, b, c] = shares(images, full_to)?;
    let [label_a, label_b, label_c] = match labels {
        [] => [None, None, None],
        labels => shares(labels, full_to)?.map(Some),
    };
    let all = [(a, label_a), (b, label_b), (c, label_c)];
    Ok(all.map(|(images, labels)| Chunk {
        chunk: chunk as u32,
        sharing,
        images,
        labels,
    }))
}

/// Splits words: two seeds and a full share.
pub(super) fn shares(words: &[u64], full_to: PartyId) -> Result<[Share; 3], RemoteError> {
    let seeds = [
        random_bytes().map_err(RemoteError::Random)?,
        random_bytes().map_err(RemoteError::Random)?,
    ];
    Ok(share(words, seeds, full_to).map(Share::from))
}

// A chunk's bound at the parties covers what is sent here.
const _: () = assert!(CHUNK_MAX_BYTES > trefoil_consortium::receipt::CHUNK_BYTES_MAX);

#[cfg(test)]
mod tests {
    use super::*;
    use trefoil_protocol::share::{CompressedShare, reconstruct};

    #[test]
    fn the_full_share_goes_to_each_party_in_turn_and_each_sharing_is_fresh() {
        let (images, labels) = ([5, u64::MAX, 7], [1, 0]);
        let mut seen = std::collections::HashSet::new();
        for chunk in 0..6 {
            let messages = split(chunk, &images, &labels).unwrap();
            for (party, message) in messages.iter().enumerate() {
                assert_eq!(message.chunk, chunk as u32);
                for share in [Some(&message.images), message.labels.as_ref()]
                    .into_iter()
                    .flatten()
                {
                    let full = matches!(share, Share::Full(_));
                    assert_eq!(full, party == chunk % 3, "chunk {chunk} at P{party}");
                    if let Share::Seed(seed) = share {
                        assert!(seen.insert(*seed), "a seed was used twice");
                    }
                }
            }
            let words = |share: Share, len| CompressedShare::from(share).expand(len).unwrap();
            let images_of = messages.clone().map(|message| words(message.images, 3));
            let labels_of = messages.map(|message| words(message.labels.unwrap(), 2));
            for (shares, secret) in [(images_of, &images[..]), (labels_of, &labels[..])] {
                let shares = shares.map(|words| Tensor::new(vec![words.len()], words));
                assert_eq!(reconstruct(shares.each_ref()).data(), secret);
            }
        }
    }
}
