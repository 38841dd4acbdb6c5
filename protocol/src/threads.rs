//! How many threads a node's kernels use, and the one way in which they share work.
//!
//! Work is cut into contiguous runs of whole pieces (blocks, rows, images), one for each thread; no
//! piece depends on another, so results do not depend on the number of threads. Threads are scoped
//! (`std::thread::scope`): starting one costs some 20 microseconds, which is why small work is never
//! cut, and which a pool with its queue and its unsafe lifetimes would save little of.

use std::sync::OnceLock;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::thread;

/// 0: not set.
static THREADS: AtomicUsize = AtomicUsize::new(0);

/// The least work that is worth a thread, in nanoseconds of one core.
const WORTH_NS: usize = 100_000;

/// Sets how many threads the kernels of this process use; 0 restores the default.
pub fn set_threads(threads: usize) {
    THREADS.store(threads, Ordering::Relaxed);
}

/// How many threads the kernels of this process use: what was set, or a quarter of the cores, at
/// least one. A quarter, because a machine that runs one node of a consortium often runs all four.
pub fn threads() -> usize {
    // Asked once: on Linux the answer is read from files, which takes as long as a small kernel.
    static DEFAULT: OnceLock<usize> = OnceLock::new();
    match THREADS.load(Ordering::Relaxed) {
        0 => *DEFAULT.get_or_init(|| {
            thread::available_parallelism().map_or(1, |cores| (cores.get() / 4).max(1))
        }),
        set => set,
    }
}

/// Among how many threads work of about this many nanoseconds is divided.
pub(crate) fn parts(work_ns: usize) -> usize {
    match work_ns / WORTH_NS {
        0 | 1 => 1,
        worth => threads().min(worth),
    }
}

/// What one thread writes at once: its zeros are then still in the core's own cache.
const RUN_BYTES: usize = 256 << 10;
/// Such a run is a multiple of so many pieces, if it has as many: a block of any kind of value is a
/// multiple of 64 bytes, and what hashes runs is fastest on multiples of 1,024.
const RUN_PIECES: usize = 16;

/// `len` items, written by `each(first, run)` as in [`split`]; a run holds zeros before.
///
/// # Panics
/// Where `each` does, or `piece` is 0.
pub(crate) fn made<T: Copy + Default + Send>(
    len: usize,
    piece: usize,
    work_ns: usize,
    each: impl Fn(usize, &mut [T]) + Sync,
) -> Vec<T> {
    let mut out = Vec::with_capacity(len);
    append(&mut out, len, piece, work_ns, each, |_| {});
    out
}

/// Appends `len` items to `out`, written as in [`made`]; `done` sees each run of them once it is
/// written, in order, while one thread's is still in its core's cache.
///
/// # Panics
/// Where `each` or `done` does, or `piece` is 0.
pub(crate) fn append<T: Copy + Default + Send>(
    out: &mut Vec<T>,
    len: usize,
    piece: usize,
    work_ns: usize,
    each: impl Fn(usize, &mut [T]) + Sync,
    done: impl FnMut(&[T]),
) {
    append_among(parts(work_ns), out, len, piece, each, done);
}

/// [`append`] among at most so many threads.
fn append_among<T: Copy + Default + Send>(
    parts: usize,
    out: &mut Vec<T>,
    len: usize,
    piece: usize,
    each: impl Fn(usize, &mut [T]) + Sync,
    mut done: impl FnMut(&[T]),
) {
    let end = out.len() + len;
    let pieces = match (parts, RUN_BYTES / size_of::<T>() / piece) {
        (1, few) if few < RUN_PIECES => few.max(1),
        (1, many) => many - many % RUN_PIECES,
        _ => len.div_ceil(piece),
    };
    let mut first = 0;
    while out.len() < end {
        let from = out.len();
        out.resize(end.min(from + pieces * piece), T::default());
        split_among(parts, &mut out[from..], piece, |at, run| {
            each(first + at, run)
        });
        done(&out[from..]);
        first += pieces;
    }
}

/// Calls `each(first, run)` for runs of whole pieces of `out`, `piece` items each (the last may be
/// shorter), on several threads if `work_ns` is worth it. `first` is the index of the run's first piece.
///
/// # Panics
/// Where `each` does, or `piece` is 0.
pub(crate) fn split<T: Send>(
    out: &mut [T],
    piece: usize,
    work_ns: usize,
    each: impl Fn(usize, &mut [T]) + Sync,
) {
    split_among(parts(work_ns), out, piece, each);
}

/// [`split`] among at most so many threads.
fn split_among<T: Send>(
    parts: usize,
    out: &mut [T],
    piece: usize,
    each: impl Fn(usize, &mut [T]) + Sync,
) {
    let pieces = out.len().div_ceil(piece);
    let parts = parts.min(pieces);
    if parts <= 1 {
        return each(0, out);
    }
    let run = pieces.div_ceil(parts);
    thread::scope(|scope| {
        let mut runs = out.chunks_mut(run * piece).enumerate();
        let own = runs.next();
        for (index, out) in runs {
            let each = &each;
            scope.spawn(move || each(index * run, out));
        }
        if let Some((_, out)) = own {
            each(0, out);
        }
    });
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_piece_is_worked_on_once_and_knows_its_place() {
        for threads in 1..6 {
            for len in [0, 1, 7, 8, 9, 63, 64, 65, 1000] {
                let mut out = vec![usize::MAX; len];
                split_among(threads, &mut out, 8, |first, run| {
                    for (i, item) in run.iter_mut().enumerate() {
                        assert_eq!(*item, usize::MAX);
                        *item = first * 8 + i;
                    }
                });
                assert!(out.iter().enumerate().all(|(i, item)| i == *item));
            }
        }
    }

    #[test]
    fn what_is_appended_is_the_same_for_any_number_of_threads_and_seen_in_order() {
        for (len, piece) in [
            (0, 3),
            (5, 7),
            (70_001, 3),
            (200_000, 512),
            (90_000, 40_000),
        ] {
            for parts in 1..4 {
                let mut out = vec![u64::MAX; 2];
                let mut seen = Vec::new();
                let each = |first: usize, run: &mut [u64]| {
                    for (i, item) in run.iter_mut().enumerate() {
                        assert_eq!(*item, 0);
                        *item = (first * piece + i) as u64;
                    }
                };
                append_among(parts, &mut out, len, piece, each, |run| {
                    seen.extend_from_slice(run)
                });
                assert!(out[..2] == [u64::MAX; 2] && out[2..] == seen);
                assert!(seen.iter().enumerate().all(|(i, item)| i as u64 == *item));
                assert_eq!(seen.len(), len);
            }
        }
    }

    #[test]
    fn small_work_stays_on_one_thread() {
        assert_eq!(parts(WORTH_NS), 1);
        assert!(parts(100 * WORTH_NS) >= 1 && threads() >= 1);
    }
}
