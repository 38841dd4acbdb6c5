//! The hot loops: wrapping matrix products and convolutions over Z_2^64, bit planes and bit circuits.
//!
//! Every kernel has a portable loop, which is its definition, and variants for AVX2 and AVX-512 that give the
//! same words. The variant is chosen once at run time ([`isa`]); `TREFOIL_KERNEL=portable|avx2|avx512` forces it.
//! Kernels know nothing of shares and cannot fail on valid shapes: a wrong length is a programming error and panics
//! before any unchecked access. Large products are divided among threads (`crate::threads`) by rows or images, which
//! changes no sum; everything else runs on the calling thread.
//!
//! Read next: `contract.rs` (the one loop under all products), then `gemm.rs`, `conv.rs` and `correlate.rs`, which
//! only describe their operands to it; `planes.rs` and `gates.rs` for the bit-sliced side. `avx2.rs` and `avx512.rs`
//! hold what differs between machines and nothing else.

use std::sync::OnceLock;

#[cfg(target_arch = "x86_64")]
mod avx2;
#[cfg(target_arch = "x86_64")]
mod avx512;
mod contract;
mod conv;
mod correlate;
mod ctr;
mod gates;
mod gemm;
mod peak;
mod planes;
mod portable;
#[cfg(test)]
mod tests;

pub use conv::{
    ConvShape, conv2d, conv2d_grad_input, conv2d_grad_input_with, conv2d_grad_weight,
    conv2d_grad_weight_with, conv2d_with,
};
pub use ctr::{CtrKeys, Join};
pub use gates::{Gate, GateOp, Netlist, PlaneBuffer, run_gates, run_gates_with};
pub use gemm::{gemm, gemm_with};
pub use peak::{PEAK_TURN, peak, peak_with};
pub use planes::{
    BLOCK, Plane, plane_to_words, plane_to_words_with, to_planes, to_planes_with, words_to_plane,
    words_to_plane_with,
};

/// An instruction set that a kernel is written for; ordered from the plainest to the widest.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Isa {
    /// Plain Rust, for any machine.
    Portable,
    /// 256-bit vectors; 64-bit products are put together from 32-bit ones.
    Avx2,
    /// 512-bit vectors with the 64-bit product `vpmullq` (AVX-512 F, DQ, BW, VL).
    Avx512,
}

impl Isa {
    /// Every variant, plainest first.
    pub const ALL: [Isa; 3] = [Isa::Portable, Isa::Avx2, Isa::Avx512];

    /// The widest instruction set that this machine has.
    pub fn best() -> Isa {
        static BEST: OnceLock<Isa> = OnceLock::new();
        *BEST.get_or_init(detect)
    }

    /// This instruction set, or the best one where the machine lacks it. All unchecked calls go through here.
    fn usable(self) -> Isa {
        self.min(Isa::best())
    }
}

#[cfg(target_arch = "x86_64")]
fn detect() -> Isa {
    let avx2 = is_x86_feature_detected!("avx2");
    let avx512 = is_x86_feature_detected!("avx512f")
        && is_x86_feature_detected!("avx512dq")
        && is_x86_feature_detected!("avx512bw")
        && is_x86_feature_detected!("avx512vl");
    match (avx2, avx512) {
        (true, true) => Isa::Avx512,
        (true, false) => Isa::Avx2,
        _ => Isa::Portable,
    }
}

#[cfg(not(target_arch = "x86_64"))]
fn detect() -> Isa {
    Isa::Portable
}

/// The instruction set in use: the best one, unless `TREFOIL_KERNEL` forces a plainer one. Chosen once.
///
/// A name that is unknown, or that this machine does not support, counts as the best one.
pub fn isa() -> Isa {
    static CHOSEN: OnceLock<Isa> = OnceLock::new();
    *CHOSEN.get_or_init(|| forced(std::env::var("TREFOIL_KERNEL").ok().as_deref()).usable())
}

fn forced(name: Option<&str>) -> Isa {
    match name {
        Some("portable") => Isa::Portable,
        Some("avx2") => Isa::Avx2,
        _ => Isa::Avx512,
    }
}

/// Multiply-adds in a nanosecond of one core, roughly: decides what is worth a thread.
const MACS_PER_NS: usize = 16;

/// What a product does with its destination `c`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Acc {
    /// `c = p`
    Set,
    /// `c += p`
    Add,
    /// `c -= p`
    Sub,
}

impl Acc {
    /// The new value of a destination word that holds `old` and meets the product `p`.
    #[inline(always)]
    fn apply(self, old: u64, p: u64) -> u64 {
        match self {
            Acc::Set => p,
            Acc::Add => old.wrapping_add(p),
            Acc::Sub => old.wrapping_sub(p),
        }
    }
}
