//! How probable each symbol is: rounded normal distributions of 21 widths.
//!
//! A class is a standard deviation in quarter octaves: 2^(class/4) symbols.  Keys and values that
//! were divided by the deviation of their channel are so nearly normal that distributions learned
//! from them are no better (0.002 bits a number on SmolLM2).  Wide classes are coded as narrower
//! ones after their low bits are split off, which are as good as random.

use std::sync::OnceLock;

/// Bits of a probability.
pub const PRECISION: u32 = 11;
/// What the frequencies of a table add up to.
pub const SLOTS: usize = 1 << PRECISION;
/// The narrowest class.
pub const NARROWEST: i32 = -12;
/// The widest class without low bits.
pub const WIDEST: i32 = 8;
/// The symbol that says: the value stands elsewhere.
pub const ESCAPE: i8 = i8::MIN;

/// The frequencies of one class.
pub struct Table {
    /// Symbols from `-reach` to `reach` have a frequency; the one after them is the escape.
    pub reach: i32,
    /// For each symbol: its slots << 16 | the first of them.
    pub spans: Vec<u32>,
    /// For each slot: frequency << 20 | distance from the symbol's first slot << 8 | symbol.
    pub slots: Vec<u32>,
}

impl Table {
    fn new(class: i32) -> Self {
        let deviation = libm::exp2(f64::from(class) / 4.0);
        let reach = (libm::ceil(5.0 * deviation) as i32).clamp(1, 31);
        let below = |x: f64| libm::erf(x / deviation / std::f64::consts::SQRT_2) / 2.0;
        let mut counts: Vec<usize> = (-reach..=reach)
            .map(|symbol| {
                let middle = f64::from(symbol);
                let share = below(middle + 0.5) - below(middle - 0.5);
                (libm::round(share * SLOTS as f64) as usize).max(1)
            })
            .collect();
        counts.push(1);
        // What rounding has left over goes to the likeliest symbol.
        let sum: usize = counts.iter().sum();
        let middle = reach as usize;
        counts[middle] = (counts[middle] + SLOTS).saturating_sub(sum).max(1);
        let mut spans = Vec::with_capacity(counts.len());
        let mut slots = Vec::with_capacity(SLOTS);
        for (index, count) in counts.iter().enumerate() {
            let symbol = if index > 2 * middle {
                ESCAPE
            } else {
                (index as i32 - reach) as i8
            };
            spans.push((*count as u32) << 16 | slots.len() as u32);
            for distance in 0..*count {
                let entry = (*count as u32) << 20 | (distance as u32) << 8;
                slots.push(entry | u32::from(symbol as u8));
            }
        }
        Self {
            reach,
            spans,
            slots,
        }
    }
}

/// The table of a class, and the low bits to be split off before it.
pub fn table(class: i32) -> (&'static Table, u32) {
    static TABLES: OnceLock<Vec<Table>> = OnceLock::new();
    let tables = TABLES.get_or_init(|| (NARROWEST..=WIDEST).map(Table::new).collect());
    let low = if class > WIDEST {
        (class - WIDEST + 3) / 4
    } else {
        0
    };
    let index = (class - 4 * low - NARROWEST).clamp(0, WIDEST - NARROWEST);
    (&tables[index as usize], low as u32)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn frequencies_add_up_and_every_symbol_has_one() {
        for class in NARROWEST..=WIDEST {
            let (table, low) = table(class);
            assert_eq!(low, 0);
            assert_eq!(table.slots.len(), SLOTS, "class {class}");
            assert_eq!(table.spans.len(), 2 * table.reach as usize + 2);
            assert!(table.spans.iter().all(|span| span >> 16 > 0));
            assert_eq!(table.spans[0] >> 16, table.slots[0] >> 20);
        }
    }

    #[test]
    fn wide_classes_use_a_narrow_table_and_low_bits() {
        for (class, low) in [(8, 0), (9, 1), (12, 1), (13, 2), (40, 8)] {
            assert_eq!(table(class).1, low);
        }
    }
}
