//! What the library and the program say alike.

/// A number of things by their name for one: `1 token`, `2 tokens`.
pub fn count(number: usize, name: &str) -> String {
    format!("{number} {name}{}", if number == 1 { "" } else { "s" })
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

/// What serde_json says, and in which column: the message has the line already.
#[cfg(feature = "pipeline")]
pub fn json_problem(error: &serde_json::Error) -> String {
    let (said, column) = (error.to_string(), error.column());
    let place = format!(" at line {} column {column}", error.line());
    said.strip_suffix(&place).map_or(said.clone(), |problem| format!("{problem} (column {column})"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn one_is_not_many() {
        assert_eq!([0, 1, 2].map(|number| count(number, "token")), ["0 tokens", "1 token", "2 tokens"]);
    }

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

    #[cfg(feature = "pipeline")]
    #[test]
    fn a_line_has_one_number() {
        let problem = |text: &str| {
            json_problem(&serde_json::from_str::<Vec<u32>>(text).expect_err("no list of numbers"))
        };
        assert_eq!(problem("nonsense"), "expected ident (column 2)");
        assert_eq!(problem("[1, "), "EOF while parsing a value (column 4)");
        let unplaced = serde_json::from_value::<u32>("a".into()).expect_err("no number");
        assert_eq!(json_problem(&unplaced), unplaced.to_string());
    }
}
