//! Text inside SVG and HTML.

use std::fmt::Write;

/// The text with nothing in it that markup could take for its own: what XML cannot hold at all,
/// control characters above all, becomes U+FFFD.
pub(super) fn escape(text: &str) -> String {
    let mut out = String::with_capacity(text.len());
    for char in text.chars() {
        match char {
            '&' => out.push_str("&amp;"),
            '<' => out.push_str("&lt;"),
            '>' => out.push_str("&gt;"),
            '"' => out.push_str("&quot;"),
            '\'' => out.push_str("&#39;"),
            '\t' | '\n' => out.push(char),
            // HTML and XML turn a bare one into a line feed.
            '\r' => out.push_str("&#13;"),
            '\0'..='\x1f' | '\x7f'..='\u{9f}' | '\u{fffe}' | '\u{ffff}' => {
                out.push(char::REPLACEMENT_CHARACTER);
            }
            _ => out.push(char),
        }
    }
    out
}

/// Appends. Writing to a string cannot fail.
pub(super) fn push(out: &mut String, text: std::fmt::Arguments<'_>) {
    let _ = out.write_fmt(text);
}

#[cfg(test)]
mod tests {
    use super::escape;

    #[test]
    fn nothing_is_left_that_markup_would_read() {
        assert_eq!(
            escape("a <b> & \"c\" 'd'\n\0\u{1b}ü"),
            "a &lt;b&gt; &amp; &quot;c&quot; &#39;d&#39;\n\u{fffd}\u{fffd}ü"
        );
    }
}
