//! Staged-receipts: each party signs what it holds of an upload's chunk; a commit needs the
//! receipts of all three, so that no party can be left without a chunk that the others keep.

use serde::{Deserialize, Serialize};
use sha2::{Digest, Sha256};
use trefoil_transport::Pin;

use crate::identity::{IdentityError, Signature, Signer};
use crate::{ConsortiumFile, Part};
use trefoil_protocol::party::{PartyId, Peer};

/// Names an upload: 16 random bytes of the hospital.
pub type UploadId = [u8; 16];
/// Names one sharing of one chunk: 16 random bytes, fresh with every set of seeds.
pub type SharingId = [u8; 16];
/// Most rows in one chunk.
pub const CHUNK_ROWS_MAX: usize = 1_000;
/// Most bytes of shares in one chunk; chunks of large images have fewer rows.
pub const CHUNK_BYTES_MAX: usize = 64 << 20;
/// Most chunks in one upload.
pub const CHUNKS_MAX: usize = 20_000;

/// What the rows of an upload look like; equal for all contributions to a data set.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Schema {
    /// Shape of one image: channels, height, width.
    pub shape: Vec<u32>,
    /// Number of classes; 0 where no labels come.
    pub classes: u32,
}

impl Schema {
    /// Words of one image; `None` where the shape is empty or absurd.
    pub fn image_words(&self) -> Option<usize> {
        let words = self
            .shape
            .iter()
            .try_fold(1usize, |words, side| words.checked_mul(*side as usize))?;
        (!self.shape.is_empty() && self.shape.len() <= 4 && (1..=1 << 24).contains(&words))
            .then_some(words)
    }

    /// Words of one row: image and label.
    pub fn row_words(&self) -> Option<usize> {
        Some(self.image_words()? + self.classes as usize)
    }

    /// Rows of a full chunk.
    pub fn chunk_rows(&self) -> Option<usize> {
        Some((CHUNK_BYTES_MAX / (8 * self.row_words()?)).clamp(1, CHUNK_ROWS_MAX))
    }

    /// SHA-256 of the schema.
    pub fn hash(&self) -> [u8; 32] {
        let mut hash = Sha256::new().chain_update(b"trefoil schema v1\0");
        hash.update((self.shape.len() as u64).to_le_bytes());
        self.shape
            .iter()
            .for_each(|side| hash.update(side.to_le_bytes()));
        hash.update(self.classes.to_le_bytes());
        hash.finalize().into()
    }
}

/// What a party says it holds.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct StagedReceipt {
    /// The upload.
    pub upload: UploadId,
    /// Which part of which data set; the data set's name is empty for images to predict.
    pub part: Part,
    /// The data set.
    pub dataset: String,
    /// The upload's number among the hospital's to the data set.
    pub number: u64,
    /// Number of the chunk.
    pub chunk: u32,
    /// Its rows.
    pub rows: u32,
    /// The sharing that this party's share is of. Shares of different sharings do not add up.
    pub sharing: SharingId,
    /// SHA-256 of this party's expanded shares and the sharing's name.
    pub digest: [u8; 32],
    /// The schema's hash.
    pub schema: [u8; 32],
}

/// A receipt with its party's signature.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct SignedReceipt {
    /// What is signed.
    pub receipt: StagedReceipt,
    signature: Signature,
}

impl StagedReceipt {
    fn message(&self) -> Vec<u8> {
        let mut message = b"trefoil staged receipt v2\0".to_vec();
        message.extend(
            postcard::to_stdvec(self)
                .expect("strings, numbers and byte arrays have a postcard form"),
        );
        message
    }

    /// Signs the receipt with the party's key.
    pub fn sign(self, signer: &Signer) -> Result<SignedReceipt, IdentityError> {
        let signature = signer.sign(&self.message())?;
        Ok(SignedReceipt {
            receipt: self,
            signature,
        })
    }

    /// Whether the two speak of the same sharing of the same chunk; what each party holds differs.
    pub fn same_chunk(&self, other: &StagedReceipt) -> bool {
        let with_digest = StagedReceipt {
            digest: self.digest,
            ..other.clone()
        };
        *self == with_digest
    }
}

impl SignedReceipt {
    /// Checks the signature of the party pinned as `signer`.
    pub fn verify(&self, signer: Pin) -> Result<(), IdentityError> {
        self.signature.verify(signer, &self.receipt.message())
    }
}

/// Checks the three parties' receipts of all chunks of an upload, and returns the digest of the
/// upload as a whole, which all three parties compute alike.
pub fn check_receipts(
    consortium: &ConsortiumFile,
    expected: &StagedReceipt,
    chunk_rows: &[u32],
    receipts: &[Vec<SignedReceipt>; 3],
) -> Result<[u8; 32], String> {
    let mut hash = Sha256::new()
        .chain_update(b"trefoil upload v1\0")
        .chain_update(expected.upload);
    for (chunk, rows) in chunk_rows.iter().enumerate() {
        for party in PartyId::ALL {
            let missing = || {
                format!(
                    "{party}: no receipt for chunk {chunk} of {}",
                    chunk_rows.len()
                )
            };
            let signed = receipts[party.index()].get(chunk).ok_or_else(missing)?;
            let sharing = receipts[0][chunk].receipt.sharing;
            if signed.receipt.sharing != sharing {
                return Err(format!(
                    "{party}: chunk {chunk} is of another sharing than at P0: resume the upload"
                ));
            }
            let about = StagedReceipt {
                chunk: chunk as u32,
                rows: *rows,
                sharing,
                ..expected.clone()
            };
            if !signed.receipt.same_chunk(&about) {
                return Err(format!(
                    "{party}: the receipt for chunk {chunk} speaks of something else"
                ));
            }
            signed
                .verify(consortium.node(Peer::Party(party)).pin)
                .map_err(|err| format!("{party}: {err}"))?;
            hash.update(signed.receipt.digest);
        }
    }
    if let Some(party) = PartyId::ALL
        .into_iter()
        .find(|party| receipts[party.index()].len() != chunk_rows.len())
    {
        return Err(format!(
            "{party}: {} receipts for {} chunks",
            receipts[party.index()].len(),
            chunk_rows.len()
        ));
    }
    Ok(hash.finalize().into())
}

/// Chunks, from the first, that all three parties hold of the same sharing: where an upload goes on
/// when it is resumed. Signatures are not checked here.
pub fn staged_alike(receipts: &[Vec<SignedReceipt>; 3]) -> usize {
    let [a, b, c] = receipts;
    let alike = a.iter().zip(b).zip(c).take_while(|((a, b), c)| {
        a.receipt.sharing == b.receipt.sharing && a.receipt.sharing == c.receipt.sharing
    });
    alike.count()
}

/// Rows of each chunk of an upload of `rows` rows.
pub fn chunk_rows(rows: usize, schema: &Schema) -> Option<Vec<u32>> {
    let full = schema.chunk_rows()?;
    let chunks = rows.div_ceil(full);
    if rows == 0 || chunks > CHUNKS_MAX {
        return None;
    }
    Some(
        (0..chunks)
            .map(|chunk| full.min(rows - chunk * full) as u32)
            .collect(),
    )
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{Core, Member, identity};

    const ROWS: [u32; 2] = [1_000, 500];

    /// A consortium, and its parties' signers.
    fn consortium() -> (ConsortiumFile, [Signer; 3]) {
        let node = |name: &str| {
            let made = identity::generate(name).unwrap();
            let member = Member {
                name: name.into(),
                pin: identity::pin(&made).unwrap(),
                address: "127.0.0.1:1".into(),
            };
            (member, Signer::new(&made).unwrap())
        };
        let [(p0, s0), (p1, s1), (p2, s2)] = ["p0", "p1", "p2"].map(node);
        let core = Core {
            name: "test".into(),
            ring_bits: 64,
            parties: [p0, p1, p2],
            dealer: node("centre").0,
        };
        (ConsortiumFile::new(core, Vec::new()), [s0, s1, s2])
    }

    fn about() -> StagedReceipt {
        StagedReceipt {
            upload: [1; 16],
            part: Part::Train,
            dataset: "shapes".into(),
            number: 3,
            chunk: 0,
            rows: 0,
            sharing: [0; 16],
            digest: [0; 32],
            schema: [2; 32],
        }
    }

    fn receipt(party: usize, chunk: usize) -> StagedReceipt {
        StagedReceipt {
            chunk: chunk as u32,
            rows: ROWS[chunk],
            sharing: [chunk as u8; 16],
            digest: [party as u8; 32],
            ..about()
        }
    }

    fn signed(
        signers: &[Signer; 3],
        receipt: impl Fn(usize, usize) -> StagedReceipt,
    ) -> [Vec<SignedReceipt>; 3] {
        [0, 1, 2].map(|party| {
            let sign = |chunk| receipt(party, chunk).sign(&signers[party]).unwrap();
            (0..ROWS.len()).map(sign).collect()
        })
    }

    #[test]
    fn receipts_of_all_three_for_one_sharing_and_one_number_are_needed() {
        let (consortium, signers) = consortium();
        let check = |receipts: &[_; 3]| check_receipts(&consortium, &about(), &ROWS, receipts);
        let good = signed(&signers, receipt);
        check(&good).unwrap();

        let other = |change: fn(&mut StagedReceipt)| {
            let changed = |party, chunk| {
                let mut receipt = receipt(party, chunk);
                if (party, chunk) == (2, 1) {
                    change(&mut receipt);
                }
                receipt
            };
            let receipts = signed(&signers, changed);
            (check(&receipts).unwrap_err(), staged_alike(&receipts))
        };
        let (err, alike) = other(|receipt| receipt.sharing = [9; 16]);
        assert!(err.contains("P2: chunk 1 is of another sharing"), "{err}");
        assert_eq!(alike, 1);
        let (err, _) = other(|receipt| receipt.number = 4);
        assert!(err.contains("P2: the receipt for chunk 1"), "{err}");

        // The signature covers both.
        for forge in [
            |receipt: &mut StagedReceipt| receipt.sharing = [7; 16],
            |receipt: &mut StagedReceipt| receipt.number = 7,
        ] {
            let mut receipts = good.clone();
            receipts
                .iter_mut()
                .for_each(|list| forge(&mut list[0].receipt));
            let mut about = about();
            about.number = receipts[0][0].receipt.number;
            let rows = &ROWS[..1];
            receipts.iter_mut().for_each(|list| list.truncate(1));
            let err = check_receipts(&consortium, &about, rows, &receipts).unwrap_err();
            assert!(err.contains("signature"), "{err}");
        }
    }

    #[test]
    fn an_upload_goes_on_where_all_three_hold_the_same() {
        let (_, signers) = consortium();
        let mut receipts = signed(&signers, receipt);
        assert_eq!(staged_alike(&receipts), 2);
        receipts[1].pop();
        assert_eq!(staged_alike(&receipts), 1);
        receipts[0].clear();
        assert_eq!(staged_alike(&receipts), 0);
    }
}
