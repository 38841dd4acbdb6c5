//! What holds over every protocol; the test that includes this says which (`crate::PROTOCOL`).

mod handshake;
mod look_ahead;
mod reach;
mod session;
