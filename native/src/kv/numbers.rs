//! Runs of small integers in three streams: coded symbols, plain low bits, and rare large values.

use super::rans::{encode, Decoder};
use super::tables::{table, Table, ESCAPE};
use super::Problem;

/// The most numbers in a run: a row of tokens, or the channels of a head.
pub type Run<'a> = &'a mut [i32];

/// Collects runs.
#[derive(Default)]
pub struct Writer {
    spans: Vec<u32>,
    lows: Vec<u8>,
    escapes: Vec<u8>,
}

/// Half of what the low bits can count to: they are taken off so that what is left stays centred.
fn half(low: u32) -> i32 {
    if low == 0 {
        0
    } else {
        1 << (low - 1)
    }
}

impl Writer {
    /// Be ready for about `count` numbers.
    pub fn new(count: usize) -> Self {
        Self {
            spans: Vec::with_capacity(count + count / 8),
            ..Self::default()
        }
    }

    #[inline(always)]
    /// Add a run of about normal numbers whose deviation is 2^(class / 4).
    pub fn put(&mut self, run: &[i32], class: i32) {
        let (table, low) = table(class);
        let Table { reach, spans, .. } = table;
        let half = half(low);
        // the last span is that of the escape
        let escape = spans.len() - 1;
        let symbol = |value: &i32| value.wrapping_add(half) >> low;
        let index = |symbol: i32| (symbol.wrapping_add(*reach) as u32 as usize).min(escape);
        let at = self.spans.len();
        self.spans.resize(at + run.len(), 0);
        for (span, value) in self.spans[at..].iter_mut().zip(run) {
            *span = spans[index(symbol(value))];
        }
        let rare = |symbol: i32| index(symbol) == escape;
        if run
            .iter()
            .fold(false, |any, value| any | rare(symbol(value)))
        {
            for symbol in run.iter().map(symbol).filter(|symbol| rare(*symbol)) {
                self.escapes.extend_from_slice(&symbol.to_le_bytes());
            }
        }
        if low > 0 {
            let mask = (1_u64 << low) - 1;
            let (mut bits, mut count) = (0_u64, 0);
            for value in run {
                bits |= (value.wrapping_add(half) as u64 & mask) << count;
                count += low;
                while count >= 8 {
                    self.lows.push(bits as u8);
                    bits >>= 8;
                    count -= 8;
                }
            }
            if count > 0 {
                self.lows.push(bits as u8);
            }
        }
    }

    #[inline(always)]
    /// Append everything to `out`: three lengths, then the streams.
    pub fn finish(self, out: &mut Vec<u8>) {
        let words = encode(&self.spans);
        for length in [words.len(), self.lows.len(), self.escapes.len()] {
            out.extend_from_slice(&(length as u32).to_le_bytes());
        }
        out.extend(words.iter().flat_map(|word| word.to_le_bytes()));
        out.extend_from_slice(&self.lows);
        out.extend_from_slice(&self.escapes);
    }
}

/// Takes up to `count` bytes off the front of `bytes`.
pub fn take<'a>(bytes: &mut &'a [u8], count: usize) -> Result<&'a [u8], Problem> {
    let Some((taken, rest)) = bytes.split_at_checked(count) else {
        return Err(Problem::Damaged("it is shorter than it says"));
    };
    *bytes = rest;
    Ok(taken)
}

/// The words of a stream, which [`Reader`] borrows.
pub struct Streams<'a> {
    words: Vec<u16>,
    lows: &'a [u8],
    escapes: &'a [u8],
}

impl<'a> Streams<'a> {
    /// Take apart what [`Writer::finish`] wrote; nothing may follow it.
    pub fn split(mut bytes: &'a [u8]) -> Result<Self, Problem> {
        let mut lengths = [0_usize; 3];
        for length in &mut lengths {
            let mut four = [0; 4];
            four.copy_from_slice(take(&mut bytes, 4)?);
            *length = u32::from_le_bytes(four) as usize;
        }
        let words = take(&mut bytes, lengths[0].saturating_mul(2))?;
        let streams = Self {
            words: words
                .chunks_exact(2)
                .map(|pair| u16::from_le_bytes([pair[0], pair[1]]))
                .collect(),
            lows: take(&mut bytes, lengths[1])?,
            escapes: take(&mut bytes, lengths[2])?,
        };
        if !bytes.is_empty() {
            return Err(Problem::Damaged("something follows its streams"));
        }
        Ok(streams)
    }

    /// Begin to read.
    pub fn reader(&self) -> Result<Reader<'_>, Problem> {
        Ok(Reader {
            symbols: Decoder::new(&self.words)?,
            lows: self.lows,
            escapes: self.escapes,
            buffer: Vec::new(),
        })
    }
}

/// Gives the runs back, in the order in which they were put.
pub struct Reader<'a> {
    symbols: Decoder<'a>,
    lows: &'a [u8],
    escapes: &'a [u8],
    buffer: Vec<i8>,
}

impl Reader<'_> {
    /// Fill `run` with the next numbers, which were put with `class`.
    #[inline(always)]
    pub fn get(&mut self, run: Run<'_>, class: i32) -> Result<(), Problem> {
        let (table, low) = table(class);
        self.buffer.resize(run.len(), 0);
        self.symbols.read(table, &mut self.buffer);
        let mut escaped = false;
        for (value, symbol) in run.iter_mut().zip(&self.buffer) {
            *value = i32::from(*symbol);
            escaped |= *symbol == ESCAPE;
        }
        if escaped {
            for value in run.iter_mut() {
                if *value == i32::from(ESCAPE) {
                    let mut four = [0; 4];
                    four.copy_from_slice(take(&mut self.escapes, 4)?);
                    *value = i32::from_le_bytes(four);
                }
            }
        }
        if low > 0 {
            let mut bytes = take(&mut self.lows, (run.len() * low as usize).div_ceil(8))?.iter();
            let mask = (1_u64 << low) - 1;
            let half = half(low);
            let (mut bits, mut count) = (0_u64, 0);
            for value in run {
                while count < low {
                    bits |= u64::from(bytes.next().copied().unwrap_or(0)) << count;
                    count += 8;
                }
                *value = value
                    .wrapping_shl(low)
                    .wrapping_add((bits & mask) as i32 - half);
                bits >>= low;
                count -= low;
            }
        }
        Ok(())
    }

    /// Check that nothing is left over.
    pub fn finish(&self) -> Result<(), Problem> {
        if !self.lows.is_empty() || !self.escapes.is_empty() {
            return Err(Problem::Damaged("something is left over in its streams"));
        }
        self.symbols.finish()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn any_number_of_any_class_comes_back() -> Result<(), Problem> {
        let runs: Vec<(i32, Vec<i32>)> = (-14..60_i32)
            .map(|class| {
                let scale = 1_i64 << (class.max(0) / 4 + 2).min(30);
                let value = |i: i64| (i * i * 2_654_435_761 % (2 * scale + 1) - scale) as i32;
                let length = if class % 2 == 0 {
                    64
                } else {
                    i64::from(class).abs()
                };
                (class, (0..length).map(value).collect())
            })
            .chain([(
                3,
                vec![i32::MAX >> 1, i32::MIN >> 1, 0, -1, 1, 31, -31, 128, -128],
            )])
            .collect();
        let mut writer = Writer::default();
        for (class, run) in &runs {
            writer.put(run, *class);
        }
        let mut bytes = Vec::new();
        writer.finish(&mut bytes);
        let streams = Streams::split(&bytes)?;
        let mut reader = streams.reader()?;
        for (class, run) in &runs {
            let mut found = vec![0; run.len()];
            reader.get(&mut found, *class)?;
            assert_eq!(&found, run, "class {class}");
        }
        reader.finish()?;
        assert!(Streams::split(&bytes[..bytes.len() - 1]).is_err());
        assert!(streams.reader()?.finish().is_err());
        Ok(())
    }
}
