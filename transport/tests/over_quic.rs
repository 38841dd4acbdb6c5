//! Links over QUIC.

mod cases;
mod common;

use common::{Runtime, any_port, identity, settings};
use trefoil_transport::{Node, Protocol, Settings, TransportError};

const PROTOCOL: Protocol = Protocol::Quic;

#[test]
fn an_address_where_nobody_listens_is_unreachable_after_the_time_out() {
    let runtime = Runtime::new();
    let quick = Settings {
        connect_timeout_ms: 300,
        ..settings()
    };
    let a = runtime
        .run(async { Node::bind(&identity(), any_port(), &quick) })
        .unwrap();
    let silent = std::net::UdpSocket::bind(any_port()).unwrap();
    let addr = silent.local_addr().unwrap();
    let err = runtime
        .run(a.connect(addr, identity().pin().unwrap()))
        .unwrap_err();
    assert!(
        matches!(err, TransportError::Unreachable { addr: at, waited_ms: 300 } if at == addr),
        "{err}"
    );
}
