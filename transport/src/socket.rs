//! A UDP socket from which few messages are taken at a time.
//!
//! With receive offload a message is up to 64 KiB of datagrams. quinn takes up to 32 of them with one
//! call, copies each and decrypts them after the last one; on a busy node, which finds many, a megabyte
//! has then passed through the core's own caches, and each step reads what the one before has lost
//! (`docs/adr/0015-cost-of-a-step.md`).

use quinn::udp::{RecvMeta, Transmit};
use quinn::{AsyncUdpSocket, UdpPoller};
use std::io::{self, IoSliceMut};
use std::net::SocketAddr;
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll};

/// Messages taken with one call.
const AT_ONCE: usize = 4;

/// Another socket, less of which is received at once.
#[derive(Debug)]
pub(crate) struct FewAtOnce(pub(crate) Arc<dyn AsyncUdpSocket>);

impl AsyncUdpSocket for FewAtOnce {
    fn create_io_poller(self: Arc<Self>) -> Pin<Box<dyn UdpPoller>> {
        self.0.clone().create_io_poller()
    }

    fn try_send(&self, transmit: &Transmit<'_>) -> io::Result<()> {
        self.0.try_send(transmit)
    }

    fn poll_recv(
        &self,
        cx: &mut Context<'_>,
        bufs: &mut [IoSliceMut<'_>],
        meta: &mut [RecvMeta],
    ) -> Poll<io::Result<usize>> {
        // Without receive offload a message is one datagram.
        let most = match self.0.max_receive_segments() {
            1 => bufs.len(),
            _ => AT_ONCE.min(bufs.len()),
        };
        let few = most.min(meta.len());
        self.0.poll_recv(cx, &mut bufs[..few], &mut meta[..few])
    }

    fn local_addr(&self) -> io::Result<SocketAddr> {
        self.0.local_addr()
    }

    fn max_transmit_segments(&self) -> usize {
        self.0.max_transmit_segments()
    }

    fn max_receive_segments(&self) -> usize {
        self.0.max_receive_segments()
    }

    fn may_fragment(&self) -> bool {
        self.0.may_fragment()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use quinn::{Runtime, TokioRuntime};
    use std::net::UdpSocket;
    use std::time::Duration;

    #[test]
    fn however_many_wait_few_come_at_once_and_none_is_lost() {
        let runtime = tokio::runtime::Builder::new_current_thread()
            .enable_all()
            .build()
            .unwrap();
        let [from, to] = [0; 2].map(|_| UdpSocket::bind("127.0.0.1:0").unwrap());
        to.set_nonblocking(true).unwrap();
        from.connect(to.local_addr().unwrap()).unwrap();
        for datagram in 0..7u8 {
            from.send(&[datagram]).unwrap();
        }
        let mut taken = Vec::new();
        runtime.block_on(async {
            let socket = FewAtOnce(TokioRuntime.wrap_udp_socket(to).unwrap());
            while taken.len() < 7 {
                let mut bufs = [[0; 2048]; 8];
                let mut meta = [RecvMeta::default(); 8];
                let receiving = std::future::poll_fn(|cx| {
                    let mut slices = bufs.each_mut().map(|buf| IoSliceMut::new(buf));
                    socket.poll_recv(cx, &mut slices, &mut meta)
                });
                let waited = tokio::time::timeout(Duration::from_secs(20), receiving);
                let messages = waited.await.unwrap().unwrap();
                let offload = socket.max_receive_segments() > 1;
                assert!((1..=if offload { AT_ONCE } else { 7 }).contains(&messages));
                for (buf, meta) in bufs.iter().zip(&meta).take(messages) {
                    taken.extend_from_slice(&buf[..meta.len]);
                }
            }
        });
        assert_eq!(taken, [0, 1, 2, 3, 4, 5, 6]);
    }
}
