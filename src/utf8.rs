//! Bytes as text, with errors that say where they are none.

use std::path::Path;
use std::{fs, io};

/// A file as text.
///
/// # Errors
/// What the system says, or [`NotUtf8`].
pub fn read(path: &Path) -> io::Result<String> {
    text(fs::read(path)?).map_err(|error| io::Error::new(io::ErrorKind::InvalidData, error))
}

/// The text that bytes are.
///
/// # Errors
/// [`NotUtf8`], for people who have to find the place.
pub fn text(bytes: Vec<u8>) -> Result<String, NotUtf8> {
    String::from_utf8(bytes).map_err(|error| {
        let offset = error.utf8_error().valid_up_to();
        let before = &error.as_bytes()[..offset];
        let line = 1 + before.iter().filter(|byte| **byte == b'\n').count();
        NotUtf8 { offset, line, byte: error.as_bytes()[offset] }
    })
}

/// The first byte that is not part of a whole character.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("no UTF-8 text: the byte at offset {offset}, in line {line}, is {byte:#04x}")]
pub struct NotUtf8 {
    /// Bytes before it.
    pub offset: usize,
    /// Its line, from 1.
    pub line: usize,
    /// The byte.
    pub byte: u8,
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn bytes_that_are_no_text_are_placed() {
        assert_eq!(text("añb\n".into()), Ok("añb\n".to_owned()));
        let cases: [(&[u8], _); 3] =
            [(b"\xff", (0, 1, 0xff)), (b"a\nb\n\xc3\xb1\x80", (6, 3, 0x80)), (b"cut \xe2\x82", (4, 1, 0xe2))];
        for (bytes, (offset, line, byte)) in cases {
            assert_eq!(text(bytes.to_vec()), Err(NotUtf8 { offset, line, byte }));
        }
        let said = text(b"a\n\x0f\xff".to_vec()).expect_err("no text").to_string();
        assert_eq!(said, "no UTF-8 text: the byte at offset 3, in line 2, is 0xff");
    }
}
