//! End-to-end tests of Trefoil: real node processes, real links, bad input, faults. The tests are in
//! `tests/tests`. Two binaries serve them: the `trefoil` tool under another name, because a package
//! does not see another package's binary, and a node that runs single operations
//! (`trefoil-operations-node`). The library is what that node and its test have in common.

#![forbid(unsafe_code)]

pub mod operations;
pub mod report;
