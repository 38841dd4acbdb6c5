//! End-to-end tests of Trefoil: real node processes, real links, bad input, faults. The tests are in
//! `tests/tests`; this crate's binary is the `trefoil` tool under another name, because a package
//! does not see another package's binary.
