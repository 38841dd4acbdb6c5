//! End-to-end tests with real processes: whole experiments, bad input, faults.

mod bench;
#[cfg(feature = "s3")]
mod bucket;
mod common;
mod deployment;
mod doctor;
mod end_to_end;
mod errors;
mod faults;
mod guide;
mod hospital;
mod import;
mod members;
mod models;
mod networks;
mod operate;
mod operations;
mod serve;
mod survival;
mod tcp;
mod uploads;
mod withdraw;
mod world;
