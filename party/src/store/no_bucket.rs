//! What stands for a bucket in a program that was built without the feature `s3`: nothing.

use std::path::{Path, PathBuf};

use trefoil_consortium::config::StoreConfig;
use trefoil_consortium::receipt::UploadId;
use trefoil_transport::Pin;

use super::StoreError;

/// There is none.
#[derive(Debug)]
pub(crate) enum Bucket {}

impl Bucket {
    /// None, or an error where the configuration names one.
    pub(crate) fn open(config: &StoreConfig, _: Pin) -> Result<Option<Bucket>, StoreError> {
        match &config.url {
            None => Ok(None),
            Some(url) => Err(StoreError::Refused(format!(
                "[store] url = {url:?}: this program was built without S3: build it with \
                 `cargo build --release --features s3`, or leave the key out"
            ))),
        }
    }

    pub(super) fn probe(&self) -> Result<(), StoreError> {
        match *self {}
    }

    pub(super) fn put_upload(&self, _: Pin, _: &UploadId, _: &[PathBuf]) -> Result<(), StoreError> {
        match *self {}
    }

    pub(super) fn fetch(&self, _: Pin, _: &UploadId, _: &Path, _: u64) -> Result<(), StoreError> {
        match *self {}
    }

    pub(super) fn object_name(&self, _: Pin, _: &UploadId, _: &Path) -> PathBuf {
        match *self {}
    }

    pub(super) fn remove(&self, _: Pin, _: &UploadId) -> Result<(), StoreError> {
        match *self {}
    }
}
