//! End-to-end tests with real processes: whole experiments, bad input, faults.

mod bench;
mod common;
mod end_to_end;
mod errors;
mod faults;
mod guide;
mod operate;
mod operations;
mod tcp;
mod uploads;
