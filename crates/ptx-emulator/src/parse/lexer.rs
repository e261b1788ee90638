//! Text to tokens. Comments go, and so do the lines that only a debugger reads.

use crate::error::Error;

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Kind {
    /// Opcodes, directives, names: anything that begins with a letter or one of `. % $ _`.
    Word,
    Number,
    Text,
    Mark(u8),
}

/// A token and where it stands.
#[derive(Clone, Copy, Debug)]
pub(super) struct Token<'a> {
    pub(super) kind: Kind,
    pub(super) text: &'a str,
    pub(super) start: usize,
    pub(super) line: u32,
}

impl Token<'_> {
    pub(super) fn is(&self, mark: u8) -> bool {
        self.kind == Kind::Mark(mark)
    }
}

pub(super) fn tokens(source: &str) -> Result<Vec<Token<'_>>, Error> {
    let bytes = source.as_bytes();
    let mut found = Vec::new();
    let (mut at, mut line) = (0, 1);
    while let Some(&byte) = bytes.get(at) {
        let start = at;
        let kind = match byte {
            b'\n' => {
                line += 1;
                at += 1;
                continue;
            }
            b' ' | b'\t' | b'\r' => {
                at += 1;
                continue;
            }
            b'/' if bytes.get(at + 1) == Some(&b'/') => {
                at += bytes[at..].iter().position(|byte| *byte == b'\n').unwrap_or(bytes.len() - at);
                continue;
            }
            b'/' if bytes.get(at + 1) == Some(&b'*') => {
                let Some(end) = source[at..].find("*/") else {
                    return Err(error(line, "/*", "this comment never ends"));
                };
                line += source[at..at + end].matches('\n').count() as u32;
                at += end + 2;
                continue;
            }
            b'"' => {
                let Some(end) = source[at + 1..].find('"') else {
                    return Err(error(line, "\"", "this string never ends"));
                };
                at += end + 2;
                Kind::Text
            }
            b'0'..=b'9' => {
                at += length(&bytes[at..], |byte| byte.is_ascii_alphanumeric() || byte == b'.');
                Kind::Number
            }
            _ if begins_word(byte) => {
                loop {
                    at += length(&bytes[at..], |byte| begins_word(byte) || byte.is_ascii_digit());
                    // `shared::cta` is one word, `label:` is two.
                    if !bytes[at..].starts_with(b"::") {
                        break;
                    }
                    at += 2;
                }
                Kind::Word
            }
            _ if byte.is_ascii_graphic() => {
                at += 1;
                Kind::Mark(byte)
            }
            _ => return Err(error(line, "", "a byte that is not PTX")),
        };
        let text = &source[start..at];
        if kind == Kind::Word && matches!(text, ".loc" | ".file") {
            at += length(&bytes[at..], |byte| byte != b'\n');
            continue;
        }
        found.push(Token { kind, text, start, line });
    }
    Ok(found)
}

fn begins_word(byte: u8) -> bool {
    byte.is_ascii_alphabetic() || matches!(byte, b'.' | b'%' | b'$' | b'_')
}

fn length(bytes: &[u8], belongs: impl Fn(u8) -> bool) -> usize {
    bytes.iter().position(|byte| !belongs(*byte)).unwrap_or(bytes.len())
}

fn error(line: u32, text: &str, reason: &str) -> Error {
    Error::Parse { line, text: text.into(), reason: reason.into() }
}
