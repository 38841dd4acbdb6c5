//! The relay's sockets: reads what arrives and offers it to a lane.
//!
//! One port per directed pair, one flow per dialling address. `mod.rs` beside
//! this sends what leaves the lanes.

use std::cell::RefCell;
use std::collections::HashMap;
use std::io::{self, IoSliceMut};
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};
use std::rc::Rc;
use std::sync::Arc;
use std::time::{Duration, Instant};

use quinn_udp::{EcnCodepoint, RecvMeta, UdpSockRef, UdpSocketState};
use tokio::io::Interest;
use tokio::net::UdpSocket;
use tokio::sync::mpsc;
use tokio::task::AbortHandle;
use tracing::{debug, warn};

use super::Shared;

/// Asked for; the operating system may grant less.
const SOCKET_BUFFER_BYTES: usize = 8 << 20;
/// Dialling addresses per port; beyond, the one that was quiet longest goes.
const MAX_FLOWS: usize = 64;
/// One read: this many buffers of the largest size a datagram, or several of one
/// sender joined by the kernel, can have.
const READ_BUFFERS: usize = 8;
const READ_BUFFER_BYTES: usize = 64 << 10;

/// A socket with the system's offloads, read by one thread and written by another.
pub(super) struct Socket {
    pub(super) io: UdpSocket,
    pub(super) offload: UdpSocketState,
}

impl Socket {
    fn new(socket: std::net::UdpSocket) -> io::Result<Arc<Socket>> {
        let offload = UdpSocketState::new(UdpSockRef::from(&socket))?;
        let io = UdpSocket::from_std(socket)?;
        Ok(Arc::new(Socket { io, offload }))
    }
}

/// How a datagram goes on: by this socket to that address.
#[derive(Clone)]
pub(super) struct Way {
    pub(super) socket: Arc<Socket>,
    pub(super) to: SocketAddr,
    pub(super) ecn: Option<EcnCodepoint>,
}

/// A relay to be: where diallers send, where it goes, and the two lanes.
pub(super) struct NewPort {
    pub(super) socket: std::net::UdpSocket,
    pub(super) listener: SocketAddr,
    pub(super) forward: usize,
    pub(super) back: usize,
}

/// A non-blocking loopback socket of the listener's address family.
pub(super) fn bind_beside(listener: SocketAddr) -> io::Result<std::net::UdpSocket> {
    let ip: IpAddr = if listener.is_ipv4() {
        Ipv4Addr::LOCALHOST.into()
    } else {
        Ipv6Addr::LOCALHOST.into()
    };
    let socket = std::net::UdpSocket::bind((ip, 0))?;
    socket.set_nonblocking(true)?;
    let options = socket2::SockRef::from(&socket);
    // Less than asked for costs datagrams when the machine is busy, no more.
    for set in [
        options.set_recv_buffer_size(SOCKET_BUFFER_BYTES),
        options.set_send_buffer_size(SOCKET_BUFFER_BYTES),
    ] {
        if let Err(error) = set {
            debug!(%error, "relay keeps the system's socket buffers");
        }
    }
    Ok(socket)
}

/// The reading thread: one task per socket, until the other end is dropped.
pub(super) async fn run_ports(
    shared: Arc<Shared>,
    mut new_ports: mpsc::UnboundedReceiver<NewPort>,
) {
    let reader = Rc::new(Reader {
        shared,
        memory: RefCell::new(vec![0; READ_BUFFERS * READ_BUFFER_BYTES]),
    });
    while let Some(port) = new_ports.recv().await {
        let reader = Rc::clone(&reader);
        tokio::task::spawn_local(async move {
            if let Err(error) = run_port(reader, port).await {
                warn!(%error, "a relay ended");
            }
        });
    }
}

/// What the tasks of the reading thread share.
struct Reader {
    shared: Arc<Shared>,
    /// Borrowed during one read and what follows at once, never across an await.
    memory: RefCell<Vec<u8>>,
}

/// A dialler's address and the socket that stands for it before the listener.
struct Flow {
    socket: Arc<Socket>,
    replies: AbortHandle,
    last_used: Instant,
}

impl Drop for Flow {
    fn drop(&mut self) {
        self.replies.abort();
    }
}

async fn run_port(reader: Rc<Reader>, port: NewPort) -> io::Result<()> {
    let dialled = Socket::new(port.socket)?;
    let mut flows: HashMap<SocketAddr, Flow> = HashMap::new();
    loop {
        let read = reader.read(&dialled, port.forward, |from, now| {
            if !flows.contains_key(&from) {
                make_room(&mut flows);
                let flow = start_flow(&reader, &dialled, port.listener, port.back, from);
                let flow = flow.inspect_err(|error| {
                    warn!(%error, %from, "relay cannot take a new address");
                });
                flows.insert(from, flow.ok()?);
            }
            let flow = flows.get_mut(&from)?;
            flow.last_used = now;
            Some((Arc::clone(&flow.socket), port.listener))
        });
        read.await;
    }
}

/// Ends the flow that was quiet longest when there are too many.
fn make_room(flows: &mut HashMap<SocketAddr, Flow>) {
    if flows.len() >= MAX_FLOWS {
        let quiet = flows.iter().min_by_key(|(_, flow)| flow.last_used);
        if let Some(quiet) = quiet.map(|(address, _)| *address) {
            flows.remove(&quiet);
        }
    }
}

/// A socket of its own towards the listener; what comes back goes to `dialler`.
fn start_flow(
    reader: &Rc<Reader>,
    dialled: &Arc<Socket>,
    listener: SocketAddr,
    back: usize,
    dialler: SocketAddr,
) -> io::Result<Flow> {
    let socket = Socket::new(bind_beside(listener)?)?;
    let (reader, dialled, replying) = (Rc::clone(reader), Arc::clone(dialled), Arc::clone(&socket));
    let replies = tokio::task::spawn_local(async move {
        loop {
            let way = |from, _| (from == listener).then(|| (Arc::clone(&dialled), dialler));
            reader.read(&replying, back, way).await;
        }
    });
    Ok(Flow {
        socket,
        replies: replies.abort_handle(),
        last_used: Instant::now(),
    })
}

impl Reader {
    /// Waits for datagrams on `socket` and offers them to `lane`; `way` says for a
    /// sender's address where they go, or that they go nowhere.
    async fn read(
        &self,
        socket: &Socket,
        lane: usize,
        way: impl FnMut(SocketAddr, Instant) -> Option<(Arc<Socket>, SocketAddr)>,
    ) {
        let failure = match socket.io.readable().await {
            Ok(()) => match self.read_now(socket, lane, way) {
                Err(error) if error.kind() != io::ErrorKind::WouldBlock => error,
                _ => return,
            },
            Err(error) => error,
        };
        // A socket that keeps failing must not keep the thread from the others.
        debug!(error = %failure, "relay cannot read");
        tokio::time::sleep(Duration::from_millis(1)).await;
    }

    fn read_now(
        &self,
        socket: &Socket,
        lane: usize,
        mut way: impl FnMut(SocketAddr, Instant) -> Option<(Arc<Socket>, SocketAddr)>,
    ) -> io::Result<()> {
        let mut memory = self.memory.borrow_mut();
        let mut metas = [RecvMeta::default(); READ_BUFFERS];
        let count = {
            let mut buffers: Vec<_> = memory
                .chunks_mut(READ_BUFFER_BYTES)
                .map(IoSliceMut::new)
                .collect();
            socket.io.try_io(Interest::READABLE, || {
                let io = UdpSockRef::from(&socket.io);
                socket.offload.recv(io, &mut buffers, &mut metas)
            })?
        };
        let now = Instant::now();
        let arrived = metas[..count]
            .iter()
            .zip(memory.chunks(READ_BUFFER_BYTES))
            .filter(|(meta, _)| meta.len > 0)
            .filter_map(|(meta, buffer)| Some((meta, buffer, way(meta.addr, now)?)));
        let arrived: Vec<_> = arrived.collect();
        let mut board = self.shared.board();
        for (meta, buffer, (socket, to)) in arrived {
            let way = Way {
                socket,
                to,
                ecn: meta.ecn,
            };
            board.lanes[lane].offer(now, &buffer[..meta.len], meta.stride, way);
        }
        if board.is_earlier(board.lanes[lane].next_due()) {
            self.shared.earlier.notify_one();
        }
        Ok(())
    }
}
