//! What every node derives from a job description on its own: steps, plans, and the hashes that
//! the nodes compare.

use std::fmt;

use trefoil_models::{Schedule, schedule};
use trefoil_protocol::plan::Plan;
use trefoil_transport::Hello;

use crate::wire::CONTROL_VERSION;
use crate::{JobDescription, SOFTWARE, SessionId};

/// A job, compiled.
pub struct Derived {
    /// The steps.
    pub schedule: Schedule,
    /// A plan for each program.
    pub plans: Vec<Plan>,
    /// The programs' hashes.
    pub hashes: Vec<[u8; 32]>,
    /// The ring's width.
    pub ring_bits: u8,
    /// The fraction bits.
    pub frac_bits: u8,
}

impl fmt::Debug for Derived {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(
            f,
            "Derived {{ programs: {}, steps: {} }}",
            self.plans.len(),
            self.schedule.steps.len()
        )
    }
}

impl Derived {
    /// Compiles a job that has passed [`JobDescription::check`]. Takes a while for large networks:
    /// not for a thread that others wait for.
    pub fn new(job: &JobDescription) -> Result<Derived, String> {
        let (ring_bits, frac_bits) = job.format();
        let schedule = schedule(&job.kind).map_err(|err| err.to_string())?;
        let hashes = schedule
            .programs
            .iter()
            .map(|program| program.hash())
            .collect();
        let plans = schedule
            .programs
            .iter()
            .map(|program| Plan::for_link(program, job.link))
            .collect();
        Ok(Derived {
            schedule,
            plans,
            hashes,
            ring_bits,
            frac_bits,
        })
    }

    /// What this node says at the start of every stream of the session.
    pub fn hello(&self, session: SessionId) -> Hello {
        Hello {
            wire_version: CONTROL_VERSION,
            session,
            program_hashes: self.hashes.clone(),
            ring_bits: self.ring_bits,
            frac_bits: self.frac_bits,
            software: SOFTWARE.into(),
        }
    }
}
