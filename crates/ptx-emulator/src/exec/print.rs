//! `printf` and `assert` of kernels: text from their memory.

use super::Cluster;
use crate::error::{Hazard, Stop};

/// Text beyond this is taken to have no end.
const LONGEST: u64 = 1 << 16;

/// A part of what is printed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Part<'a> {
    Text(&'a str),
    /// An argument: what stands between `%` and its letter, and that.
    Argument(&'a str, u8),
}

/// A format string in its parts.
fn parts(format: &str) -> Vec<Part<'_>> {
    let mut found = Vec::new();
    let mut rest = format;
    while let Some(at) = rest.find('%') {
        let conversion = &rest[at + 1..];
        let letter = conversion
            .find(|letter: char| letter == '%' || letter.is_ascii_alphabetic() && !"hlzjtL".contains(letter));
        let Some(end) = letter else {
            break;
        };
        found.push(Part::Text(&rest[..at]));
        found.push(match conversion.as_bytes()[end] {
            b'%' => Part::Text("%"),
            letter => Part::Argument(&conversion[..end], letter),
        });
        rest = &conversion[end + 1..];
    }
    found.push(Part::Text(rest));
    found
}

/// Bytes of an argument: smaller ones come as 4, floats as 8.
fn size(flags: &str, letter: u8) -> u64 {
    if flags.contains(['l', 'z', 'j', 't']) || b"fFeEgGaAsp".contains(&letter) { 8 } else { 4 }
}

/// A number as text; widths are left out.
fn number(flags: &str, letter: u8, bits: u64) -> String {
    let value = f64::from_bits(bits);
    match letter {
        b'd' | b'i' if size(flags, letter) == 8 => (bits as i64).to_string(),
        b'd' | b'i' => (bits as i32).to_string(),
        b'u' => bits.to_string(),
        b'x' => format!("{bits:x}"),
        b'X' => format!("{bits:X}"),
        b'o' => format!("{bits:o}"),
        b'p' => format!("{bits:#x}"),
        b'c' => char::from(bits as u8).to_string(),
        b'e' | b'E' => format!("{value:e}"),
        _ => {
            let digits = flags.split_once('.').and_then(|(_, digits)| digits.parse().ok());
            format!("{value:.*}", digits.unwrap_or(6))
        }
    }
}

impl Cluster<'_> {
    /// Prints what a lane asks for. Arguments lie one behind the other, each aligned to its size.
    pub(super) fn print(&mut self, w: usize, lane: usize, [format, mut at]: [u64; 2]) -> Result<(), Stop> {
        let format = self.text(w, lane, format)?;
        let mut printed = String::new();
        for part in parts(&format) {
            let (flags, letter) = match part {
                Part::Text(text) => {
                    printed.push_str(text);
                    continue;
                }
                Part::Argument(flags, letter) => (flags, letter),
            };
            let bytes = size(flags, letter);
            at = at.next_multiple_of(bytes);
            let mut bits = 0;
            for n in 0..bytes {
                bits |= u64::from(self.generic_byte(w, lane, at + n)?) << (8 * n);
            }
            at += bytes;
            printed.push_str(&match letter {
                b's' => self.text(w, lane, bits)?,
                _ => number(flags, letter, bits),
            });
        }
        print!("{printed}");
        Ok(())
    }

    /// What a failed assertion says: its text, its file, the line and the function.
    pub(super) fn assertion(
        &mut self,
        w: usize,
        lane: usize,
        [text, file, line, function]: [u64; 4],
    ) -> Result<Stop, Stop> {
        let [text, file, function] = [text, file, function].map(|at| self.text(w, lane, at));
        let message = format!("the assertion `{}` fails, {}:{} in {}", text?, file?, line as u32, function?);
        Ok(Stop::new(Hazard::Trap, lane as u32, message))
    }

    fn text(&mut self, w: usize, lane: usize, at: u64) -> Result<String, Stop> {
        let mut bytes = Vec::new();
        for n in 0..LONGEST {
            match self.generic_byte(w, lane, at + n)? {
                0 => break,
                byte => bytes.push(byte),
            }
        }
        Ok(String::from_utf8_lossy(&bytes).into_owned())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn formats() {
        use Part::{Argument, Text};
        let found = parts("a%d: %5.2f%% of %llu%s");
        let expected = [
            Text("a"),
            Argument("", b'd'),
            Text(": "),
            Argument("5.2", b'f'),
            Text(""),
            Text("%"),
            Text(" of "),
            Argument("ll", b'u'),
            Text(""),
            Argument("", b's'),
            Text(""),
        ];
        assert_eq!(found, expected);
        assert_eq!(parts("100%"), [Text("100%")]);
        for (flags, letter, bits, text) in [
            ("", b'd', 0xffff_fffe, "-2"),
            ("ll", b'd', u64::MAX, "-1"),
            ("", b'u', 7, "7"),
            ("08", b'x', 0xab, "ab"),
            ("", b'c', 65, "A"),
            (".2", b'f', 2.5_f64.to_bits(), "2.50"),
            ("", b'f', 2.5_f64.to_bits(), "2.500000"),
        ] {
            assert_eq!(number(flags, letter, bits), text);
        }
        assert_eq!([size("", b'd'), size("l", b'd'), size("", b'f'), size("", b'c')], [4, 8, 8, 4]);
    }
}
