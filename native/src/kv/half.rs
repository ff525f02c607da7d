//! f16 and f32, without branches, so that loops over them run in vector registers.

/// 2^112: what the exponent of an f16 lacks when its bits are read as those of an f32.
const LIFT: f32 = f32::from_bits(239 << 23);
/// The largest f16.
const MAX: f32 = 65504.0;
/// The smallest f16 that is not subnormal.
const NORMAL: f32 = 6.103_515_6e-5;

/// The value of the bits of a finite f16.
#[inline(always)]
pub fn widen(bits: u16) -> f32 {
    let bits = u32::from(bits);
    let size = f32::from_bits((bits & 0x7fff) << 13) * LIFT;
    f32::from_bits(size.to_bits() | (bits & 0x8000) << 16)
}

/// The bits of the nearest f16, ties to even; finite values beyond the largest become the largest.
#[inline(always)]
pub fn narrow(value: f32) -> u16 {
    let sign = (value.to_bits() >> 16) as u16 & 0x8000;
    let size = value.abs().min(MAX);
    let bits = size.to_bits();
    // Of a normal number 13 bits are rounded away; a subnormal one is rounded by adding 0.5, whose
    // last place is the distance between subnormal f16.
    let normal = (bits + 0xfff + ((bits >> 13) & 1)).wrapping_sub(112 << 23) >> 13;
    let subnormal = (size + 0.5).to_bits().wrapping_sub(0x3f00_0000);
    let size = if size < NORMAL { subnormal } else { normal };
    size as u16 | sign
}

/// Whether the bits of an f16 are those of NaN or an infinity.
#[inline(always)]
pub fn wild(bits: u16) -> bool {
    bits & 0x7c00 == 0x7c00
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_finite_f16_comes_back() {
        for bits in (0..=u16::MAX).filter(|bits| !wild(*bits)) {
            assert_eq!(narrow(widen(bits)), bits, "{bits:#x}");
        }
    }

    #[test]
    fn values_between_go_to_the_nearest_and_ties_to_even() {
        for bits in (0..0x7bff_u16).step_by(7) {
            let (low, high) = (widen(bits), widen(bits + 1));
            let middle = (low + high) / 2.0;
            let even = bits + (bits & 1);
            assert_eq!(narrow(middle), even, "{bits:#x}");
            assert_eq!(narrow(f32::from_bits(middle.to_bits() - 1)), bits);
            assert_eq!(narrow(f32::from_bits(middle.to_bits() + 1)), bits + 1);
        }
    }

    #[test]
    fn what_is_too_large_becomes_the_largest() {
        assert_eq!(narrow(65_519.0), 0x7bff);
        assert_eq!(narrow(1e30), 0x7bff);
        assert_eq!(narrow(-1e30), 0xfbff);
        assert_eq!(widen(0x7bff), 65_504.0);
        assert_eq!(widen(1), 2.0_f32.powi(-24));
    }
}
