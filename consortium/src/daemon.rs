//! A node as a thread of a process: its start, what it is told from outside, the links that it
//! takes, its end.
//!
//! What it does not: it knows no party and no dealer. What a link is for, and what has to be done
//! before an orderly end, is theirs.

use std::io;
use std::net::SocketAddr;
use std::sync::Arc;
use std::thread::JoinHandle;
use std::time::Duration;

use tokio::sync::{Semaphore, mpsc, watch};
use tracing::{Instrument, Span};
use trefoil_transport::{Link, MsgStream, Node};

use crate::host::{self, Interrupts};
use crate::{Addresses, BindError, hex};

/// What a daemon is told from outside.
enum Command {
    /// At the end of a running job's step.
    Halt(String),
    /// At once.
    Stop(String),
    Vanish,
}

/// Ends a daemon from another thread.
#[derive(Clone)]
pub struct Stopper(mpsc::UnboundedSender<Command>);

impl std::fmt::Debug for Stopper {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("Stopper")
    }
}

impl Stopper {
    /// Ends it when the step of a running job is done and written down, and at once where nothing
    /// runs that can be taken up again. Returns at once.
    pub fn halt(&self, reason: &str) {
        self.tell(Command::Halt(reason.into()));
    }

    /// Ends it in an orderly way, without waiting for a step: a running session hears the reason.
    /// Returns at once.
    pub fn stop(&self, reason: &str) {
        self.tell(Command::Stop(reason.into()));
    }

    fn tell(&self, command: Command) {
        // An error means that it has ended.
        let _ = self.0.send(command);
    }
}

/// Why a daemon's thread cannot be started.
#[derive(Debug, thiserror::Error)]
pub enum StartError {
    /// Its endpoint.
    #[error(transparent)]
    Bind(#[from] BindError),
    /// Its runtime.
    #[error("the runtime cannot be started: {0}")]
    Runtime(io::Error),
    /// Its thread.
    #[error("a thread cannot be started: {0}")]
    Thread(io::Error),
}

/// A running node. Dropping it ends it in an orderly way.
#[derive(Debug)]
pub struct Daemon {
    local_addr: SocketAddr,
    addresses: watch::Sender<Option<Addresses>>,
    stopper: Stopper,
    thread: Option<JoinHandle<()>>,
}

impl Daemon {
    /// Starts a node of the consortium with this core on a thread and a runtime of its own, which
    /// `serve` runs on until it says how it ended. Without `addresses` it dials nobody before
    /// [`Daemon::set_addresses`].
    pub fn start<F: Future<Output = String>>(
        thread: String,
        span: Span,
        core_hash: [u8; 32],
        bind: impl FnOnce() -> Result<Node, BindError>,
        addresses: Option<Addresses>,
        serve: impl FnOnce(Seat) -> F + Send + 'static,
    ) -> Result<Daemon, StartError> {
        let runtime = tokio::runtime::Builder::new_current_thread()
            .enable_all()
            .build()
            .map_err(StartError::Runtime)?;
        let node = {
            let _inside = runtime.enter();
            Arc::new(bind()?)
        };
        let local_addr = node.local_addr();
        let addresses = watch::channel(addresses).0;
        let (stopper, commands) = mpsc::unbounded_channel();
        let seat = Seat {
            node,
            addresses: addresses.subscribe(),
            commands,
        };
        let body = move || {
            let _span = span.clone().entered();
            let kernel = trefoil_protocol::ring::kernel::isa();
            let consortium = hex(&core_hash);
            tracing::info!(addr = %local_addr, %consortium, ?kernel, "listening");
            let how = runtime.block_on(serve(seat).instrument(span.clone()));
            tracing::info!("{how}");
            // File work that still runs must not hold up the end.
            runtime.shutdown_timeout(Duration::from_millis(200));
        };
        let thread = std::thread::Builder::new().name(thread).spawn(body);
        Ok(Daemon {
            local_addr,
            addresses,
            stopper: Stopper(stopper),
            thread: Some(thread.map_err(StartError::Thread)?),
        })
    }

    /// Where it listens.
    pub fn local_addr(&self) -> SocketAddr {
        self.local_addr
    }

    /// Says where the others are; goes before configuration and consortium file.
    pub fn set_addresses(&self, addresses: Addresses) {
        self.addresses.send_replace(Some(addresses));
    }

    /// Ends it from another thread.
    pub fn stopper(&self) -> Stopper {
        self.stopper.clone()
    }

    /// Waits for its end as the process that it is: it halts at the first signal. Attached to a
    /// parent (see [`host`]) it hears where the others are, before `peers` of its configuration,
    /// and ends with the parent.
    pub fn attend(
        self,
        interrupts: Interrupts,
        attached: bool,
        peers: &Addresses,
    ) -> Result<(), String> {
        let stopper = self.stopper();
        interrupts.watch(move || stopper.halt("this node was told to stop"))?;
        if attached {
            host::announce(self.local_addr)?;
            self.set_addresses(host::read_peers()?.addresses.or(peers));
            let stopper = self.stopper();
            host::end_with_parent(move || stopper.stop("its parent has ended"))?;
        }
        self.wait();
        Ok(())
    }

    /// Waits until it has ended.
    pub fn wait(mut self) {
        self.join();
    }

    /// Ends it as if its process were killed: nobody is told. For tests.
    pub fn vanish(mut self) {
        self.stopper.tell(Command::Vanish);
        self.join();
    }

    fn join(&mut self) {
        if let Some(thread) = self.thread.take() {
            // A panic there has been reported there.
            let _ = thread.join();
        }
    }
}

impl Drop for Daemon {
    fn drop(&mut self) {
        self.stopper.stop("this node is stopping");
        self.join();
    }
}

/// What a daemon's thread works with.
pub struct Seat {
    /// Its endpoint.
    pub node: Arc<Node>,
    /// Where the others are, once that is known; goes before the consortium file.
    pub addresses: watch::Receiver<Option<Addresses>>,
    commands: mpsc::UnboundedReceiver<Command>,
}

/// How a daemon ends.
pub enum End {
    /// In an orderly way, for this reason.
    Orderly(String),
    /// As it stands; why.
    Sudden(&'static str),
}

impl Seat {
    /// Hands every new link to `take` until the daemon is to end: told so at once, or with `quiet`,
    /// which says why it ends after the last session that `stopping` has asked to end.
    pub async fn take_links(
        &mut self,
        stopping: &watch::Sender<Option<String>>,
        quiet: impl Future<Output = String>,
        mut take: impl FnMut(Link),
    ) -> End {
        tokio::pin!(quiet);
        loop {
            let link = tokio::select! {
                link = self.node.accept() => link,
                reason = &mut quiet => return End::Orderly(reason),
                command = self.commands.recv() => match command {
                    Some(Command::Vanish) => return End::Sudden("vanished"),
                    Some(Command::Halt(reason)) => {
                        stopping.send_replace(Some(reason));
                        continue;
                    }
                    Some(Command::Stop(reason)) => return End::Orderly(reason),
                    None => return End::Sudden("nobody can stop this node any more"),
                },
            };
            match link {
                Some(link) => take(link),
                None => return End::Sudden("the endpoint has closed"),
            }
        }
    }
}

/// Answers control streams until the link closes, `at_once` of them at the same time.
pub async fn answer_streams<F>(
    link: Link,
    at_once: usize,
    answer: impl Fn([u8; 32], MsgStream) -> F,
) where
    F: Future<Output = ()> + Send + 'static,
{
    let permits = Arc::new(Semaphore::new(at_once));
    let span = Span::current();
    while let Ok(permit) = permits.clone().acquire_owned().await {
        let Ok((_, session, stream)) = link.accept().await else {
            return;
        };
        let answering = answer(session, stream);
        let answering = async move {
            answering.await;
            drop(permit);
        };
        tokio::spawn(answering.instrument(span.clone()));
    }
}
