//! Links over TLS on TCP.

mod cases;
mod common;

use trefoil_transport::Protocol;

const PROTOCOL: Protocol = Protocol::Tcp;
