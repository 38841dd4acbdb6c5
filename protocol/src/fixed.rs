//! Fixed point: real numbers as ring elements with `f` fraction bits.
//!
//! `encode` is exact integer arithmetic after one rounding, so that every platform gets the same
//! ring element; a value outside the ring's range saturates (callers check ranges before).

/// `round(x * 2^f)` with halves away from zero, in two's complement. Not-a-number becomes 0.
pub fn encode(x: f64, frac_bits: u32) -> u64 {
    let scaled = libm::round(x * libm::exp2(f64::from(frac_bits)));
    // `as` saturates at the ends of i64 and maps NaN to 0.
    (scaled as i64) as u64
}

/// The real number that a ring element stands for.
pub fn decode(value: u64, frac_bits: u32) -> f64 {
    (value as i64) as f64 / libm::exp2(f64::from(frac_bits))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn encode_rounds_halves_away_from_zero() {
        assert_eq!(encode(1.0, 16), 65_536);
        assert_eq!(encode(-1.0, 16), 65_536u64.wrapping_neg());
        assert_eq!(encode(0.5, 0), 1);
        assert_eq!(encode(-0.5, 0), u64::MAX);
        assert_eq!(decode(encode(-3.25, 20), 20), -3.25);
    }
}
