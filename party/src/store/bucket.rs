//! Contributions in a bucket of S3-compatible storage (feature `s3`), through the `object_store`
//! crate.
//!
//! ```text
//! s3://BUCKET/PREFIX/party                              whose prefix this is
//! s3://BUCKET/PREFIX/HOSPITAL/UPLOAD/chunk-00000.bin    as in a folder, sealed (`vault.rs`)
//! s3://BUCKET/PREFIX/HOSPITAL/UPLOAD/commit.bin         put last
//! ```
//! The home keeps the catalog (each upload's `commit.bin`) and decides what there is; the bucket
//! holds the shares' bytes. An object is put whole or not at all, and nothing is ever put that is not
//! sealed. Every wait has a deadline. `placement.rs` says when what goes where.

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use object_store::aws::AmazonS3Builder;
use object_store::path::Path as Key;
use object_store::{
    ClientOptions, Error, ObjectStore, ObjectStoreExt, PutMode, PutPayload, RetryConfig,
};
use trefoil_consortium::config::StoreConfig;
use trefoil_consortium::receipt::UploadId;
use trefoil_transport::Pin;

use super::upload::COMMIT_FILE;
use super::{StoreError, at, upload_name};

/// Connecting to the storage.
const CONNECT_TIMEOUT: Duration = Duration::from_secs(10);
/// One request, its body included.
const REQUEST_TIMEOUT: Duration = Duration::from_secs(60);
/// A request and its repetitions.
const RETRY_TIMEOUT: Duration = Duration::from_secs(90);
const RETRIES: usize = 4;
/// One call, whatever happens inside.
const CALL_TIMEOUT: Duration = Duration::from_secs(180);
/// The object that says whose prefix it is.
const OWNER: &str = "party";
const OWNER_MAX_BYTES: u64 = 256;
/// The object that a check writes and removes.
const PROBE: &str = "probe";

/// One party's place in a bucket.
pub(crate) struct Bucket {
    store: Arc<dyn ObjectStore>,
    /// For people: `s3://bucket/prefix`.
    url: String,
    prefix: Key,
    /// Of the thread that talks to the storage; it ends with the sender below.
    runtime: tokio::runtime::Handle,
    _ends_with: tokio::sync::oneshot::Sender<()>,
}

impl std::fmt::Debug for Bucket {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "Bucket({})", self.url)
    }
}

impl Bucket {
    /// The bucket that a configuration names, if it names one; made this party's own at the first
    /// time. Credentials are those of the environment (`AWS_ACCESS_KEY_ID`,
    /// `AWS_SECRET_ACCESS_KEY`, ..) or of the machine.
    ///
    /// # Errors
    /// The configuration names no bucket of S3, the storage does not answer, or the prefix is another
    /// party's.
    pub(crate) fn open(config: &StoreConfig, me: Pin) -> Result<Option<Bucket>, StoreError> {
        let Some(url) = &config.url else {
            return Ok(None);
        };
        let refused =
            |detail: String| StoreError::Refused(format!("[store] url = {url:?}: {detail}"));
        let place = url
            .strip_prefix("s3://")
            .map(|rest| rest.trim_end_matches('/'));
        let place = place.and_then(|rest| rest.split_once('/'));
        let Some((name, prefix)) =
            place.filter(|(name, prefix)| !name.is_empty() && !prefix.is_empty())
        else {
            return Err(refused(
                "needs the form s3://BUCKET/PREFIX, a prefix for each party".into(),
            ));
        };
        let options = ClientOptions::new()
            .with_connect_timeout(CONNECT_TIMEOUT)
            .with_timeout(REQUEST_TIMEOUT);
        let retry = RetryConfig {
            max_retries: RETRIES,
            retry_timeout: RETRY_TIMEOUT,
            ..RetryConfig::default()
        };
        let mut builder = AmazonS3Builder::from_env()
            .with_bucket_name(name)
            .with_client_options(options)
            .with_allow_http(config.plain_http)
            .with_retry(retry);
        if let Some(region) = &config.region {
            builder = builder.with_region(region);
        }
        if let Some(endpoint) = &config.endpoint {
            if endpoint.starts_with("http://") && !config.plain_http {
                let detail = "the endpoint is http: who listens sees which objects are asked for; \
                              use https, or say plain_http = true";
                return Err(refused(detail.into()));
            }
            builder = builder.with_endpoint(endpoint);
        }
        if config.plain_http {
            tracing::warn!(%url, "the share store's requests are not encrypted (plain_http); the shares are");
        }
        let store = builder.build().map_err(|err| refused(err.to_string()))?;
        let bucket = Bucket::at(Arc::new(store), url, prefix)?;
        bucket.claim(me)?;
        Ok(Some(bucket))
    }

    /// A place in any object store.
    pub(super) fn at(
        store: Arc<dyn ObjectStore>,
        url: &str,
        prefix: &str,
    ) -> Result<Bucket, StoreError> {
        let no_thread = |err: std::io::Error| {
            StoreError::Refused(format!("no thread for the share store: {err}"))
        };
        let runtime = tokio::runtime::Builder::new_current_thread()
            .enable_all()
            .build()
            .map_err(no_thread)?;
        let handle = runtime.handle().clone();
        let (ends_with, end) = tokio::sync::oneshot::channel::<()>();
        std::thread::Builder::new()
            .name("bucket".into())
            .spawn(move || runtime.block_on(end))
            .map_err(no_thread)?;
        Ok(Bucket {
            store,
            url: url.trim_end_matches('/').to_owned(),
            prefix: Key::from(prefix),
            runtime: handle,
            _ends_with: ends_with,
        })
    }

    /// Runs a call on the bucket's own thread and waits for it, wherever this is called.
    fn wait<T: Send + 'static>(
        &self,
        what: &str,
        key: &Key,
        call: impl Future<Output = Result<T, Error>> + Send + 'static,
    ) -> Result<T, StoreError> {
        let (answer, answered) = std::sync::mpsc::sync_channel(1);
        self.runtime.spawn(async move {
            let done = tokio::time::timeout(CALL_TIMEOUT, call).await;
            // Nobody waits any more only where the whole process ends.
            let _ = answer.send(done);
        });
        let failed = |source: std::io::Error| StoreError::File {
            path: self.name(key),
            source,
        };
        match answered.recv() {
            Ok(Ok(Ok(value))) => Ok(value),
            Ok(Ok(Err(err @ Error::NotFound { .. }))) => Err(failed(std::io::Error::new(
                std::io::ErrorKind::NotFound,
                format!(
                    "cannot be {what}: it is not in the bucket ({})",
                    outermost(&err)
                ),
            ))),
            Ok(Ok(Err(err))) => Err(failed(std::io::Error::other(format!(
                "cannot be {what}: {err}. Is the storage there, and may this party's credentials read, \
                 write, list and delete under its prefix? `trefoil doctor` tries it"
            )))),
            Ok(Err(_)) | Err(_) => Err(failed(std::io::Error::new(
                std::io::ErrorKind::TimedOut,
                format!(
                    "cannot be {what}: the storage took longer than {} s",
                    CALL_TIMEOUT.as_secs()
                ),
            ))),
        }
    }

    /// An object's name, for people.
    fn name(&self, key: &Key) -> PathBuf {
        let inside = key.as_ref().strip_prefix(self.prefix.as_ref());
        PathBuf::from(format!("{}{}", self.url, inside.unwrap_or_default()))
    }

    fn folder(&self, hospital: Pin, upload: &UploadId) -> Key {
        self.prefix
            .clone()
            .join(hospital.to_string())
            .join(upload_name(upload))
    }

    fn put(&self, key: &Key, bytes: Vec<u8>) -> Result<(), StoreError> {
        let (store, place) = (self.store.clone(), key.clone());
        self.wait("put", key, async move {
            store.put(&place, PutPayload::from(bytes)).await.map(drop)
        })
    }

    fn get(&self, key: &Key, max_bytes: u64) -> Result<Vec<u8>, StoreError> {
        let (store, place) = (self.store.clone(), key.clone());
        let bytes = self.wait("read", key, async move {
            let found = store.get(&place).await?;
            if found.meta.size > max_bytes {
                return Ok(Err(found.meta.size));
            }
            found.bytes().await.map(Ok)
        })?;
        match bytes {
            Ok(bytes) => Ok(bytes.into()),
            Err(size) => Err(StoreError::Damaged {
                path: self.name(key),
                detail: format!("{size} bytes, at most {max_bytes} are possible"),
            }),
        }
    }

    fn delete(&self, key: &Key) -> Result<(), StoreError> {
        let (store, place) = (self.store.clone(), key.clone());
        let deleted = self.wait("deleted", key, async move { store.delete(&place).await });
        match deleted {
            Err(StoreError::File { source, .. })
                if source.kind() == std::io::ErrorKind::NotFound =>
            {
                Ok(())
            }
            other => other,
        }
    }

    /// Makes the prefix this party's own, or finds that it is.
    pub(super) fn claim(&self, me: Pin) -> Result<(), StoreError> {
        let key = self.prefix.clone().join(OWNER);
        let mine = format!("{me}\n");
        // Of two parties that start together one comes first: the storage says which.
        let (store, place, bytes) = (self.store.clone(), key.clone(), mine.clone().into_bytes());
        self.wait("put", &key, async move {
            let put = store.put_opts(&place, PutPayload::from(bytes), PutMode::Create.into());
            match put.await {
                Ok(_) | Err(Error::AlreadyExists { .. } | Error::Precondition { .. }) => Ok(()),
                Err(err) => Err(err),
            }
        })?;
        match self.get(&key, OWNER_MAX_BYTES) {
            Ok(found) if found == mine.as_bytes() => Ok(()),
            Ok(found) => Err(StoreError::Refused(format!(
                "{}: this prefix belongs to the party with the public key {}, this one's is {me}: two \
                 parties never share one, for together they would hold two shares of a secret. Choose \
                 another prefix; after a change of this party's own key, delete that object",
                self.name(&key).display(),
                String::from_utf8_lossy(&found).trim()
            ))),
            Err(err) => Err(err),
        }
    }

    /// Writes, reads and deletes an object.
    pub(super) fn probe(&self) -> Result<(), StoreError> {
        let key = self.prefix.clone().join(PROBE);
        self.put(&key, b"probe".to_vec())?;
        let found = self.get(&key, OWNER_MAX_BYTES)?;
        self.delete(&key)?;
        if found == b"probe" {
            return Ok(());
        }
        Err(StoreError::Damaged {
            path: self.name(&key),
            detail: "the storage gave back something else than was put".into(),
        })
    }

    /// Puts the named files of a folder as an upload, in this order.
    pub(super) fn put_upload(
        &self,
        hospital: Pin,
        upload: &UploadId,
        files: &[PathBuf],
    ) -> Result<(), StoreError> {
        let folder = self.folder(hospital, upload);
        for path in files {
            let name = path.file_name().unwrap_or_default().to_string_lossy();
            let bytes = std::fs::read(path).map_err(at(path))?;
            self.put(&folder.clone().join(name.as_ref()), bytes)?;
        }
        Ok(())
    }

    /// Fetches one file of an upload; it is there whole or not at all.
    pub(super) fn fetch(
        &self,
        hospital: Pin,
        upload: &UploadId,
        to: &Path,
        max_bytes: u64,
    ) -> Result<(), StoreError> {
        let bytes = self.get(&self.object(hospital, upload, to), max_bytes)?;
        let temporary = to.with_extension("tmp");
        std::fs::write(&temporary, bytes).map_err(at(&temporary))?;
        std::fs::rename(&temporary, to).map_err(at(to))
    }

    /// What an object is called of which this file is a copy.
    pub(super) fn object_name(&self, hospital: Pin, upload: &UploadId, copy: &Path) -> PathBuf {
        self.name(&self.object(hospital, upload, copy))
    }

    fn object(&self, hospital: Pin, upload: &UploadId, copy: &Path) -> Key {
        let name = copy.file_name().unwrap_or_default().to_string_lossy();
        self.folder(hospital, upload).join(name.as_ref())
    }

    /// Deletes all of an upload, its commit record first. Nothing there is no error.
    pub(super) fn remove(&self, hospital: Pin, upload: &UploadId) -> Result<(), StoreError> {
        let folder = self.folder(hospital, upload);
        self.delete(&folder.clone().join(COMMIT_FILE))?;
        let (store, prefix) = (self.store.clone(), folder.clone());
        let listed = self.wait("listed", &folder, async move {
            store.list_with_delimiter(Some(&prefix)).await
        })?;
        for object in listed.objects {
            self.delete(&object.location)?;
        }
        Ok(())
    }
}

/// The first line of an error: what follows is the storage's answer, markup and all.
fn outermost(err: &Error) -> String {
    let text = err.to_string();
    text.lines().next().unwrap_or_default().to_owned()
}
