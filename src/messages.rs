//! What the library and the program say alike.

/// A number of things by their name for one: `1 token`, `2 tokens`.
pub fn count(number: usize, name: &str) -> String {
    format!("{number} {name}{}", if number == 1 { "" } else { "s" })
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
