//! End-to-end tests with real processes: whole experiments, bad input, faults.

mod bench;
mod common;
mod doctor;
mod end_to_end;
mod errors;
mod faults;
mod guide;
mod members;
mod operate;
mod operations;
mod tcp;
mod uploads;
mod world;
