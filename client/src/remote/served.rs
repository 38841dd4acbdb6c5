//! Kept models at the three parties, and predictions in a serving session: images are split here
//! for every request with fresh seeds, and the three answers are put together here alone.

use trefoil_consortium::wire::{
    Answer, Ask, CHUNK_MAX_BYTES, EVENT_MAX_BYTES, ModelInfo, ServedImages, ServedRequest, Serving,
};
use trefoil_consortium::{JobId, random_bytes};
use trefoil_protocol::party::PartyId;
use trefoil_protocol::ring::Tensor;
use trefoil_protocol::run::OutputShare;
use trefoil_protocol::run::party::reconstruct;

use super::upload::shares;
use super::{Remote, RemoteError, finish_all, unexpected};

/// A model as the parties hold it.
#[derive(Clone, Debug, PartialEq)]
pub struct HeldModel {
    /// What is public about it; dates are P0's, or the first party's that has it.
    pub info: ModelInfo,
    /// Whether each party has it.
    pub at: [bool; 3],
}

impl HeldModel {
    /// The parties that lack it.
    pub fn missing(&self) -> Vec<PartyId> {
        let parties = PartyId::ALL.into_iter();
        parties.filter(|party| !self.at[party.index()]).collect()
    }
}

impl Remote {
    /// The kept models, by name, the newest version last. Parties hold the same model where it comes from the same session.
    pub async fn models(&self) -> Result<Vec<HeldModel>, RemoteError> {
        let what = "the list of models";
        let mut held: Vec<HeldModel> = Vec::new();
        for (party, answer) in PartyId::ALL
            .into_iter()
            .zip(self.ask_all(&Ask::Models, what).await?)
        {
            let Answer::Models(infos) = answer else {
                return Err(unexpected(party, what, answer));
            };
            for info in infos {
                let same = |known: &&mut HeldModel| {
                    known.info.name == info.name && known.info.source == info.source
                };
                match held.iter_mut().find(same) {
                    Some(known) => known.at[party.index()] = true,
                    None => {
                        let at = PartyId::ALL.map(|other| other == party);
                        held.push(HeldModel { info, at });
                    }
                }
            }
        }
        let made_s = |held: &HeldModel| held.info.about.as_ref().map_or(0, |about| about.made_s);
        held.sort_by(|a, b| (&a.info.name, made_s(a)).cmp(&(&b.info.name, made_s(b))));
        Ok(held)
    }

    /// Removes a model at all three parties, once all have said that they would; at one that has none
    /// nothing is done.
    pub async fn remove_model(&self, info: &ModelInfo) -> Result<(), RemoteError> {
        self.ask_removal(info, true).await?;
        self.ask_removal(info, false).await
    }

    async fn ask_removal(&self, info: &ModelInfo, ask: bool) -> Result<(), RemoteError> {
        let what = format!("the removal of model {}", info.name);
        let ask = Ask::RemoveModel {
            name: info.name.clone(),
            job: info.job,
            source: info.source,
            ask,
        };
        for (party, answer) in PartyId::ALL
            .into_iter()
            .zip(self.ask_all(&ask, &what).await?)
        {
            let Answer::ModelRemoved = answer else {
                return Err(unexpected(party, &what, answer));
            };
        }
        Ok(())
    }

    /// The serving sessions that this member may ask, as P0 tells; those that all three run.
    pub async fn servings(&self) -> Result<Vec<Serving>, RemoteError> {
        let what = "the list of serving sessions";
        let mut lists = Vec::new();
        for (party, answer) in PartyId::ALL
            .into_iter()
            .zip(self.ask_all(&Ask::Servings, what).await?)
        {
            let Answer::Servings(list) = answer else {
                return Err(unexpected(party, what, answer));
            };
            lists.push(list);
        }
        let mut first = lists.swap_remove(0);
        let runs = |serving: &Serving| {
            let same = |other: &Serving| other.job == serving.job && other.spec == serving.spec;
            lists.iter().all(|list| list.iter().any(same))
        };
        first.retain(|serving| runs(serving));
        Ok(first)
    }

    /// Asks P0 to end this member's serving session in an orderly way. Returns at once.
    pub async fn stop_serving(&self, job: JobId) -> Result<(), RemoteError> {
        let what = "the end of serving";
        match self
            .ask_one(PartyId::P0, &Ask::StopServing(job), what)
            .await?
        {
            Answer::Stopping => Ok(()),
            other => Err(unexpected(PartyId::P0, what, other)),
        }
    }

    /// Predictions for images `[rows, words]` in fixed point, of which a request takes at most
    /// `max_batch`. What comes back is what a prediction job reveals: `class [rows]`, or `logits` or
    /// `probabilities [rows, classes]`.
    ///
    /// # Errors
    /// [`RemoteError::Busy`] where a party has no room: the same may be asked again.
    pub async fn served(&self, job: JobId, images: &Tensor) -> Result<Tensor, RemoteError> {
        let what = "the predictions";
        let rows = images.shape().first().copied().unwrap_or(0);
        let request: [u8; 16] = random_bytes().map_err(RemoteError::Random)?;
        // The full share rotates: the name is random.
        let full_to = PartyId::ALL[usize::from(request[0]) % 3];
        let bytes = 8 * images.len() as u64;
        if bytes as usize > CHUNK_MAX_BYTES {
            return Err(RemoteError::Input {
                field: "images",
                detail: format!("{rows} images are too many for one request"),
            });
        }
        let ask = Ask::Served(ServedRequest {
            job,
            request,
            rows: u32::try_from(rows).unwrap_or(u32::MAX),
        });
        let [a, b, c] = shares(images.data(), full_to)?;
        let one = async |party: PartyId, share| {
            let mut stream = self.open(party, &ask).await?;
            let images = ServedImages(share);
            self.within(party, what, bytes, stream.send(&images))
                .await?;
            let answer = self
                .receive(party, &mut stream, what, EVENT_MAX_BYTES, bytes)
                .await?;
            let Answer::Predicted { batch, share } = answer else {
                return Err(unexpected(party, what, answer));
            };
            let share = share
                .into_share()
                .map_err(|detail| RemoteError::Unexpected {
                    party,
                    what: what.into(),
                    detail,
                })?;
            Ok((stream, batch, share))
        };
        // Where one party refuses, the others' streams end, which takes the request back there.
        let (a, b, c) = tokio::try_join!(
            one(PartyId::P0, a),
            one(PartyId::P1, b),
            one(PartyId::P2, c)
        )?;
        let disagree = |detail: String| RemoteError::Disagree {
            what: what.into(),
            detail,
        };
        if a.1 != b.1 || b.1 != c.1 {
            return Err(disagree("they answered from different batches".into()));
        }
        let shares: [OutputShare; 3] = [a.2, b.2, c.2];
        if shares[0].share.shape().first() != Some(&rows) {
            return Err(disagree(format!("the answer has not {rows} rows")));
        }
        let tensor = reconstruct(&shares, self.consortium.core.ring_bits).map_err(disagree)?;
        drop([a.0, b.0, c.0]);
        Ok(tensor)
    }

    /// Asks all three parties the same thing and returns their answers.
    async fn ask_all(&self, ask: &Ask, what: &str) -> Result<[Answer; 3], RemoteError> {
        let mut streams = self.open_all(ask).await?;
        let answers = self
            .receive_all(&mut streams, what, EVENT_MAX_BYTES, 0)
            .await?;
        finish_all(streams).await;
        Ok(answers)
    }
}
